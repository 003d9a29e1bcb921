"""The scan of Mamba-2: every backend against plain loops, against the official outputs, and as torch sees it."""

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scan_cases import BACKENDS, assert_matches, cast, error, evaluate, lay_out, leaves
from torch import nn

from ssmvision.ops import resets_from_seq_idx, selective_scan, ssd_scan

OP = torch.ops.ssmvision
FOLDER = Path(__file__).parents[1] / "parity" / "ssm_ssd"
META = json.loads((FOLDER / "meta.json").read_text())


@dataclass(frozen=True)
class Case:
    """One call. The defaults are a small scan with everything optional left out."""

    b: int = 2
    l: int = 11
    h: int = 2
    p: int = 5
    g: int = 1
    n: int = 3
    D: str = ""  # "h" or "hp"
    z: bool = False
    bias: bool = False
    softplus: bool = False
    limit: tuple[float, float] = (0.0, math.inf)
    initial: bool = False
    reset: tuple[int, ...] | str = ()  # tokens, or "random" for flags of every sample's own
    layout: str = "first"

    def __str__(self):
        default = Case()
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)) or "default"


EVERYTHING = {
    "D": "hp", "z": True, "bias": True, "softplus": True, "limit": (0.1, 1.2), "initial": True, "reset": "random",
}  # fmt: skip


def make(case, seed=0):
    """Arguments of `ssd_scan` by name: float64 values that float32 holds exactly."""
    torch.manual_seed(seed)
    b, l, h, p, g, n = case.b, case.l, case.h, case.p, case.g, case.n
    dt = torch.randn(b, l, h)
    arguments = {
        "x": torch.randn(b, l, h, p),
        "dt": dt if case.softplus else 0.5 * dt.abs(),
        "A": -2 * torch.rand(h) - 0.2,
        "B": torch.randn(b, l, g, n),
        "C": torch.randn(b, l, g, n),
        "D": {"": None, "h": torch.randn(h), "hp": torch.randn(h, p)}[case.D],
        "z": torch.randn(b, l, h, p) if case.z else None,
        "dt_bias": 0.3 * torch.randn(h) if case.bias else None,
        "initial_state": torch.randn(b, h, p, n) if case.initial else None,
    }
    arguments = {name: None if x is None else lay_out(x.double(), case.layout) for name, x in arguments.items()}
    reset = None
    if case.reset:
        reset = torch.rand(b, l) < 0.2
        if case.reset != "random":
            reset = torch.zeros(b, l, dtype=torch.bool).index_fill_(1, torch.tensor(case.reset), True)
        reset = lay_out(reset, case.layout)
    return {**arguments, "dt_softplus": case.softplus, "dt_limit": case.limit, "reset": reset}


def naive(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, math.inf), initial_state=None,
    reset=None,
):  # fmt: skip
    """The recurrence of one head after the other, token by token."""
    b, l, h, p = x.shape
    y, last = [], []
    for ib in range(b):
        for i in range(h):
            group = i * B.shape[2] // h
            state = x.new_zeros(p, B.shape[-1]) if initial_state is None else initial_state[ib, i]
            for t in range(l):
                step = dt[ib, t, i] if dt_bias is None else dt[ib, t, i] + dt_bias[i]
                step = (F.softplus(step) if dt_softplus else step).clamp(*dt_limit)
                if reset is not None and reset[ib, t]:
                    state = 0 * state
                state = torch.exp(step * A[i]) * state + step * torch.outer(x[ib, t, i], B[ib, t, group])
                out = state @ C[ib, t, group]
                out = out if D is None else out + D[i] * x[ib, t, i]
                y.append(out if z is None else out * F.silu(z[ib, t, i]))
            last.append(state)
    return torch.stack(y).view(b, h, l, p).transpose(1, 2), torch.stack(last).view(b, h, p, -1)


CASES = [
    *(Case(l=l, softplus=True, initial=True) for l in (1, 2, 63, 64, 65, 128, 129)),
    *(Case(b=1, p=p, l=33) for p in (1, 4, 7, 8, 16, 17, 33, 64)),
    *(Case(b=1, n=n, l=33, p=20) for n in (1, 2, 4, 5, 16, 17)),
    *(Case(b=1, h=6, g=g, D="h", initial=True) for g in (1, 2, 3, 6)),
    *(Case(**{name: value}) for name, value in EVERYTHING.items()),
    *(Case(softplus=True, limit=limit) for limit in ((0.5, 0.6), (0.0, 0.3), (0.7, math.inf))),
    *(Case(layout=layout, h=4, g=2, l=70, p=18, **EVERYTHING) for layout in ("first", "last", "strided")),
    *(Case(b=1, l=130, p=8, reset=tokens, initial=True) for tokens in ((0,), (63,), (64,), (65,), (63, 64, 65, 128))),
    Case(b=1, l=40, reset=tuple(range(40))),
]
TINY = [
    Case(b=1, l=5, h=2, p=2, n=2),
    Case(b=1, l=4, h=2, p=2, n=1, g=2, **EVERYTHING),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backends_are_the_recurrence(case):
    arguments = make(case)
    wanted = evaluate(arguments, scan=naive)
    definition = evaluate(arguments, scan=ssd_scan, backend="reference")
    assert_matches(definition, wanted, output=1e-13, gradient=1e-12)
    for backend in BACKENDS:
        assert_matches(evaluate(cast(arguments, torch.float32), scan=ssd_scan, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_of_real_models(backend):
    arguments = make(Case(b=1, l=70, h=3, p=64, n=128, D="h", softplus=True, bias=True))
    wanted = evaluate(arguments, scan=ssd_scan, backend="reference")
    assert_matches(evaluate(cast(arguments, torch.float32), scan=ssd_scan, backend=backend), wanted)


@pytest.mark.parametrize("shape", [{"b": 0}, {"l": 0}, {"h": 0, "g": 1}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_scan(backend, shape):
    arguments = make(Case(**{**EVERYTHING, "reset": "random", **shape}))
    found = evaluate(cast(arguments, torch.float32), scan=ssd_scan, backend=backend)
    assert_matches(found, evaluate(arguments, scan=ssd_scan, backend="reference"))
    if "l" in shape:
        assert torch.equal(found["last_state"], arguments["initial_state"].float())


def golden(case):
    tensors = {n.removeprefix(f"{case}."): x for n, x in load_file(FOLDER / "io.safetensors").items() if case in n}
    names = {"x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"} & tensors.keys()
    return tensors, {name: tensors[name].clone().requires_grad_() for name in names}


@pytest.mark.parametrize("case", META["kwargs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_case(backend, case):
    tensors, inputs = golden(case)
    given = {"initial_state" if name == "initial_states" else name: x for name, x in inputs.items()}
    reset = resets_from_seq_idx(tensors["seq_idx"]) if "seq_idx" in tensors else None
    y, last = ssd_scan(**given, dt_softplus=META["kwargs"][case]["softplus"], reset=reset, backend=backend)
    assert error(y, tensors["out"]) < 2e-6
    assert error(last, tensors["final_state"]) < 2e-6
    torch.autograd.backward([y, last], [tensors["grad_out"], tensors["grad_final_state"]])
    for name, x in inputs.items():
        assert error(x.grad, tensors[f"grad.{name}"]) < 5e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_a_selective_scan_with_one_decay_per_head(backend):
    arguments = cast(make(Case(h=4, g=2, l=70, p=6, **{**EVERYTHING, "limit": (0.0, math.inf)})), torch.float32)
    found = evaluate(arguments, scan=ssd_scan, backend=backend)

    def as_selective_scan(x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus, dt_limit, reset):
        p, n = x.shape[-1], B.shape[-1]

        def tokens_last(m):
            return m.flatten(2).transpose(1, 2)

        y, last = selective_scan(
            tokens_last(x), tokens_last(dt.unsqueeze(-1).expand_as(x)), A.repeat_interleave(p)[:, None].expand(-1, n),
            B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), D.flatten(), tokens_last(z), dt_bias.repeat_interleave(p),
            dt_softplus, initial_state=initial_state.flatten(1, 2), reset=reset, backend=backend,
        )  # fmt: skip
        return y.transpose(1, 2).unflatten(-1, (-1, p)), last.unflatten(1, (-1, p))

    assert_matches(found, evaluate(arguments, scan=as_selective_scan), output=1e-6, gradient=2e-6)


@pytest.mark.parametrize("cut", [1, 30, 64, 99])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_state_carries_a_scan_on(backend, cut):
    """The result does not depend on where chunks of steps begin."""
    arguments = cast(make(Case(b=1, l=100, p=9, **EVERYTHING)), torch.float32)
    whole, last = ssd_scan(**arguments, backend=backend)
    state, parts = arguments["initial_state"], []
    for part in (slice(None, cut), slice(cut, None)):
        pieces = {name: arguments[name][:, part] for name in ("x", "dt", "B", "C", "z", "reset")}
        y, state = ssd_scan(**{**arguments, **pieces, "initial_state": state}, backend=backend)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(state, last, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("starts", [(0, 5), (0, 63, 65, 128)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_do_not_see_each_other(backend, starts):
    arguments = cast(make(Case(b=1, l=140, p=6, D="h", softplus=True)), torch.float32)
    ends = [*starts[1:], 140]
    seq_idx = torch.cat([torch.full((1, end - begin), begin) for begin, end in zip(starts, ends, strict=True)], 1)
    reset = resets_from_seq_idx(seq_idx)
    assert reset.nonzero()[:, 1].tolist() == list(starts[1:])
    packed, last = ssd_scan(**{**arguments, "reset": reset}, backend=backend)
    alone = []
    for begin, end in zip(starts, ends, strict=True):
        pieces = {name: arguments[name][:, begin:end] for name in ("x", "dt", "B", "C")}
        alone.append(ssd_scan(**{**arguments, **pieces}, backend=backend))
    torch.testing.assert_close(packed, torch.cat([y for y, _ in alone], 1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(last, alone[-1][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dt", [1e4, 200.0, 1.0, 1e-4, 0.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes_stay_finite_and_right(backend, dt):
    arguments = make(Case(l=130, h=5))
    arguments |= {"dt": torch.full_like(arguments["dt"], dt), "A": torch.tensor([-64, -16, -1, -1e-4, -0.0]).double()}
    wanted = evaluate(arguments, scan=ssd_scan, backend="reference")
    assert all(x.isfinite().all() for x in wanted.values())
    assert_matches(evaluate(cast(arguments, torch.float32), scan=ssd_scan, backend=backend), wanted, gradient=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decay_that_meets_no_state_is_of_no_consequence_however_large(backend):
    arguments = make(Case(l=3, limit=(-math.inf, math.inf)))
    arguments |= {"dt": torch.full_like(arguments["dt"], -200.0), "reset": torch.ones(2, 3, dtype=torch.bool)}
    found = evaluate(cast({**arguments, "A": arguments["A"] - 64}, torch.float32), scan=ssd_scan, backend=backend)
    quiet = evaluate({**arguments, "A": 0 * arguments["A"]}, scan=ssd_scan, backend="reference")
    assert all(x.isfinite().all() for x in found.values())
    assert error(found["y"], quiet["y"]) < 2e-6


@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_nan_stays_where_it_belongs(backend, name):
    """Neither another head nor an earlier token sees it."""
    arguments = cast(make(Case(h=2, g=2, l=70, p=6, z=True)), torch.float32)
    clean, _ = ssd_scan(**arguments, backend=backend)
    arguments[name][(1, 40, 1, *[0] * (arguments[name].dim() - 3))] = torch.nan
    y, last = ssd_scan(**arguments, backend=backend)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[1, 40 : 41 if name in ("C", "z") else None, 1, 0 if name in ("x", "z") else slice(None)] = True
    assert torch.equal(y.isnan(), reached)
    assert torch.equal(y[~reached], clean[~reached])
    assert last.isnan().sum() == {"x": 3, "dt": 18, "B": 6}.get(name, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_rounds_only_what_goes_in_and_out(backend, dtype):
    arguments = cast(make(Case(l=70, **EVERYTHING)), dtype)
    wanted = evaluate(cast(arguments, torch.float64), scan=ssd_scan, backend="reference")
    found = evaluate(arguments, scan=ssd_scan, backend=backend)
    assert found["y"].dtype == found["dx"].dtype == dtype
    assert found["last_state"].dtype == torch.float32
    assert error(found["last_state"], wanted["last_state"]) < 2e-6
    assert all(error(found[name], x) < 2 * torch.finfo(dtype).eps for name, x in wanted.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    arguments = cast(make(Case(l=20, **EVERYTHING)), torch.float32)
    arguments |= {name: arguments[name].bfloat16() for name in ("dt", "B", "z")}
    outside = evaluate(arguments, scan=ssd_scan, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = evaluate(arguments, scan=ssd_scan, backend=backend)
    assert inside["y"].dtype == inside["last_state"].dtype == torch.float32
    assert all(torch.equal(inside[name], x) for name, x in outside.items())


def test_threads_share_the_heads_and_repeats_agree_to_the_last_bit(threads):
    arguments = make(Case(b=1, l=400, h=6, g=2, p=32, n=32, **EVERYTHING))
    wanted = evaluate(arguments, scan=ssd_scan, backend="reference")
    arguments = cast(arguments, torch.float32)
    first = evaluate(arguments, scan=ssd_scan, backend="cpu")
    assert_matches(first, wanted)
    for _ in range(3):
        again = evaluate(arguments, scan=ssd_scan, backend="cpu")
        assert all(torch.equal(again[name], x) for name, x in first.items())


def of_leaves(arguments, backend):
    names = list(leaves(arguments))
    values = tuple(arguments[n].detach().requires_grad_() for n in names)
    return lambda *x: ssd_scan(**{**arguments, **dict(zip(names, x, strict=True))}, backend=backend), values


@pytest.mark.parametrize("case", TINY, ids=str)
def test_gradcheck(case):
    assert torch.autograd.gradcheck(*of_leaves(make(case), "reference"))
    assert torch.autograd.gradgradcheck(*of_leaves(make(case), "reference"))


@pytest.mark.parametrize("case", TINY, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_in_float32(backend, case):
    def second(arguments, backend):
        scan, values = of_leaves(arguments, backend)
        y, last = scan(*values)
        first = torch.autograd.grad(y.square().sum() + last.square().sum(), values, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), values)
        return {f"d{i}": g for i, g in enumerate(second)}

    wanted = second(make(case), "reference")
    assert_matches(second(cast(make(case), torch.float32), backend), wanted, gradient=2e-5)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_through_one_output_alone(backend, part):
    arguments = make(Case(l=70))

    def gradient(arguments, backend):
        x = arguments["x"].detach().requires_grad_()
        return torch.autograd.grad(ssd_scan(**{**arguments, "x": x}, backend=backend)[part].square().sum(), x)[0]

    assert error(gradient(cast(arguments, torch.float32), backend), gradient(arguments, "reference")) < 5e-6


def canonical(case, backend):
    found = cast(make(case), torch.float32)
    return (*(found[name] for name in ("x", "dt", "A", "B", "C", "initial_state", "reset")), backend)


FULL = Case(b=1, l=66, p=2, n=2, g=2, layout="strided", **EVERYTHING)


@pytest.mark.parametrize(("backend", "case"), [*((name, FULL) for name in BACKENDS), ("cpu", Case(l=9))], ids=str)
def test_opcheck(backend, case):
    arguments = tuple(
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in canonical(case, backend)
    )
    torch.library.opcheck(OP.ssd_scan_forward.default, arguments)
    with torch.no_grad():
        y, last, checkpoints = OP.ssd_scan_forward(*arguments)
    for dlast in (torch.randn_like(last), None):
        given = (torch.randn_like(y), dlast, checkpoints, *canonical(case, backend))
        torch.library.opcheck(OP.ssd_scan_backward.default, given)


def test_compile():
    torch._dynamo.reset()
    arguments = cast(make(FULL), torch.float32)
    compiled = torch.compile(ssd_scan, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_matches(evaluate(arguments, scan=compiled), evaluate(arguments, scan=ssd_scan))


class Scan(nn.Module):
    def __init__(self):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(2))
        self.D = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, last = ssd_scan(
            x, x[..., 0], -torch.exp(self.A_log), x[:, :, :1], x[:, :, 1:], D=self.D, z=x, dt_softplus=True
        )
        return y + last.sum()


def test_export_with_dynamic_batch_and_length():
    module = Scan().eval()
    sizes = {"x": {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=2)}}
    program = torch.export.export(module, (torch.randn(2, 10, 2, 3),), dynamic_shapes=sizes)
    for shape in [(2, 10, 2, 3), (1, 7, 2, 3), (3, 130, 2, 3)]:
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), module(x))


def test_script_trace_and_meta():
    module, x = Scan(), torch.randn(2, 10, 2, 3)
    for f in (torch.jit.script(module), torch.fx.symbolic_trace(module)):
        torch.testing.assert_close(f(x), module(x))
    assert module.to("meta")(x.to("meta")).shape == x.shape


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x", (2, 11, 3, 5)),
        ("dt", (2, 11, 3)),
        ("A", (2, 1)),
        ("B", (2, 10, 1, 3)),
        ("C", (2, 11, 1, 4)),
        ("D", (3,)),
        ("D", (2, 4)),
        ("z", (2, 11, 2, 4)),
        ("dt_bias", (2, 2)),
        ("initial_state", (2, 2, 3, 5)),
    ],
    ids=str,
)
def test_wrong_shape_is_told_in_one_line(name, shape):
    arguments = cast(make(Case(**EVERYTHING)), torch.float32)
    with pytest.raises(RuntimeError, match=r"^ssd_scan: \w+ has shape .* expected ") as caught:
        ssd_scan(**{**arguments, name: torch.zeros(shape)})
    assert "\n" not in str(caught.value)
    if name != "x":  # the others are measured by x
        assert f" {name} has shape {shape}" in str(caught.value)


def test_other_wrong_arguments():
    arguments = cast(make(Case(h=4)), torch.float32)
    wrong = partial(ssd_scan, **{n: x for n, x in arguments.items() if n not in ("B", "C", "reset", "A")})
    B, C, A = arguments["B"], arguments["C"], arguments["A"]
    with pytest.raises(RuntimeError, match=r"the groups of B and C \(3\) must divide 4 heads"):
        wrong(A=A, B=B.expand(-1, -1, 3, -1), C=C.expand(-1, -1, 3, -1))
    with pytest.raises(RuntimeError, match="reset has shape"):
        wrong(A=A, B=B, C=C, reset=torch.zeros(2, 10, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="reset must be bool, not"):
        wrong(A=A, B=B, C=C, reset=torch.zeros(2, 11))
    with pytest.raises(RuntimeError, match="A must be real floating point, not"):
        wrong(A=A * 1j, B=B, C=C)
    with pytest.raises(ValueError, match="unknown backend"):
        wrong(A=A, B=B, C=C, backend="cuda")
