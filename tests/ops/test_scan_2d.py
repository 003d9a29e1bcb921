"""The two-dimensional recurrence: golden cases in float64, loops over places, and its special case."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scan_cases import BACKENDS, error

from ssmvision.ops import linear_scan, linear_scan_2d, selective_scan_2d

FOLDER = Path(__file__).parents[1] / "parity" / "ssm_2d_selective_scan"
META = json.loads((FOLDER / "meta.json").read_text())
NAMES = ("x", "dt1", "dt2", "A1", "A2", "A3", "A4", "B1", "B2", "C1", "C2")


def golden(case, dtype):
    tensors = {n.removeprefix(f"{case}."): t for n, t in load_file(FOLDER / "io.safetensors").items() if n[:5] == case}
    return {n: t.to(dtype) for n, t in tensors.items()}


def make(b=2, v=4, t=6, channels=(3,), n=2, dtype=torch.float64):
    torch.manual_seed(0)
    place, state = (b, v, t), (*channels, n)
    steps = [torch.rand(*place, *channels, dtype=dtype) for _ in range(2)]
    transitions = [sign * torch.rand(state, dtype=dtype) for sign in (-1, 0.5, 0.5, -1)]
    coefficients = [torch.randn(*place, n, dtype=dtype) for _ in range(4)]
    return [torch.randn(*place, *channels, dtype=dtype), *steps, *transitions, *coefficients]


def naive(a1, a2, a3, a4, x1, x2):
    """Place after place, as the equations say."""
    h1, h2 = {}, {}
    nothing = torch.zeros_like(x1[:, 0, 0])
    for v in range(x1.shape[1]):
        for t in range(x1.shape[2]):
            left, above = (v, t - 1), (v - 1, t)
            h1[v, t] = a1[:, v, t] * h1.get(left, nothing) + a2[:, v, t] * h2.get(left, nothing) + x1[:, v, t]
            h2[v, t] = a3[:, v, t] * h1.get(above, nothing) + a4[:, v, t] * h2.get(above, nothing) + x2[:, v, t]
    grid = [[(v, t) for t in range(x1.shape[2])] for v in range(x1.shape[1])]
    return tuple(torch.stack([torch.stack([h[p] for p in row], 1) for row in grid], 1) for h in (h1, h2))


@pytest.mark.parametrize("case", META["kwargs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_case(backend, case):
    exact = backend == "reference"
    tensors = golden(case, torch.float64 if exact else torch.float32)
    inputs = [tensors[n].requires_grad_() for n in NAMES]
    y, h1, h2 = selective_scan_2d(*inputs, backend=backend)
    grads = torch.autograd.grad(y, inputs, tensors["grad_out"], materialize_grads=True)
    for found, name in zip((y, h1, h2, *grads), ("out", "h1", "h2", *(f"grad.{n}" for n in NAMES)), strict=True):
        if exact:
            torch.testing.assert_close(found, tensors[name], **META["tolerance"])
        else:
            assert error(found, golden(case, torch.float64)[name]) < (5e-6 if name[:4] == "grad" else 2e-6), name


@pytest.mark.parametrize("case", META["kwargs"])
def test_golden_case_after_discretisation(case):
    tensors = golden(case, torch.float64)
    inputs = [tensors[f"Bbar{i}"] * tensors["x"].unsqueeze(-1) for i in (1, 2)]
    h1, h2 = linear_scan_2d(*(tensors[f"Abar{i}"] for i in (1, 2, 3, 4)), *inputs, backend="reference")
    torch.testing.assert_close(h1, tensors["h1"], **META["tolerance"])
    torch.testing.assert_close(h2, tensors["h2"], **META["tolerance"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 3, 1), (1, 1, 5, 2, 2), (2, 5, 4)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_loops(backend, shape, dtype):
    torch.manual_seed(0)
    decays, inputs = [0.5 * torch.randn(shape, dtype=dtype) for _ in range(4)], [torch.randn(shape, dtype=dtype)] * 2
    wanted = naive(*decays, *inputs)
    narrow = torch.complex64 if dtype.is_complex else torch.float32
    given = [t if backend == "reference" else t.to(narrow) for t in (*decays, *inputs)]
    for found, h in zip(linear_scan_2d(*given, backend=backend), wanted, strict=True):
        assert found.shape == shape
        assert found.dtype == given[0].dtype
        assert (found - h).abs().max() <= (1e-13 if backend == "reference" else 2e-6) * h.abs().max()


def test_channels_are_independent():
    x, dt1, dt2, *rest = make(channels=(3,))
    whole = selective_scan_2d(x, dt1, dt2, *rest, backend="reference")
    for i in range(3):
        A, coefficients = [a[i] for a in rest[:4]], rest[4:]
        one = selective_scan_2d(*(s[..., i] for s in (x, dt1, dt2)), *A, *coefficients, backend="reference")
        torch.testing.assert_close(one[0], whole[0][..., i])
        torch.testing.assert_close(one[1], whole[1][..., i, :])


def test_decoupled_is_a_scan_of_rows_and_one_of_columns():
    x, dt1, dt2, A1, A2, A3, A4, B1, B2, C1, C2 = make()
    _, h1, h2 = selective_scan_2d(x, dt1, dt2, A1, 0 * A2, 0 * A3, A4, B1, B2, C1, C2, backend="reference")
    for dt, A, B, found, time_axis in ((dt1, A1, B1, h1, 2), (dt2, A4, B2, h2, 1)):
        decay, drive = torch.exp(dt.unsqueeze(-1) * A), (dt * x).unsqueeze(-1) * B.unsqueeze(3)
        lines = [s.movedim(time_axis, 2).flatten(0, 1) for s in (decay, drive)]
        h = linear_scan(*lines, backend="reference")[0].unflatten(0, (2, -1)).movedim(2, time_axis)
        torch.testing.assert_close(found, h)


@pytest.mark.parametrize("coupled", [0, 1])
def test_decays_at_the_border_do_not_count(coupled):
    decays = [0.5 * torch.rand(1, 3, 4, 2) for _ in range(4)]
    x = torch.randn(1, 3, 4, 2)
    wanted = linear_scan_2d(*decays, x, x)
    decays[coupled][:, :, 0] = torch.inf
    decays[2 + coupled][:, 0] = torch.inf
    torch.testing.assert_close(linear_scan_2d(*decays, x, x), wanted, rtol=0, atol=0)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make(1, 2, 3, (), 2)]
    assert torch.autograd.gradcheck(lambda *t: selective_scan_2d(*t, backend="reference"), inputs)


def test_half_precision_and_compile():
    arguments = make(dtype=torch.float32)
    y, h1, h2 = selective_scan_2d(*arguments)
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan_2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), (y, h1, h2))
    half = selective_scan_2d(*(t.bfloat16() for t in arguments))
    assert [t.dtype for t in half] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(half[0].float(), y, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_named(name):
    arguments = dict(zip(NAMES, make(), strict=True))
    arguments[name] = torch.zeros(2, 2, 2, 2)
    # What does not fit x or A1 is told as the first other tensor that does not.
    told = {"x": "dt1", "A1": "A1"}.get(name, name)
    with pytest.raises(RuntimeError, match=rf"^selective_scan_2d: {told} has shape \(.*\), expected \([^\n]*\)$"):
        selective_scan_2d(**arguments)


def test_wrong_calls_of_the_core():
    h = torch.zeros(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match=r"linear_scan_2d: a3 has shape \(1, 2, 3, 1\), expected \(1, 2, 3, 4\)"):
        linear_scan_2d(h, h, h[..., :1], h, h, h)
    with pytest.raises(RuntimeError, match=r"linear_scan_2d: x1 has shape \(2, 3\), expected"):
        linear_scan_2d(h, h, h, h, h[0, ..., 0], h)
    with pytest.raises(RuntimeError, match=r"selective_scan_2d: x and A1 have shapes"):
        selective_scan_2d(*(torch.zeros(2, 3) for _ in NAMES))
