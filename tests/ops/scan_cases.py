"""Inputs for scans, a naive scan to check the definition itself, and how two results are compared."""

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ssmvision.ops import routes as orders
from ssmvision.ops import selective_scan

BACKENDS = ("reference", "cpu")


@dataclass(frozen=True)
class Case:
    """One call. The defaults are a small scan with everything optional left out."""

    b: int = 2
    k: int = 0  # 0: A is (d, n), the papers' form
    d: int = 5
    n: int = 3
    l: int = 11
    B: Any = "shared"  # or "channel", or a number of groups
    C: Any = "shared"
    D: bool = False
    z: bool = False
    bias: bool = False
    softplus: bool = False
    rank: int = 0
    initial: bool = False
    reset: Any = ()  # tokens, or "random" for flags of every sample's and route's own
    routes: str = ""
    merge: bool = True
    u_per_route: bool = False
    growing: bool = False  # positive A
    layout: str = "first"

    def __str__(self):
        default = Case()
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)) or "default"


EVERYTHING = {
    "D": True, "z": True, "bias": True, "softplus": True, "rank": 2, "initial": True, "reset": "random",
}  # fmt: skip


def lay_out(x, layout):
    """The same values with other strides."""
    if layout == "last" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":  # surrounded by what must not be read
        padding = True if x.dtype == torch.bool else 0 if x.dtype == torch.int64 else math.nan
        room = x.new_full([2 * size + 1 for size in x.shape], padding)
        room[tuple(slice(1, None, 2) for _ in x.shape)] = x
        return room[tuple(slice(1, None, 2) for _ in x.shape)]
    return x.contiguous()


def make_routes(name, k, tokens):
    """Routes (k, t) over `tokens` tokens, seen as a grid of 3 rows where the name asks for a grid."""
    if name.startswith("subset"):  # tokens that some routes do not visit
        return make_routes("random", k, tokens)[:, : max(1, tokens * 2 // 3)]
    if name == "random":
        return torch.stack([torch.randperm(tokens) for _ in range(k)])
    grid = (3, tokens // 3)
    found = {
        "bidirectional": lambda: orders.bidirectional(tokens),
        "cross": lambda: orders.cross(*grid),
        "column": lambda: orders.column(*grid),
        "serpentine": lambda: orders.serpentine(*grid),
        "window": lambda: orders.window(*grid, 2),
        "atrous": lambda: orders.atrous(*grid, 2),
        "volume": lambda: orders.raster([3, tokens // 6, 2], [2, 0, 1]),
    }[name]()
    found = found.view(-1, tokens)
    return torch.cat([found, orders.reverse(found)]).repeat(k, 1)[:k]


def make(case, seed=0):
    """Arguments of `selective_scan` by name: float64 values that float32 holds exactly."""
    torch.manual_seed(seed)
    b, d, n, l = case.b, case.d, case.n, case.l
    k = (case.k,) if case.k else ()

    def normal(*shape):
        return torch.randn(*shape)

    def coefficients(kind):
        if kind == "channel":
            return normal(*k, d, n)
        return normal(b, *k, n, l) if kind == "shared" else normal(b, *k, kind, n, l)

    A = torch.rand(*k, d, n) + 0.2
    delta = normal(b, *k, case.rank or d, l)
    if not case.softplus:
        delta = 0.5 * delta.abs() if not case.rank else delta
    arguments = {
        "u": normal(b, *(k if case.u_per_route else ()), d, l),
        "delta": delta,
        "A": 0.1 * A if case.growing else -2 * A,
        "B": coefficients(case.B),
        "C": coefficients(case.C),
        "D": normal(*k, d) if case.D else None,
        "z": normal(b, d, l) if case.z else None,
        "delta_bias": _bias(case, k) if case.bias else None,
        "dt_proj": _projection(case, k) if case.rank else None,
        "initial_state": normal(b, *k, d, n) if case.initial else None,
    }
    arguments = {name: None if x is None else lay_out(x.double(), case.layout) for name, x in arguments.items()}
    order = make_routes(case.routes, case.k or 1, l) if case.routes else None
    extra = {"reset": _reset(case, k), "routes": order, "delta_softplus": case.softplus, "merge": case.merge}
    return {**arguments, **extra}


def _bias(case, k):
    bias = 0.3 * torch.randn(*k, case.d)
    return bias if case.softplus else bias.abs()  # without softplus, a negative step lets the state grow


def _projection(case, k):
    weight = torch.randn(*k, case.d, case.rank) / case.rank
    return weight if case.softplus else 0.1 * weight  # without softplus, keep the recurrence tame


def _reset(case, k):
    if case.reset == "random":
        return torch.rand(case.b, *k, case.l) < 0.2
    if not case.reset:
        return None
    flags = torch.zeros(case.b, case.l, dtype=torch.bool)
    flags[:, list(case.reset)] = True
    return flags


def random_case(seed):
    """A combination that nobody thought of."""
    draw = random.Random(seed)
    k = draw.choice([0, 0, 1, 2, 4])
    l = draw.choice([1, 6, 18, 66, 132])
    some_routes = ["random", "subset", "bidirectional", "cross", "serpentine", "window", "atrous", "volume"]
    merge = draw.random() < 0.7
    d = draw.choice([1, 4, 6, 16, 20, 36])
    kinds = ["shared", "channel", *(g for g in (1, 2, 4) if d % g == 0), d]
    return Case(
        b=draw.choice([1, 2, 3]), k=k, d=d, n=draw.choice([1, 2, 3, 4, 5, 16]), l=l, B=draw.choice(kinds),
        C=draw.choice(kinds), D=draw.random() < 0.5, z=merge and draw.random() < 0.5, bias=draw.random() < 0.5,
        softplus=draw.random() < 0.7, rank=draw.choice([0, 0, 1, 3]), initial=draw.random() < 0.5,
        reset=draw.choice([(), "random", (0, l // 2)]), merge=merge, u_per_route=bool(k) and draw.random() < 0.3,
        routes=draw.choice(["", *(some_routes if l >= 6 else ["random"])]) if k else "",
        layout=draw.choice(["first", "last", "strided"]),
    )  # fmt: skip


def cast(arguments, dtype):
    """The same arguments with floating-point tensors in another type and the same strides."""
    return {name: _cast(x, dtype) for name, x in arguments.items()}


def _cast(x, dtype):
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)


def leaves(arguments):
    """Arguments whose gradients are asked for."""
    return {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}


def evaluate(arguments, scan=selective_scan, **options):
    """Outputs and the gradients of every floating-point argument of a fixed random loss, by name."""
    arguments = {n: x.detach().requires_grad_() if n in leaves(arguments) else x for n, x in arguments.items()}
    y, last = scan(**arguments, **options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in (y, last))
    inputs = leaves(arguments)
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return {"y": y, "last_state": last, **{f"d{name}": g for name, g in zip(inputs, grads, strict=True)}}


def error(found, wanted):
    """Largest difference as a part of the largest wanted value; NaN counts as infinite."""
    if wanted.numel() == 0:
        return 0.0
    difference = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30)
    return math.inf if difference.isnan() else difference.item()


def assert_matches(found, wanted, output=2e-6, gradient=5e-6, growing=False):
    """Compare two results of `evaluate`."""
    assert found.keys() == wanted.keys()
    if growing:  # rounding errors grow with the state
        output, gradient = 1e-5, 2e-5
    for name, x in wanted.items():
        assert found[name].shape == x.shape, name
        limit = output if name in ("y", "last_state") else gradient
        assert error(found[name], x) <= limit, f"{name} is off by {error(found[name], x):.1e} of its largest value"


def naive_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, dt_proj=None, initial_state=None,
    reset=None, routes=None, merge=True,
):  # fmt: skip
    """The recurrence as the paper writes it, one number at a time, in the caller's shapes."""
    d, n = A.shape[-2:]
    b, l = u.shape[0], u.shape[-1]
    scans = [(ik,) for ik in range(A.shape[0])] if A.dim() == 3 else [()]
    zero = u.new_zeros(())
    y = [[[[zero] * l for _ in range(d)] for _ in scans] for _ in range(b)]
    last = [[[None] * d for _ in scans] for _ in range(b)]

    def coefficient(m, ib, k, i, j, token):
        if m.dim() == 2 + len(k):
            return m[(*k, i, j)]
        if m.dim() == 3 + len(k):
            return m[(ib, *k, j, token)]
        return m[(ib, *k, i * m.shape[-3] // d, j, token)]

    def step_size(ib, k, i, token):
        if dt_proj is None:
            raw = delta[(ib, *k, i, token)]
        else:
            raw = sum(dt_proj[(*k, i, r)] * delta[(ib, *k, r, token)] for r in range(dt_proj.shape[-1]))
        raw = raw if delta_bias is None else raw + delta_bias[(*k, i)]
        return F.softplus(raw) if delta_softplus else raw

    for ib in range(b):
        for k in scans:
            ik = k[0] if k else 0
            cut = None if reset is None else reset[(ib, *(k if reset.dim() == 3 else ()))]
            for i in range(d):
                h = [zero if initial_state is None else initial_state[(ib, *k, i, j)] for j in range(n)]
                for token in range(l) if routes is None else routes[ik].tolist():
                    if cut is not None and cut[token]:
                        h = [zero] * n
                    x = u[(ib, *(k if u.dim() == 4 else ()), i, token)]
                    step = step_size(ib, k, i, token)
                    out = zero if D is None else D[(*k, i)] * x
                    for j in range(n):
                        drive = step * coefficient(B, ib, k, i, j, token) * x
                        h[j] = torch.exp(step * A[(*k, i, j)]) * h[j] + drive
                        out = out + coefficient(C, ib, k, i, j, token) * h[j]
                    y[ib][ik][i][token] = out
                last[ib][ik][i] = torch.stack(h)
    y = torch.stack([torch.stack([torch.stack([torch.stack(row) for row in x]) for x in sample]) for sample in y])
    last = torch.stack([torch.stack([torch.stack(x) for x in sample]) for sample in last])
    y, last = (y.sum(1) if merge else y, last) if A.dim() == 3 else (y.squeeze(1), last.squeeze(1))
    return (y if z is None else y * F.silu(z)), last
