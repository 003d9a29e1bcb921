"""Extreme inputs, low precision and repeatability."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from scan_cases import BACKENDS, EVERYTHING, Case, assert_matches, cast, error, evaluate, make

from ssmvision.ops import selective_scan

MIXED = Case(d=20, l=70, B=2, softplus=True, D=True, initial=True, layout="last")


def assert_finite(result):
    assert not [name for name, x in result.items() if not x.isfinite().all()]


def extreme(delta, A, softplus, length=70, x=1.0):
    """A scan with one step size and one state matrix everywhere; row i of A is A[i]."""
    arguments = make(Case(d=len(A), n=2, l=length, softplus=softplus))
    arguments["delta"] = torch.full_like(arguments["delta"], delta)
    arguments["A"] = torch.tensor(A, dtype=torch.float64)[:, None].repeat(1, 2)
    arguments["u"] = x * arguments["u"]
    return arguments


@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize(
    "values",
    [
        {"delta": 200.0, "softplus": True},
        {"delta": -200.0, "softplus": True},
        {"delta": 200.0, "softplus": False},
        {"delta": 1e4, "softplus": False},
        {"delta": 0.0, "softplus": False},
        {"delta": 1e-4, "softplus": False},
        {"delta": 10.0, "softplus": False},
        {"delta": 1.0, "softplus": True, "x": 1e4},
        {"delta": 10.0, "softplus": False, "x": 1e4},
        {"delta": 1e-30, "softplus": False, "x": 1e-10},
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes_stay_finite_and_right(backend, values, length):
    arguments = extreme(A=[-64.0, -16.0, -1.0, -1e-4, -0.0], length=length, **values)
    wanted = evaluate(arguments, backend="reference")
    assert_finite(wanted)
    found = evaluate(cast(arguments, torch.float32), backend=backend)
    assert_finite(found)
    assert_matches(found, wanted, gradient=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_steep_channel_among_many(backend):
    arguments = extreme(delta=10.0, A=[*[-1.0] * 39, -64.0], softplus=False)
    assert_matches(evaluate(cast(arguments, torch.float32), backend=backend), evaluate(arguments, backend="reference"))


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_decay_is_of_no_consequence_however_large(backend, length):
    """exp(delta A) overflows, but there is no state to multiply it with: at the start, and after a reset."""
    arguments = extreme(delta=-200.0, A=[-64.0, -1.0], softplus=False, length=length)
    arguments["reset"] = torch.ones(2, length, dtype=torch.bool)
    found = evaluate(cast(arguments, torch.float32), backend=backend)
    assert_finite(found)
    quiet = evaluate({**arguments, "A": 0 * arguments["A"]}, backend="reference")
    assert error(found["y"], quiet["y"]) < 2e-6


@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_nan_stays_where_it_belongs(backend, layout, name):
    arguments = make(Case(b=2, d=20, l=70, B=20, C=20, z=True, D=True, softplus=True, layout=layout))
    clean, _ = selective_scan(**cast(arguments, torch.float32), backend=backend)
    arguments[name][(1, 3, *[0] * (arguments[name].dim() - 3), 40)] = torch.nan
    y, last = selective_scan(**cast(arguments, torch.float32), backend=backend)
    remembered = name not in ("C", "z")
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[1, 3, 40 : None if remembered else 41] = True
    assert torch.equal(y.isnan(), reached)
    assert torch.equal(y[~reached], clean[~reached])
    assert last.isnan().sum() == (3 if name in ("u", "delta") else 1 if name == "B" else 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_memory(backend):
    arguments = extreme(delta=1.0, A=[-1e-4, -3e-4, -0.0], softplus=False, length=20_000)
    with torch.no_grad():
        y, _ = selective_scan(**arguments, backend="reference")
        found, _ = selective_scan(**cast(arguments, torch.float32), backend=backend)
    # A float32 decay is off by up to 3e-8, ten thousand times over; a decay of one is exact and must not drift at all.
    assert error(found[:, :2], y[:, :2]) < 4e-4
    assert error(found[:, 2], y[:, 2]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_rounds_only_what_goes_in_and_out(backend, dtype):
    arguments = cast(make(replace(MIXED, z=True)), dtype)
    wanted = evaluate(cast(arguments, torch.float64), backend="reference")
    found = evaluate(arguments, backend=backend)
    assert found["y"].dtype == found["du"].dtype == dtype
    assert found["last_state"].dtype == torch.float32
    rounding = torch.finfo(dtype).eps
    assert error(found["last_state"], wanted["last_state"]) < 2e-6
    assert all(error(found[name], x) < rounding for name, x in wanted.items())


BACKWARD_UNDER_AUTOCAST = """
import torch
from ssmvision.ops import selective_scan
u, b, delta = torch.randn(2, 20, 70, requires_grad=True), torch.randn(2, 3, 70), torch.randn(2, 3, 70)
with torch.autocast("cpu"):
    y, _ = selective_scan(u, delta, -torch.rand(20, 3), b, b, dt_proj=torch.randn(20, 3), backend="cpu")
    y.sum().backward()
assert u.grad.isfinite().all()
"""


@pytest.fixture(scope="module")
def autocast_is_survived():
    """Products under autocast are bfloat16; a kernel that took them for float32 would take this process down."""
    done = subprocess.run([sys.executable, "-c", BACKWARD_UNDER_AUTOCAST], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-500:]}"


@pytest.mark.usefixtures("autocast_is_survived")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing_but_the_callers_products(backend, dtype):
    arguments = cast(make(replace(MIXED, rank=3, z=True)), torch.float32)
    for name in ("delta", "B", "z"):  # what a projection under autocast hands over
        arguments[name] = arguments[name].to(dtype)
    outside = evaluate(arguments, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        inside = evaluate(arguments, backend=backend)
    assert outside["y"].dtype == inside["y"].dtype == inside["last_state"].dtype == torch.float32
    assert all(torch.equal(inside[name], x) for name, x in outside.items())


@pytest.mark.usefixtures("autocast_is_survived")
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_under_autocast(backend):
    arguments = cast(make(replace(MIXED, b=1, l=5, rank=2)), torch.float32)

    def penalty():
        u = arguments["u"].detach().requires_grad_()
        y, _ = selective_scan(**{**arguments, "u": u}, backend=backend)
        (du,) = torch.autograd.grad((y**3).sum(), u, create_graph=True)
        return torch.autograd.grad((du**2).sum(), u)[0]

    outside = penalty()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = penalty()
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_of_results(backend):
    y, last = selective_scan(**cast(make(Case()), torch.float32), backend=backend)
    assert y.dtype == last.dtype == torch.float32
    y, last = selective_scan(**make(Case()), backend="reference")
    assert y.dtype == last.dtype == torch.float64


@pytest.mark.parametrize("case", [MIXED, Case(k=4, d=40, n=8, l=1200, routes="cross", **EVERYTHING)], ids=str)
def test_repeats_agree_to_the_last_bit(case, threads):
    arguments = cast(make(case), torch.float32)
    first = evaluate(arguments, backend="cpu")
    for _ in range(3):
        again = evaluate(arguments, backend="cpu")
        assert all(torch.equal(again[name], x) for name, x in first.items())
