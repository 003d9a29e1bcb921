"""The operator as torch sees it: opcheck, compile, export, scripting, tracing, meta, checkpointing, double backward."""

import io
import sys

import pytest
import torch
from scan_cases import BACKENDS, EVERYTHING, Case, assert_matches, cast, evaluate, leaves, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssmvision.ops import selective_scan

OP = torch.ops.ssmvision
SIMPLE = Case(b=2, d=4, n=2, l=9, softplus=True)
FULL = Case(b=2, k=2, d=6, n=3, l=12, routes="bidirectional", B=2, layout="last", **EVERYTHING)
APART = Case(b=2, k=2, d=4, n=2, l=9, routes="subset", merge=False, u_per_route=True)
CASES = [SIMPLE, FULL, APART]
# What the user's call becomes below the composite: every tensor with its route dimension.
CANONICAL = [
    Case(b=2, k=1, d=4, n=2, l=9, B=1, C=2, u_per_route=True, softplus=True),
    Case(b=2, k=2, d=6, n=3, l=70, B=2, C=1, u_per_route=True, routes="bidirectional", **{**EVERYTHING, "z": False}),
    Case(b=2, k=2, d=4, n=2, l=9, B=1, C=1, u_per_route=True, routes="subset", merge=False, layout="last"),
]


def canonical(case, backend):
    arguments = cast(make(case), torch.float32)
    order = [
        "u",
        "delta",
        "A",
        "B",
        "C",
        "D",
        "delta_bias",
        "dt_proj",
        "initial_state",
        "reset",
        "routes",
        "delta_softplus",
        "merge",
    ]
    return (*(arguments[name] for name in order), backend)


def with_grad(arguments):
    return tuple(
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments
    )


@pytest.mark.parametrize("case", CANONICAL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_forward(backend, case):
    torch.library.opcheck(OP.selective_scan_forward.default, with_grad(canonical(case, backend)))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("case", CANONICAL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_backward(backend, case, last):
    arguments = canonical(case, backend)
    y, state, checkpoints = OP.selective_scan_forward(*arguments)
    given = (torch.randn_like(y), torch.randn_like(state) if last else None, checkpoints, *arguments)
    torch.library.opcheck(OP.selective_scan_backward.default, given)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_composite(backend, case):
    arguments = cast(make(case), torch.float32)
    inputs = {n: x.requires_grad_() if n in leaves(arguments) else x for n, x in arguments.items()}
    torch.library.opcheck(OP.selective_scan.default, (), {**inputs, "backend": backend})


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compile(case, mode, dynamic):
    torch._dynamo.reset()
    arguments = cast(make(case), torch.float32)
    compiled = torch.compile(selective_scan, fullgraph=True, backend=mode, dynamic=dynamic)
    assert_matches(evaluate(arguments, scan=compiled), evaluate(arguments))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler")
def test_compile_with_inductor():
    torch._dynamo.reset()
    arguments = cast(make(FULL), torch.float32)
    compiled = torch.compile(selective_scan, fullgraph=True)
    assert_matches(evaluate(arguments, scan=compiled), evaluate(arguments))


class Scan(nn.Module):
    """A module around the public function, as models use it; every projection is part of the graph."""

    def __init__(self, channels: int = 4, states: int = 2):
        super().__init__()
        self.states = states
        self.project = nn.Linear(channels, channels + 2 * states)
        self.A_log = nn.Parameter(torch.zeros(2, channels, states))
        self.D = nn.Parameter(torch.ones(2, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta, b, c = self.project(x).transpose(1, 2).split([x.shape[-1], self.states, self.states], dim=1)
        delta, b, c = (m.unsqueeze(1).expand(-1, 2, -1, -1) for m in (delta, b, c))
        steps = torch.arange(x.shape[1], device=x.device)
        routes = torch.stack([steps, steps.flip(0)])
        y, _ = selective_scan(
            x.transpose(1, 2), delta, -torch.exp(self.A_log), b, c, D=self.D, delta_softplus=True, routes=routes
        )
        return y.transpose(1, 2)


class ScriptableScan(nn.Module):
    """TorchScript and FX want no generator expressions and no sizes read from a proxy."""

    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.randn(4, 2))
        self.D = nn.Parameter(torch.randn(4))

    def forward(self, u: torch.Tensor, delta: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        y, last = selective_scan(u, delta, -torch.exp(self.A_log), b, c, D=self.D, z=u, delta_softplus=True)
        return y + last.sum()


def scriptable_inputs(l=9):
    torch.manual_seed(0)
    return torch.randn(2, 4, l), torch.randn(2, 4, l), torch.randn(2, 2, l), torch.randn(2, 2, l)


def test_export_with_dynamic_batch_and_length():
    torch.manual_seed(0)
    module = Scan().eval()
    sizes = {"x": {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2)}}
    program = torch.export.export(module, (torch.randn(2, 10, 4),), dynamic_shapes=sizes)
    for shape in [(2, 10, 4), (1, 7, 4), (3, 130, 4)]:
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), module(x))


def test_exported_program_survives_a_file(tmp_path):
    module = Scan().eval()
    x = torch.randn(2, 10, 4)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "scan.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "scan.pt2").module()(x), module(x))


def test_torchscript_saves_loads_and_runs():
    module = ScriptableScan()
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for l in (9, 70):
        torch.testing.assert_close(loaded(*scriptable_inputs(l)), module(*scriptable_inputs(l)))


def test_torchscript_gradients():
    module = ScriptableScan()
    scripted = torch.jit.script(module)
    for f in (scripted, module):
        f(*scriptable_inputs()).square().sum().backward()
    once = module.A_log.grad.clone()  # the scripted module shares its parameters: each has the sum of two runs
    module.zero_grad()
    module(*scriptable_inputs()).square().sum().backward()
    torch.testing.assert_close(once, 2 * module.A_log.grad)


def test_fx_trace_then_script():
    module = ScriptableScan()
    traced = torch.fx.symbolic_trace(module)
    assert any("selective_scan" in str(node.target) for node in traced.graph.nodes)
    for f in (traced, torch.jit.script(traced)):
        torch.testing.assert_close(f(*scriptable_inputs(20)), module(*scriptable_inputs(20)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_meta_device_gives_shapes_and_layouts(case):
    real = cast(make(case), torch.float32)
    meta = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in real.items()}
    for found, wanted in zip(selective_scan(**meta), selective_scan(**real), strict=True):
        assert found.device.type == "meta"
        assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())
    inputs = {n: x.requires_grad_() for n, x in leaves(meta).items()}
    y, last = selective_scan(**{**meta, **inputs})
    (y.sum() + last.sum()).backward()
    assert all(x.grad.shape == x.shape for x in inputs.values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend, reentrant):
    arguments = cast(make(FULL), torch.float32)

    def checkpointed(**kwargs):
        names = list(kwargs)
        call = lambda *values: selective_scan(**dict(zip(names, values, strict=True)), backend=backend)  # noqa: E731
        return checkpoint(call, *kwargs.values(), use_reentrant=reentrant)

    if reentrant:  # which takes no torch.autograd.grad
        results = []
        for scan in (checkpointed, selective_scan):
            inputs = {n: x.detach().requires_grad_() for n, x in leaves(arguments).items()}
            y, _ = scan(**{**arguments, **inputs})
            y.sum().backward()
            results.append({n: x.grad for n, x in inputs.items()} | {"y": y})
        assert_matches(*({n: x for n, x in r.items() if n != "initial_state"} for r in results))
    else:
        assert_matches(evaluate(arguments, scan=checkpointed), evaluate(arguments, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_gradients_asked_for(backend):
    arguments = cast(make(FULL), torch.float32)
    wanted = evaluate(arguments, backend=backend)
    for name in leaves(arguments):
        x = arguments[name].detach().requires_grad_()
        y, last = selective_scan(**{**arguments, name: x}, backend=backend)
        (dx,) = torch.autograd.grad(y.sum() + last.sum(), x)
        assert dx.shape == wanted[f"d{name}"].shape


@pytest.mark.parametrize("part", ["y", "last_state"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_one_output_alone(backend, part):
    arguments = make(Case(l=70, softplus=True, D=True))

    def gradient(arguments, backend):
        u = arguments["u"].detach().requires_grad_()
        y, last = selective_scan(**{**arguments, "u": u}, backend=backend)
        return torch.autograd.grad((y if part == "y" else last).square().sum(), u)[0]

    wanted = gradient(arguments, "reference")
    found = gradient(cast(arguments, torch.float32), backend)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


GRADCHECK = [
    Case(b=1, d=2, n=2, l=4),
    Case(b=1, d=2, n=1, l=4, **EVERYTHING),
    Case(b=1, k=2, d=2, n=1, l=4, routes="random", B=2, C="channel", softplus=True, u_per_route=True),
    Case(b=1, k=2, d=2, n=1, l=4, routes="subset", merge=False, D=True),
]


def scan_of_leaves(arguments, backend):
    names = list(leaves(arguments))
    values = tuple(arguments[n].detach().requires_grad_() for n in names)
    return lambda *x: selective_scan(**{**arguments, **dict(zip(names, x, strict=True))}, backend=backend), values


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradcheck(case):
    assert torch.autograd.gradcheck(*scan_of_leaves(make(case), "reference"))


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradgradcheck(case):
    assert torch.autograd.gradgradcheck(*scan_of_leaves(make(case), "reference"))


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_in_float32(backend, case):
    def second(arguments, backend):
        scan, values = scan_of_leaves(arguments, backend)
        y, last = scan(*values)
        first = torch.autograd.grad(y.square().sum() + last.square().sum(), values, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), values)
        return {f"d{i}": g for i, g in enumerate(second)}

    wanted = second(make(case), "reference")
    assert_matches(second(cast(make(case), torch.float32), backend), wanted, gradient=2e-5)
