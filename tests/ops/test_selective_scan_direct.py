"""The way past torch's dispatcher: taken where only autograd looks on, and equal to the layers it leaves out."""

import inspect

import pytest
import torch
from scan_cases import EVERYTHING, Case, cast, evaluate, make, random_case
from torch._subclasses.fake_tensor import FakeTensorMode

from ssmvision.ops import selective_scan
from ssmvision.ops.cpu import selective_scan as backend

SIMPLE = Case(l=70, softplus=True, D=True)
FULL = Case(b=2, k=2, d=6, n=3, l=12, routes="bidirectional", B=2, **EVERYTHING)


def in_layers(**arguments):
    """The same scan through the registered operators."""
    names = [name for name in inspect.signature(selective_scan).parameters if name != "backend"]
    return torch.ops.ssmvision.selective_scan(*(arguments[name] for name in names), "cpu")


@pytest.fixture
def taken(monkeypatch):
    """What the direct way returned, call by call."""
    calls, direct = [], backend.direct
    monkeypatch.setattr(backend, "direct", lambda *args: calls.append(direct(*args)) or calls[-1])
    return calls


@pytest.mark.parametrize("case", [SIMPLE, FULL, *map(random_case, range(40))], ids=str)
def test_direct_equals_layers_to_the_last_bit(case, taken):
    arguments = cast(make(case), torch.float32)
    with torch.no_grad():
        found, wanted = selective_scan(**arguments), in_layers(**arguments)
    assert len(taken) == 1
    assert taken[0][0] is not None
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y)
        assert (x.stride(), x.dtype) == (y.stride(), y.dtype)
    trained, in_turn = evaluate(arguments), evaluate(arguments, scan=in_layers)
    assert len(taken) == 2
    assert all(torch.equal(trained[name], x) for name, x in in_turn.items())


def test_nothing_is_saved_for_a_gradient_that_no_one_wants(taken):
    arguments = cast(make(SIMPLE), torch.float32)
    selective_scan(**arguments)
    assert taken[0][2] is None
    y, _ = selective_scan(**{**arguments, "u": arguments["u"].requires_grad_()})
    assert taken[1][2].shape == (2, 1, 2, 3, 5)
    assert y.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_go_through_the_layers(dtype):
    arguments = cast(make(SIMPLE), dtype)
    y, last = selective_scan(**arguments, backend="reference" if dtype == torch.float64 else "cpu")
    assert (y.dtype, last.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)


def test_empty_tensors_go_through_the_layers(taken):
    arguments = cast(make(SIMPLE), torch.float32)
    tokens = {name: arguments[name][:0] for name in ("u", "delta", "B", "C")}
    y, last = selective_scan(**{**arguments, **tokens})
    assert (y.shape, last.shape) == ((0, 5, 70), (0, 5, 3))
    assert taken[0] == (None, None, None)


def under_fake_tensors(scan, u, *rest):
    with FakeTensorMode() as mode:
        return scan(mode.from_tensor(u), *(mode.from_tensor(x) for x in rest)).shape


def under_a_subclass(scan, u, *rest):
    class Named(torch.Tensor):
        pass

    return scan(u.as_subclass(Named), *rest).as_subclass(torch.Tensor)


WATCHERS = {
    "fake tensors": under_fake_tensors,
    "subclass": under_a_subclass,
    "trace": lambda scan, *x: torch.jit.trace(scan, x, check_trace=False)(*x),
    "compile": lambda scan, *x: torch.compile(scan, backend="eager", fullgraph=True)(*x),
    "vmap": lambda scan, u, *rest: torch.vmap(lambda x: scan(x, *rest))(u[None])[0],
    "functionalize": lambda scan, *x: torch.func.functionalize(scan)(*x),
    "mode": lambda scan, *x: under_mode(scan, *x),
}


def under_mode(scan, *x):
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        return scan(*x)


@pytest.mark.parametrize("watcher", WATCHERS)
@torch.no_grad()
def test_who_looks_into_a_call_sees_the_operators(watcher, taken):
    torch._dynamo.reset()
    u, b = torch.randn(2, 4, 9), torch.randn(2, 3, 9)
    A = -torch.ones(4, 3)

    def scan(u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, backend="cpu")[0]

    found = WATCHERS[watcher](scan, u, u, A, b, b)
    assert not taken
    wanted = scan(u, u, A, b, b)
    assert len(taken) == 1
    assert torch.equal(found, wanted) if isinstance(found, torch.Tensor) else found == wanted.shape
