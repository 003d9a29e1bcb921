"""The selective scan with a complex state matrix, against one with real matrices of twice the states."""

import pytest
import torch
from scan_cases import BACKENDS, EVERYTHING, Case, assert_matches, cast, evaluate, make

from ssmvision.ops import selective_scan

CASES = [
    Case(l=9, softplus=True),
    Case(l=20, d=6, B=2, C=3, **EVERYTHING),
    Case(l=9, B="channel", C="channel", bias=True),
    Case(k=2, l=18, d=6, routes="random", B=2, u_per_route=True, **EVERYTHING),
    Case(k=4, l=18, routes="subset", merge=False, D=True, initial=True),
]


def split(arguments):
    """Arguments whose complex tensors come as real and imaginary parts: what `evaluate` can differentiate."""
    torch.manual_seed(1)
    names = [n for n in ("A", "B", "C", "initial_state") if arguments[n] is not None]
    return {**arguments, **{f"{n}_im": torch.randn_like(arguments[n]) for n in names}}


def scan(backend, **arguments):
    """The composition under test; the last state as pairs."""
    imaginary = {n: arguments.pop(n) for n in list(arguments) if n.endswith("_im")}
    for name, part in imaginary.items():
        arguments[name[:-3]] = torch.complex(arguments[name[:-3]], part)
    y, last = selective_scan(**arguments, backend=backend)
    return y, torch.view_as_real(last)


def naive(
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, dt_proj, initial_state, reset, routes, merge, **imaginary
):
    """One token after the other, with explicit real and imaginary parts."""
    k, d, n = A.shape if A.dim() == 3 else (1, *A.shape)
    b, l = u.shape[0], u.shape[-1]
    routed = A.dim() == 3

    def per_route(x, dims):  # (b, k, ...) from any form
        return x if x.dim() == dims else x.unsqueeze(1).expand(-1, k, *x.shape[1:])

    def coefficients(x):  # (b, k, d, n, l)
        if x.dim() == A.dim():
            return x.view(1, k, d, n, 1).expand(b, -1, -1, -1, l)
        x = x if routed else x.unsqueeze(1)
        x = x.unsqueeze(2) if x.dim() == 4 else x
        return x.repeat_interleave(d // x.shape[2], 2)

    def step_sizes():
        x = delta if routed else delta.unsqueeze(1)
        if dt_proj is not None:
            x = torch.einsum("bkrl,kdr->bkdl", x, dt_proj.view(k, d, -1))
        if delta_bias is not None:
            x = x + delta_bias.view(k, d, 1)
        return torch.nn.functional.softplus(x) if delta_softplus else x

    step, u_k = step_sizes(), per_route(u, 4)
    (B, B_im), (C, C_im) = ((coefficients(x), coefficients(imaginary[f"{n}_im"])) for x, n in ((B, "B"), (C, "C")))
    A, A_im = A.view(k, d, n), imaginary["A_im"].view(k, d, n)
    start = [torch.zeros(b, k, d, n, dtype=u.dtype)] * 2
    if initial_state is not None:
        start = [x.view(b, k, d, n) for x in (initial_state, imaginary["initial_state_im"])]
    outputs, states = [], []
    for ik in range(k):
        re, im = (x[:, ik] for x in start)
        y = {}
        for token in range(l) if routes is None else routes[ik].tolist():
            if reset is not None:
                keep = (~(reset if reset.dim() == 2 else reset[:, ik])[:, token]).double()[:, None, None]
                re, im = re * keep, im * keep
            dt, x = step[:, ik, :, token, None], u_k[:, ik, :, token, None]
            size, angle = torch.exp(dt * A[ik]), dt * A_im[ik]
            a, a_im = size * torch.cos(angle), size * torch.sin(angle)
            re, im = a * re - a_im * im, a * im + a_im * re
            re, im = re + dt * x * B[:, ik, ..., token], im + dt * x * B_im[:, ik, ..., token]
            y[token] = 2 * (C[:, ik, ..., token] * re - C_im[:, ik, ..., token] * im).sum(-1)
            if D is not None:
                y[token] = y[token] + D.view(k, d)[ik] * x[..., 0]
        outputs.append(torch.stack([y.get(t, torch.zeros(b, d, dtype=u.dtype)) for t in range(l)], -1))
        states.append(torch.stack([re, im], -1))
    y, last = torch.stack(outputs, 1), torch.stack(states, 1)
    y = y.sum(1) if merge or not routed else y
    return (y if z is None else y * torch.nn.functional.silu(z)), last if routed else last[:, 0]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_real_arithmetic(backend, case):
    arguments = split(make(case))
    wanted = evaluate(arguments, scan=naive)
    if backend == "reference":
        assert_matches(evaluate(arguments, scan=scan, backend=backend), wanted, output=1e-13, gradient=1e-12)
    assert_matches(evaluate(cast(arguments, torch.float32), scan=scan, backend=backend), wanted)


def test_real_coefficients_and_half_precision():
    arguments = cast(make(Case(l=9, softplus=True, initial=True, D=True, z=True)), torch.float32)
    arguments["A"] = arguments["A"] + 1j
    widened = {n: x + 0j if n in ("B", "C", "initial_state") else x for n, x in arguments.items()}
    wanted = selective_scan(**widened)
    torch.testing.assert_close(selective_scan(**arguments), wanted)
    half = {n: x.bfloat16() if n in ("u", "delta", "B", "C", "z") else x for n, x in arguments.items()}
    y, last = selective_scan(**half)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.complex64)
    torch.testing.assert_close(y.float(), wanted[0], rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = selective_scan(**arguments)
    torch.testing.assert_close(inside, selective_scan(**arguments), rtol=0, atol=0)


def test_compile():
    torch._dynamo.reset()
    arguments = cast(make(Case(l=9, softplus=True)), torch.float32)
    arguments["A"] = arguments["A"] + 1j
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**arguments), selective_scan(**arguments))


@pytest.mark.parametrize("name", ["u", "delta", "D", "z"])
def test_what_stays_real(name):
    arguments = cast(make(Case(l=9, D=True, z=True)), torch.float32)
    with pytest.raises(RuntimeError, match=f"selective_scan: {name} must be real floating point, not torch.complex64"):
        selective_scan(**{**arguments, "A": arguments["A"] + 1j, name: arguments[name] + 1j})
