"""Run by test_triton.py in a process of its own: prints how far Triton's kernels, interpreted, are from the definition.

One line of JSON a case: [name, [error of every output and gradient relative to its largest value]].
"""

import json

import torch

from ssmvision.ops import causal_conv1d, linear_scan, ssd_scan


def widened(x, double):
    if x is None or not (x.is_floating_point() or x.is_complex()):
        return x
    if double:
        x = x.to(torch.complex128 if x.is_complex() else torch.float64)
    return x.detach().clone().requires_grad_()


def evaluate(scan, inputs, backend):
    inputs = [widened(x, backend == "reference") for x in inputs]
    outputs = scan(*inputs, backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for y in outputs:
        y = (torch.view_as_real(y) if y.is_complex() else y).double()
        loss = loss + (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
    leaves = [x for x in inputs if x is not None and x.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def report(name, scan, inputs):
    found, wanted = (evaluate(scan, inputs, backend) for backend in ("triton", "reference"))
    pairs = zip(found, wanted, strict=True)
    print(json.dumps([name, [((f - w).abs().max() / w.abs().max()).item() for f, w in pairs]]), flush=True)


def main():
    torch.manual_seed(0)
    length = 19
    reset = torch.rand(2, length) < 0.2
    reset[:, 3] = True
    real = [torch.rand(2, length, 5), torch.randn(2, length, 5)]
    for reverse in (False, True):

        def both(a, x, start, flags, backend, reverse=reverse):
            return linear_scan(a, x, start, flags, reverse, backend=backend)

        report(f"linear_scan, reverse={reverse}", both, [*real, torch.randn(2, 5), reset])
    report("linear_scan from zero", lambda a, x, backend: linear_scan(a, x, backend=backend), real)
    report(
        "linear_scan of ConvS5",
        lambda a, x, start, flags, backend: linear_scan(a, x, start, flags, backend=backend),
        [
            0.7 * torch.randn(3, 1, dtype=torch.complex64), torch.randn(2, length, 3, 4, dtype=torch.complex64),
            torch.randn(2, 3, 4, dtype=torch.complex64), reset,
        ],
    )  # fmt: skip
    report(
        "causal_conv1d",
        lambda x, w, b, backend: causal_conv1d(x, w, b, True, backend=backend),
        [torch.randn(2, 5, length), torch.randn(5, 4), torch.randn(5)],
    )
    routes = torch.stack([torch.randperm(length) for _ in range(2)])
    report(
        "causal_conv1d along routes",
        lambda x, w, b, order, flags, backend: causal_conv1d(x, w, b, True, order, flags, backend=backend),
        [torch.randn(2, 5, length), torch.randn(2, 5, 4), torch.randn(2, 5), routes, reset],
    )
    for length in (19, 70):  # inside one chunk, and across its border
        reset = torch.rand(2, length) < 0.2
        reset[:, min(64, length - 1)] = True
        report(
            f"ssd_scan over {length}",
            lambda x, dt, A, B, C, start, flags, backend: ssd_scan(
                x, dt, A, B, C, dt_softplus=True, initial_state=start, reset=flags, backend=backend
            ),
            [
                torch.randn(2, length, 4, 6), torch.randn(2, length, 4), -torch.rand(4),
                torch.randn(2, length, 2, 5), torch.randn(2, length, 2, 5), torch.randn(2, 4, 6, 5), reset,
            ],
        )  # fmt: skip


if __name__ == "__main__":
    main()
