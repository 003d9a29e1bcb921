"""Run by test_triton.py in a process of its own: prints how far Triton's kernels, interpreted, are from the definition.

One line of JSON a case: [name, [error of every output and gradient relative to its largest value]].
"""

import json
import math
import warnings
from dataclasses import replace

import torch
from safetensors.torch import load_file
from scan_cases import Case, cast, error, make
from scan_cases import evaluate as evaluate_scan
from test_linear_scan import FOLDER as LINEAR
from test_linear_scan import META as META_LINEAR
from test_scan_2d import META as META_2D
from test_scan_2d import NAMES as NAMES_2D
from test_scan_2d import golden as golden_2d
from test_selective_scan_golden import META, arguments, golden, in_our_types
from test_ssd_scan import META as META_SSD
from test_ssd_scan import golden as golden_ssd

from ssmvision.ops import (
    causal_conv1d,
    linear_scan,
    resets_from_seq_idx,
    selective_scan,
    selective_scan_2d,
    ssd_scan,
)
from ssmvision.ops.triton import selective_scan as kernels

EVERYTHING = {"D": True, "bias": True, "softplus": True, "initial": True}
SELECTIVE = {
    "plain": Case(l=9, d=1, n=1),
    "everything": Case(l=13, B=5, C="channel", rank=2, reset="random", z=True, **EVERYTHING),
    "across the border of a chunk": Case(b=1, d=2, n=2, l=67, reset=(5, 63, 64, 65), initial=True, softplus=True),
    "growing": Case(b=1, l=10, growing=True, D=True),
    "several tiles": Case(b=1, d=67, n=1, l=9, softplus=True, D=True),
    "two groups of whole tiles": Case(b=1, d=64, n=2, l=8, B=2, C=2),
    "blocks of states": Case(b=1, d=3, n=17, l=9, reset=(4,), **EVERYTHING),
    "strided": Case(b=1, k=2, l=9, routes="random", layout="strided", rank=3, reset="random", **EVERYTHING),
    "channels last": Case(b=1, k=2, l=9, routes="random", layout="last", rank=3, **EVERYTHING),
    "apart": Case(b=1, k=3, l=12, routes="subset", merge=False, D=True, u_per_route=True),
    "no routes, merged": Case(b=1, k=2, l=9, d=3, D=True),
    **{
        name: Case(b=1, k=k, d=3, n=2, l=12, routes=name, softplus=True, D=True)
        for name, k in (
            ("random", 2), ("subset", 2), ("bidirectional", 2), ("cross", 4), ("column", 2), ("serpentine", 2),
            ("window", 2), ("atrous", 2), ("volume", 2),
        )
    },
}  # fmt: skip


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
    tell(name, [((f - w).abs().max() / w.abs().max()).item() for f, w in pairs])


def tell(name, errors):
    print(json.dumps([name, [1e9 if math.isnan(e) or math.isinf(e) else e for e in errors]]), flush=True)


def report_selective(name, case, dtype=torch.float32, sums=1):
    """Errors of outputs as they are; those of gradients, whose limit is 5e-6, as if it were that of outputs, 2e-6.

    In 16 bits the limit is one rounding of the largest value, and of y as many as there are `sums` over routes.
    """
    inputs = cast(make(case), dtype)
    wanted = evaluate_scan(cast(inputs, torch.float64), backend="reference")
    found = evaluate_scan(inputs, backend="triton")
    if name == "everything":
        repeated = evaluate_scan(inputs, backend="triton")
        assert all(torch.equal(repeated[key], x) for key, x in found.items())
    errors = {key: error(found[key], x) for key, x in wanted.items()}
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else None
    if rounding:
        errors = {key: 2e-6 * e / rounding if key != "last_state" else e for key, e in errors.items()}
        errors["y"] /= sums
    else:
        errors = {key: e if key in ("y", "last_state") else 0.4 * e for key, e in errors.items()}
    tell(f"selective_scan, {name}", list(errors.values()))


def report_other_launches():
    """What small calls do not do on NVIDIA: programs walk all routes, and warps have the 64 lanes of AMD's."""
    everything = Case(b=1, k=2, l=13, C="channel", rank=2, reset="random", routes="random", **EVERYTHING)
    cross = Case(b=1, k=4, d=3, n=2, l=12, routes="cross", softplus=True, D=True, layout="last")
    kernels._ENOUGH = 1
    report_selective("walking", everything)
    report_selective("walking a subset", replace(everything, routes="subset", C="shared"))
    report_selective("walking a subset in bfloat16", replace(cross, routes="subset"), torch.bfloat16, sums=4)
    report_selective("walking in bfloat16", cross, torch.bfloat16, sums=4)
    kernels.warp_size = lambda x: 64
    report_selective("walking on AMD", everything)
    report_selective("blocks of states on AMD", Case(b=1, d=67, n=17, l=9, B=1, reset=(4,), **EVERYTHING))


def report_golden():
    """What the official code wrote."""
    for case in META["kwargs"]:
        tensors = golden(case)
        inputs, options = arguments(case, tensors)
        y, last = selective_scan(**in_our_types(inputs), **options, backend="triton")
        torch.autograd.backward([y, last.real], [tensors["grad_out"], tensors["grad_last_state_real"]])
        grads = [0.4 * error(x.grad, tensors[f"grad.{name}"]) for name, x in inputs.items()]
        tell(f"golden selective_scan, {case}", [error(y, tensors["out_f64"]), *grads])


def report_golden_2d():
    for case in META_2D["kwargs"]:
        exact, given = golden_2d(case, torch.float64), golden_2d(case, torch.float32)
        inputs = [given[name].requires_grad_() for name in NAMES_2D]
        found = selective_scan_2d(*inputs, backend="triton")
        grads = torch.autograd.grad(found[0], inputs, given["grad_out"], materialize_grads=True)
        errors = [error(x, exact[name]) for x, name in zip(found, ("out", "h1", "h2"), strict=True)]
        errors += [0.4 * error(g, exact[f"grad.{name}"]) for g, name in zip(grads, NAMES_2D, strict=True)]
        tell(f"golden selective_scan_2d, {case}", errors)


def report_golden_linear():
    tensors = load_file(LINEAR / "io.safetensors")
    for case in META_LINEAR["kwargs"]:
        a, x, h0 = inputs = [tensors[f"{case}.{name}"].float().requires_grad_() for name in ("a", "x", "h0")]
        h, _ = linear_scan(a, x, h0, reset=tensors[f"{case}.resets"].bool(), backend="triton")
        grads = torch.autograd.grad(h, inputs, tensors[f"{case}.grad_out"].to(h.dtype))
        errors = [0.4 * error(g, tensors[f"{case}.grad_{n}"]) for g, n in zip(grads, ("a", "x", "h0"), strict=True)]
        tell(f"golden linear_scan, {case}", [error(h, tensors[f"{case}.out"]), *errors])


def report_golden_ssd():
    for case, options in META_SSD["kwargs"].items():
        tensors, inputs = golden_ssd(case)
        given = {"initial_state" if name == "initial_states" else name: x for name, x in inputs.items()}
        reset = resets_from_seq_idx(tensors["seq_idx"]) if "seq_idx" in tensors else None
        y, last = ssd_scan(**given, dt_softplus=options["softplus"], reset=reset, backend="triton")
        torch.autograd.backward([y, last], [tensors["grad_out"], tensors["grad_final_state"]])
        grads = [0.4 * error(x.grad, tensors[f"grad.{name}"]) for name, x in inputs.items()]
        tell(f"golden ssd_scan, {case}", [error(y, tensors["out"]), error(last, tensors["final_state"]), *grads])


def main():
    warnings.simplefilter("error", RuntimeWarning)  # an overflow, also of a number that is then not used
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
    for name, case in SELECTIVE.items():
        report_selective(name, case)
    report_selective("bfloat16", Case(l=9, softplus=True, D=True, layout="last"), torch.bfloat16)
    report_selective("float16", Case(l=9, softplus=True, D=True, layout="last"), torch.float16)
    report_golden()
    report_golden_2d()
    report_golden_linear()
    report_golden_ssd()
    report_other_launches()  # the last, since it changes how kernels are launched


if __name__ == "__main__":
    main()
