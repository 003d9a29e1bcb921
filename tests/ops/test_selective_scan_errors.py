"""What a wrong call is told."""

import re
import subprocess
import sys

import pytest
import torch
from scan_cases import BACKENDS, EVERYTHING, Case, cast, make

from ssmvision.ops import selective_scan

PLAIN = Case(b=2, d=6, n=3, l=8, **EVERYTHING)
ROUTED = Case(b=2, k=2, d=6, n=3, l=8, routes="bidirectional", **EVERYTHING)


def wrong(case, **changes):
    return {**cast(make(case), torch.float32), **changes}


SHAPES = [
    ("u", (2, 5, 8)),
    ("delta", (2, 6, 8)),
    ("delta", (2, 2, 9)),
    ("B", (2, 4, 8)),
    ("B", (2, 3, 7)),
    ("C", (1, 3, 8)),
    ("D", (5,)),
    ("z", (2, 6, 7)),
    ("delta_bias", (7,)),
    ("dt_proj", (5, 2)),
    ("initial_state", (2, 6, 4)),
]


@pytest.mark.parametrize(("name", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_shape_names_the_tensor_and_both_shapes(backend, name, shape):
    bad = torch.zeros(shape)
    # The route dimension that one scan does not have may show; what the caller passed must be in there.
    given = r",.*".join(map(str, shape))
    with pytest.raises(RuntimeError, match=rf"\b{name}\b has shape .*{given}.* expected ") as caught:
        selective_scan(**wrong(PLAIN, **{name: bad}), backend=backend)
    assert "selective_scan" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("u", torch.zeros(2, 3, 6, 8)),
        ("delta", torch.zeros(2, 1, 2, 8)),
        ("routes", torch.zeros(3, 8, dtype=torch.int64)),
        ("reset", torch.zeros(2, 3, 8, dtype=torch.bool)),
        ("reset", torch.zeros(2, 7, dtype=torch.bool)),
        ("initial_state", torch.zeros(2, 6, 3)),
        ("D", torch.zeros(6)),
    ],
    ids=lambda x: x if isinstance(x, str) else str(tuple(x.shape)),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_shape_of_a_routed_call(backend, name, bad):
    with pytest.raises(RuntimeError, match=rf"selective_scan: {name} has shape"):
        selective_scan(**wrong(ROUTED, **{name: bad}), backend=backend)


@pytest.mark.parametrize("name", ["B", "C"])
def test_groups_must_divide_the_channels(name):
    with pytest.raises(RuntimeError, match=r"groups .*must divide"):
        selective_scan(**wrong(PLAIN, **{name: torch.zeros(2, 4, 3, 8)}))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.uint8])
def test_routes_are_int64(dtype):
    arguments = wrong(ROUTED)
    with pytest.raises(RuntimeError, match="routes must be int64, not"):
        selective_scan(**{**arguments, "routes": arguments["routes"].to(dtype)})


def test_reset_is_bool():
    arguments = wrong(ROUTED)
    with pytest.raises(RuntimeError, match="reset must be bool, not"):
        selective_scan(**{**arguments, "reset": arguments["reset"].to(torch.uint8)})


def test_a_gate_needs_merged_routes():
    with pytest.raises(RuntimeError, match="z needs merge=True"):
        selective_scan(**wrong(ROUTED, merge=False))


def test_unknown_backend_is_told_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown backend 'cuda': choose one of auto, cpu, triton, reference"):
        selective_scan(**wrong(PLAIN), backend="cuda")


@pytest.mark.parametrize("arguments", [make(PLAIN), wrong(PLAIN)], ids=["float64", "float32"])
def test_triton_on_cpu_tensors(arguments):
    with pytest.raises(ValueError, match="backend 'triton' cannot run tensors on cpu"):
        selective_scan(**arguments, backend="triton")


def test_float64_on_a_float32_backend():
    with pytest.raises(ValueError, match="computes in float32; use backend='reference' for float64"):
        selective_scan(**make(PLAIN), backend="cpu")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_tokens_are_floating_point(dtype):
    arguments = wrong(PLAIN)
    with pytest.raises((RuntimeError, TypeError, ValueError), match="float"):
        selective_scan(**{**arguments, "u": arguments["u"].to(dtype)})


# In a process of its own: a kernel that follows such a route reads and writes beyond its tensors.
OUT_OF_RANGE = """
import torch
from ssmvision.ops import selective_scan
for token in (64, -1, 1 << 40):
    routes = torch.arange(64)[None].clone()
    routes[0, 5] = token
    u, b = torch.zeros(1, 4, 64, requires_grad=True), torch.zeros(1, 1, 2, 64)
    try:
        y, _ = selective_scan(u, u[:, None], -torch.ones(1, 4, 2), b, b, routes=routes, backend="cpu")
        y.sum().backward()
    except (RuntimeError, IndexError, ValueError) as error:
        print("refused:", error)
"""


def test_routes_out_of_range_are_refused_by_the_kernel():
    done = subprocess.run([sys.executable, "-c", OUT_OF_RANGE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-500:]}"
    assert len(re.findall(r"refused: .*(?:range|bounds|routes)", done.stdout)) == 3, done.stdout


@pytest.mark.parametrize("token", [64, -1, 1 << 40])
def test_routes_out_of_range_are_refused_by_the_reference(token):
    routes = torch.arange(8).repeat(2, 1)
    routes[0, 5] = token
    with pytest.raises((RuntimeError, IndexError, ValueError), match=r"out of bounds|range"):
        selective_scan(**wrong(ROUTED, routes=routes), backend="reference")
