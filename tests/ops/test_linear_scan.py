"""The linear recurrence, real and complex, against plain loops in float64."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scan_cases import BACKENDS, error, lay_out
from torch import nn

from ssmvision.ops import linear_scan, linear_scan_step

FOLDER = Path(__file__).parents[1] / "parity" / "ssm_linear_scan_resets"
META = json.loads((FOLDER / "meta.json").read_text())
OP = torch.ops.ssmvision


@dataclass(frozen=True)
class Case:
    """One call: the shapes of x and a, which of them are complex, and everything optional or nothing."""

    x: tuple
    a: tuple
    kinds: str = "rr"  # of a and x: r real, c complex
    full: bool = False
    reverse: bool = False
    reset: float = 0.2
    layout: str = "first"

    def __str__(self):
        flags = "".join(f" {n}" for n in ("full", "reverse") if getattr(self, n))
        return f"x={self.x} a={self.a} {self.kinds}{flags} {self.layout}".replace(", ", ",")


SHAPES = [
    ((2, 9, 6), (6,)),  # S5
    ((2, 9, 6), (2, 9, 6)),
    ((2, 9, 5), (1, 9, 5)),
    ((2, 9, 5), (2, 1, 5)),
    ((2, 9), ()),
    ((2, 9, 3, 5), (5,)),
    ((2, 9, 5), (9, 1)),
    ((2, 9, 3, 5), (1,) * 4),
    ((2, 7, 3, 4, 5), (3, 1, 1)),  # ConvS5
    ((2, 7, 3, 4, 5), (2, 7, 3, 1, 1)),
    ((2, 7, 3, 4), (1, 7, 1, 4)),
    ((1, 5, 7, 35), (7, 1)),
    ((1, 5, 7, 35), (1, 5, 7, 1)),
    ((3, 1, 4), (3, 1, 4)),
]
# Rows of more than one block of the native kernel, whose blocks begin within states that share a decay.
LONG = [
    ((1, 3, 5, 3301), (5, 1)),
    ((1, 3, 5, 3301), (1, 3, 5, 1)),
    ((1, 3, 16505), (16505,)),
    ((1, 3, 16505), (1, 3, 16505)),
]
CASES = [
    *(Case(*s, kinds, full=full) for s in SHAPES for kinds in ("rr", "rc", "cr", "cc") for full in (False, True)),
    *(Case(*s, kinds, full=True, reverse=True) for s in SHAPES for kinds in ("rr", "cc")),
    *(Case(*s, "cc", reverse=True) for s in SHAPES),
    *(Case(*s, kinds, full=True) for s in LONG for kinds in ("rr", "cc")),
    *(Case((2, 9, 6), (2, 9, 6), kinds, full=True, reset=1.0) for kinds in ("rr", "cc")),
    *(Case(x, a, kinds, full=True, layout=layout)
      for x, a in (SHAPES[1], SHAPES[6]) for kinds in ("rr", "rc", "cc") for layout in ("last", "strided")),
]  # fmt: skip
FULL_CASES = [
    Case(*s, kinds, full=True, reverse=reverse)
    for (s, kinds), reverse in zip(
        itertools.product((((2, 3, 2), (2,)), ((1, 3, 2, 2), (1, 3, 2, 1))), ("rr", "cc", "rc")),
        itertools.cycle((False, True)),
    )
]


def numbers(shape, kind):
    """Values that float32 holds exactly."""
    parts = torch.randn(*shape, 2).double()
    return torch.view_as_complex(parts) if kind == "c" else parts[..., 0].contiguous()


def make(case, seed=0):
    """Arguments by name, in float64."""
    torch.manual_seed(seed)
    a = numbers(case.a, case.kinds[0])
    a = a / a.abs() * torch.rand(case.a).clamp(min=0.1)  # |a| < 1
    x = numbers(case.x, case.kinds[1])
    arguments = {"a": a, "x": x, "initial_state": None, "reset": None, "reverse": case.reverse}
    if case.full:
        arguments["initial_state"] = numbers((case.x[0], *case.x[2:]), case.kinds[1])
        arguments["reset"] = torch.rand(case.x[:2]) < case.reset
    if case.layout != "first":
        arguments |= {n: spread(t, case.layout) for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    return arguments


def spread(t, layout):
    if not t.is_complex():
        return lay_out(t, layout)
    return torch.complex(lay_out(t.real, layout), lay_out(t.imag, layout)) if layout == "last" else _conjugate_twice(t)


def _conjugate_twice(t):
    """A lazily conjugated tensor: kernels that look at memory alone would miss it."""
    return t.conj().resolve_conj().conj()


def cast(arguments, dtype):
    def one(t):
        if not isinstance(t, torch.Tensor) or t.dtype == torch.bool:
            return t
        return t.to(dtype.to_complex() if t.is_complex() else dtype)

    return {n: one(t) for n, t in arguments.items()}


def naive(a, x, initial_state=None, reset=None, reverse=False):
    """One state of one sample after the other."""
    b, length = x.shape[:2]
    a = a.expand(x.shape)
    samples = []
    for ib in range(b):
        h, states = None if initial_state is None else initial_state[ib], {}
        for t in reversed(range(length)) if reverse else range(length):
            cut = h is None or (reset is not None and reset[ib, t])
            h = x[ib, t] + (0 if cut else h) * a[ib, t]
            states[t] = h
        samples.append((torch.stack([states[t] for t in range(length)]), h))
    return tuple(torch.stack(found) for found in zip(*samples, strict=True))


def leaves(arguments):
    return {n: t for n, t in arguments.items() if isinstance(t, torch.Tensor) and t.dtype != torch.bool}


def evaluate(arguments, scan=linear_scan, **options):
    """Outputs and all gradients of a fixed random loss, complex numbers as pairs, by name."""
    inputs = {n: t.detach().requires_grad_() for n, t in leaves(arguments).items()}
    outputs = scan(**{**arguments, **inputs}, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (pairs(y) * torch.randn(pairs(y).shape, generator=generator, dtype=torch.float64)).sum() for y in outputs
    )
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs.values(), strict=True)]
    named = zip(("h", "last_state", *(f"d{n}" for n in inputs)), (*outputs, *grads), strict=True)
    return {n: pairs(t.detach() if n[0] == "d" else t).detach() for n, t in named}


def pairs(t):
    return (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).double()


def assert_matches(found, wanted, output=2e-6, gradient=5e-6):
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        assert found[name].shape == t.shape, name
        limit = output if name in ("h", "last_state") else gradient
        off = error(found[name], t)
        assert off <= limit, f"{name} is off by {off:.1e} of its largest value"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_loops(backend, case):
    arguments = make(case)
    wanted = evaluate(arguments, scan=naive)
    if backend == "reference":
        assert_matches(evaluate(arguments, backend=backend), wanted, output=1e-13, gradient=1e-12)
    assert_matches(evaluate(cast(arguments, torch.float32), backend=backend), wanted)


@pytest.mark.parametrize("case", META["kwargs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_case(backend, case):
    tensors = load_file(FOLDER / "io.safetensors")
    tensors = {n.removeprefix(f"{case}."): t for n, t in tensors.items() if n.startswith(case)}
    exact = backend == "reference"
    inputs = [tensors[n].to(torch.float64 if exact else torch.float32).requires_grad_() for n in ("a", "x", "h0")]
    h, _ = linear_scan(*inputs, reset=tensors["resets"].bool(), backend=backend)
    grads = torch.autograd.grad(h, inputs, tensors["grad_out"].to(h.dtype))
    for found, name in zip((h, *grads), ("out", "grad_a", "grad_x", "grad_h0"), strict=True):
        if exact:
            torch.testing.assert_close(found, tensors[name], **META["tolerance"])
        else:
            assert error(found, tensors[name]) < (2e-6 if name == "out" else 5e-6)


@pytest.mark.parametrize("kinds", ["rr", "cc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_reset_cuts_exactly(backend, kinds):
    """Not even infinity passes, and the decay there has no gradient at all."""
    arguments = cast(make(Case((2, 8, 3), (2, 8, 3), kinds)), torch.float32)
    quiet, _ = linear_scan(**{**arguments, "x": arguments["x"][:, 4:], "a": arguments["a"][:, 4:]}, backend=backend)
    flags = torch.zeros(2, 8, dtype=torch.bool)
    flags[:, 4] = True
    arguments["x"][:, 1] = math.inf
    arguments["a"][:, [0, 4]] = math.nan
    found = evaluate({**arguments, "reset": flags}, backend=backend)
    assert torch.equal(found["h"][:, 4:], pairs(quiet))
    assert found["da"][:, [0, 4]].count_nonzero() == 0
    assert found["dx"][:, 4:].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_scan(backend, shape):
    a, x, start = torch.rand(shape[2:]), torch.randn(shape), torch.randn(shape[0], *shape[2:])
    inputs = [t.requires_grad_() for t in (a, x, start)]
    h, last = linear_scan(*inputs, backend=backend)
    grads = torch.autograd.grad(h.sum() + last.sum(), inputs)
    assert (h.shape, last.shape) == (x.shape, start.shape)
    if shape[1] == 0:
        assert torch.equal(last, start)
        assert torch.equal(grads[2], torch.ones_like(start))
        assert not grads[0].any()
        assert not linear_scan(a, x, backend=backend)[1].any()


@pytest.mark.parametrize("kinds", ["rr", "cc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_inputs(backend, kinds):
    arguments = make(Case((2, 70, 20), (20,), kinds, full=True))
    arguments["x"] *= 1e4
    assert_matches(evaluate(cast(arguments, torch.float32), backend=backend), evaluate(arguments, scan=naive))


@pytest.mark.parametrize("decay", [0.999, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_long_memory(backend, decay):
    x = torch.randn(1, 4000, 16)
    a = torch.full((16,), decay)
    h, _ = linear_scan(a, x, backend=backend)
    assert error(h, linear_scan(a.double(), x.double(), backend="reference")[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kinds", ["rr", "cr"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_rounds_only_what_goes_in_and_out(backend, kinds, dtype):
    arguments = cast(make(Case((2, 70, 5, 4), (5, 1), kinds, full=True)), torch.float32)
    arguments["x"] = arguments["x"].to(dtype)
    wanted = evaluate(cast(arguments, torch.float64), scan=naive)
    h, last = linear_scan(**arguments, backend=backend)
    assert h.dtype == (dtype if kinds == "rr" else torch.complex64)
    assert last.dtype == (torch.float32 if kinds == "rr" else torch.complex64)
    found = evaluate(arguments, backend=backend)
    assert error(found["last_state"], wanted["last_state"]) < 2e-6
    assert all(error(found[n], t) < torch.finfo(dtype).eps for n, t in wanted.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    arguments = cast(make(Case((2, 9, 6), (6,), "cc", full=True)), torch.float32)
    outside = evaluate(arguments, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = evaluate(arguments, backend=backend)
    assert all(torch.equal(inside[n], t) for n, t in outside.items())


def test_dtypes_of_results():
    single, double = torch.randn(2, 5, 3), torch.randn(2, 5, 3).double()
    assert [t.dtype for t in linear_scan(single[0, 0], single)] == [torch.float32] * 2
    assert [t.dtype for t in linear_scan(double[0, 0], double, backend="reference")] == [torch.float64] * 2
    assert [t.dtype for t in linear_scan(1j * single[0, 0], single)] == [torch.complex64] * 2
    assert [t.dtype for t in linear_scan(single[0, 0], 1j * double, backend="reference")] == [torch.complex128] * 2


@pytest.mark.parametrize("kinds", ["rr", "cr", "cc"])
@pytest.mark.parametrize("a", [(1, 5), (2, 9, 4, 5), (2, 9, 4, 1)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_carry_a_scan_on(backend, a, kinds):
    arguments = cast(make(Case((2, 9, 4, 5), a, kinds)), torch.float32)
    a, x = arguments["a"], arguments["x"]
    h, last = linear_scan(a, x, backend=backend)
    state = linear_scan(a[:, :5] if a.dim() == 4 else a, x[:, :5], backend=backend)[1]
    for t in range(5, 9):
        state = linear_scan_step(a[:, t] if a.dim() == 4 else a, x[:, t], state)
        assert state.dtype == last.dtype
        torch.testing.assert_close(state, h[:, t], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_separates_packed_sequences(backend):
    arguments = cast(make(Case((1, 40, 3), (1, 40, 3), "cc")), torch.float32)
    flags = torch.zeros(1, 40, dtype=torch.bool)
    flags[:, [0, 7, 30]] = True
    packed, _ = linear_scan(**{**arguments, "reset": flags}, backend=backend)
    alone = []
    for part in map(slice, (0, 7, 30), (7, 30, 40)):
        pieces = {n: arguments[n][:, part] for n in ("a", "x")}
        alone.append(linear_scan(**pieces, backend=backend)[0])
    assert torch.equal(packed, torch.cat(alone, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_is_a_flipped_scan(backend):
    arguments = cast(make(Case((2, 9, 6), (2, 9, 6), "cc", full=True)), torch.float32)
    flipped = {**arguments, **{n: arguments[n].flip(1) for n in ("a", "x", "reset")}, "reverse": True}
    h, last = linear_scan(**arguments, backend=backend)
    turned, turned_last = linear_scan(**flipped, backend=backend)
    assert torch.equal(turned.flip(1), h)
    assert torch.equal(turned_last, last)


@pytest.mark.parametrize("a", [(64, 1, 1), (1, 96, 64, 1, 1), (1, 96, 64, 16, 16)], ids=str)
def test_repeats_and_thread_counts_agree_to_the_last_bit(a):
    arguments = cast(make(Case((1, 96, 64, 16, 16), a, "cc")), torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 1, 2, 2):
        torch.set_num_threads(threads)
        results.append(evaluate(arguments, backend="cpu"))
    torch.set_num_threads(before)
    for name, t in results[0].items():
        assert torch.equal(results[1][name], t)
        assert torch.equal(results[3][name], results[2][name])
        shared = name == "da" and a[1:3] == (96, 64) and a[-1] == 1  # sums of the threads' partial sums
        assert torch.equal(results[2][name], t) or (shared and error(results[2][name], t) < 5e-7)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_gradcheck(case):
    scan, inputs = of_leaves(make(case))
    assert torch.autograd.gradcheck(scan, inputs)
    assert torch.autograd.gradgradcheck(scan, inputs)


def of_leaves(arguments, **options):
    names = list(leaves(arguments))
    inputs = tuple(arguments[n].detach().requires_grad_() for n in names)
    return lambda *t: linear_scan(**{**arguments, **dict(zip(names, t, strict=True))}, **options), inputs


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_in_float32(backend, case):
    def second(arguments, backend):
        scan, inputs = of_leaves(arguments, backend=backend)
        loss = sum(pairs(y).square().sum() for y in scan(*inputs))
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        grads = torch.autograd.grad(sum(pairs(g).square().sum() for g in first), inputs)
        return {f"d{n}": pairs(g) for n, g in enumerate(grads)}

    wanted = second(make(case), "reference")
    assert_matches(second(cast(make(case), torch.float32), backend), wanted, gradient=2e-5)


@pytest.mark.parametrize("case", FULL_CASES[1::3], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, case):
    arguments = cast(make(case), torch.float32)
    scan = {n: t.requires_grad_() if n in leaves(arguments) else t for n, t in arguments.items()}
    torch.library.opcheck(OP.linear_scan.default, (), {**scan, "backend": backend})


@pytest.mark.parametrize(("kinds", "a"), [("rr", (1, 9, 3, 4)), ("cc", (1, 1, 3, 1)), ("cc", (2, 9, 3, 1))], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_canonical(backend, kinds, a):
    given = cast(make(Case((2, 9, 3, 4), a, kinds, full=True)), torch.float32)
    inputs = (given["a"].requires_grad_(), given["x"].requires_grad_(), given["initial_state"].requires_grad_())
    torch.library.opcheck(OP.linear_scan_forward.default, (*inputs, given["reset"], True, backend))
    a, x, start = (t.detach() for t in inputs)
    h, last = OP.linear_scan_forward(a, x, start, given["reset"], True, backend)
    for dlast, initial in ((last, start), (None, None)):
        arguments = (torch.randn_like(h), dlast, h, a, initial, given["reset"], True, backend)
        torch.library.opcheck(OP.linear_scan_backward.default, arguments)


class Recurrence(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(0.9 * torch.rand(3, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, last = linear_scan(self.a, x)
        return h + last.unsqueeze(1)


class ComplexRecurrence(Recurrence):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.polar(self.a, 3 * self.a).conj()  # lazily, as the gradient of h is: kernels must not overlook it
        h, last = linear_scan(a, x, None, x[:, :, 0, 0] > 1, True)
        return h.imag + h.conj().imag * x + last.imag.unsqueeze(1)


@pytest.mark.parametrize("kind", [Recurrence, ComplexRecurrence])
def test_export_with_dynamic_batch_and_length(kind):
    module = kind()
    sizes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2)}
    program = torch.export.export(module, (torch.randn(2, 9, 3, 4),), dynamic_shapes=(sizes,))
    for shape in [(2, 9, 3, 4), (1, 5, 3, 4), (3, 130, 3, 4)]:
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [Recurrence, ComplexRecurrence])
def test_compile(kind, dynamic):
    torch._dynamo.reset()
    module, x = kind(), torch.randn(2, 9, 3, 4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for f in (compiled, module):
        y = f(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), module.a)))
    torch.testing.assert_close(*results)


def test_script_and_trace():
    module, x = Recurrence(), torch.randn(2, 9, 3, 4)
    traced = torch.fx.symbolic_trace(module)
    for f in (torch.jit.script(module), traced, torch.jit.script(traced)):
        torch.testing.assert_close(f(x), module(x))


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_meta_device_gives_shapes_and_layouts(case):
    real = cast(make(case), torch.float32)
    meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in real.items()}
    for found, wanted in zip(linear_scan(**meta), linear_scan(**real), strict=True):
        assert found.device.type == "meta"
        assert (found.shape, found.dtype, found.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


WRONG = [
    ({"a": torch.rand(5)}, r"a has shape \(5,\), expected to broadcast to x's \(2, 8, 4\)"),
    ({"a": torch.rand(2, 4)}, r"a has shape \(2, 4\), expected to broadcast to x's \(2, 8, 4\)"),
    ({"a": torch.rand(1, 2, 8, 4)}, r"a has shape \(1, 2, 8, 4\), expected to broadcast to x's \(2, 8, 4\)"),
    ({"a": torch.rand(3, 8, 4)}, r"a has shape \(3, 8, 4\), expected to broadcast"),
    ({"x": torch.rand(8)}, r"x has shape \(8,\), expected \(b, l, \*state\)"),
    ({"initial_state": torch.rand(2, 1)}, r"initial_state has shape \(2, 1\), expected \(2, 4\)"),
    ({"reset": torch.zeros(1, 8, dtype=torch.bool)}, r"reset has shape \(1, 8\), expected \(2, 8\)"),
    ({"reset": torch.zeros(2, 8)}, "reset must be bool, not torch.float32"),
    ({"x": torch.ones(2, 8, 4, dtype=torch.int64)}, "x must be real or complex floating point, not torch.int64"),
    ({"a": torch.ones(4, dtype=torch.bool)}, "a must be real or complex floating point, not torch.bool"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=lambda x: x[:30] if isinstance(x, str) else "")
def test_wrong_calls_are_told_in_one_line(change, message):
    with pytest.raises(RuntimeError, match=f"^linear_scan: {message}[^\n]*$"):
        linear_scan(**{"a": torch.rand(4), "x": torch.rand(2, 8, 4), **change})


def test_wrong_steps_are_told_in_one_line():
    with pytest.raises(RuntimeError, match=r"linear_scan_step: x has shape \(2, 3\), expected \(2, 4\)"):
        linear_scan_step(torch.rand(4), torch.rand(2, 3), torch.rand(2, 4))
    with pytest.raises(RuntimeError, match=r"linear_scan_step: a has shape \(3,\), expected to broadcast"):
        linear_scan_step(torch.rand(3), torch.rand(2, 4), torch.rand(2, 4))


def test_float64_on_a_float32_backend():
    for x in (torch.rand(1, 2, 3).double(), torch.rand(1, 2, 3).to(torch.complex128)):
        with pytest.raises(ValueError, match="computes in float32; use backend='reference' for float64"):
            linear_scan(torch.rand(3), x, backend="cpu")
