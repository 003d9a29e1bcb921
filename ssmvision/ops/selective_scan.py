"""`selective_scan`, the S6 operator: its public function and its registration with torch.

Three layers, each thin: the public function (any of the papers' shapes) → `ssmvision::selective_scan`, a composite op
that brings them to one canonical form → `ssmvision::selective_scan_forward` / `_backward`, which call a backend.

Letters: b batch, k route, d channel, n state, g group of channels, l token, t step along a route, r rank of delta.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from . import _backend
from ._complex_scan import complex_selective_scan
from ._library import (
    CHUNK,
    Gradients,
    Kernel,
    cast,
    cast_number,
    cast_token,
    empty_like_layout,
    expect,
    expect_number,
    expect_real,
    expect_reset,
    expect_routes,
    no_autocast,
    register,
    settle,
)  # fmt: skip
from .reference import selective_scan as reference


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    delta_softplus: bool = False,
    dt_proj: Optional[Tensor] = None,
    initial_state: Optional[Tensor] = None,
    reset: Optional[Tensor] = None,
    routes: Optional[Tensor] = None,
    merge: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Selective scan (S6; Mamba, arXiv:2312.00752, algorithm 2) along one or several routes over the tokens.

        delta_t = softplus(delta_t + delta_bias)
        h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t
        y_t     = C_t h_t + D u_t

    and y * silu(z) if z is given. The step is zero-order hold for A and Euler for B, as in the published kernels.

    With `A` of shape (d, n) there is one scan over the tokens in order. With `A` of shape (k, d, n) there are k scans
    with parameters of their own, each along its row of `routes`; every tensor stays in token order, and the outputs are
    summed. A route costs index arithmetic, never a permuted copy. Memory layout is free: channels-last tensors come in
    as transposed views and are the fastest.

    A complex `A` holds one state of each conjugate pair: y_t = 2 Re(C_t h_t) + D u_t. Only `A`, `B`, `C` and
    `initial_state` may then be complex, and this form runs as a composition around `linear_scan`, which materialises
    the states of all steps, (b, k, t, d, n).

    Args:
        u: Tokens (b, d, l); with routes also (b, k, d, l).
        delta: Step sizes, (b, d, l) or (b, k, d, l); with `dt_proj` low-rank, (b, r, l) or (b, k, r, l).
        A: State matrix, (d, n) or (k, d, n), real or complex; its real part is negative for a stable recurrence.
        B: Input matrix: per channel (d, n), shared (b, n, l), grouped (b, g, n, l); with routes (k, d, n),
            (b, k, n, l), (b, k, g, n, l).
        C: Output matrix, shapes as `B`; the number of groups may differ.
        D: Skip connection, (d,) or (k, d).
        z: Gate, (b, d, l), applied after the routes are merged.
        delta_bias: (d,) or (k, d).
        delta_softplus: Apply softplus to delta + delta_bias.
        dt_proj: Projects a low-rank delta inside the kernel, (d, r) or (k, d, r); then delta is never materialised.
        initial_state: (b, d, n) or (b, k, d, n); zero if None.
        reset: Boolean, (b, l) or (b, k, l): where True, the state is zeroed just before that token is read (start of a
            packed sequence or of an episode).
        routes: int64 (k, t), t <= l: row k lists the tokens in the order in which scan k visits them, each at most
            once. See `ssmvision.ops.routes`. None scans 0, 1, 2, ...
        merge: Sum the routes: y is (b, d, l). Otherwise (b, k, d, l), and z is not allowed.
        backend: "auto", "cpu", "triton" or "reference"; see `ssmvision.ops.backend_info`.

    Returns:
        y, in u's dtype; and the state after the last step, (b, d, n) or (b, k, d, n), in float32 (float64 if u is;
        complex if A is). The recurrence runs in float32 whatever the input, also under autocast.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
        ValueError: A backend that does not exist or cannot run these tensors.
    """
    if not torch.jit.is_scripting():
        found = _backend.shortcut(
            "selective_scan", _composite, _direct, backend,
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, dt_proj, initial_state, reset, routes, merge,
        )  # fmt: skip
        if found is not None:
            return found
    return torch.ops.ssmvision.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, dt_proj, initial_state, reset, routes, merge, backend
    )


def selective_scan_step(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    delta_softplus: bool = False,
    dt_proj: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan`, for streams: in plain torch, differentiable; nothing is changed in place.

    Args:
        u: One token (b, d).
        delta: Its step sizes, (b, d); with `dt_proj` low-rank, (b, r).
        A: (d, n), real or complex.
        B: Shared (b, n) or grouped (b, g, n); what is constant per channel, (d, n), comes in as B.expand(b, d, n).
        C: Shapes as `B`.
        state: (b, d, n): zeros, or what the scan or the step before returned.
        D: (d,).
        z: Gate (b, d).
        delta_bias: (d,).
        delta_softplus: Apply softplus to delta + delta_bias.
        dt_proj: (d, r).

    Returns:
        y (b, d) in u's dtype; and the next state, in float32 (float64 if u is; complex if A is).

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    floats = {"u": u, "delta": delta, "D": D, "z": z, "delta_bias": delta_bias, "dt_proj": dt_proj}
    numbers = {"A": A, "B": B, "C": C, "state": state}
    expect_real("selective_scan_step", floats if A.is_complex() else floats | numbers)
    expect_number("selective_scan_step", numbers)
    (b, d), n = u.shape, A.shape[-1]
    rank = d if dt_proj is None else dt_proj.shape[-1]
    B, C = (m.unsqueeze(1) if m.dim() == 2 else m for m in (B, C))
    shapes = {"delta": (b, rank), "A": (d, n), "B": (b, B.shape[1], n), "C": (b, C.shape[1], n), "state": (b, d, n)}
    shapes |= {"D": (d,), "z": (b, d), "delta_bias": (d,), "dt_proj": (d, rank)}
    for name, x in (floats | numbers | {"B": B, "C": C}).items():
        if x is not None and name in shapes:
            expect("selective_scan_step", name, x, shapes[name])
    _expect_groups("selective_scan_step", B.shape[1], C.shape[1], d)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u_, delta, D, z, delta_bias, dt_proj = (cast(x, dtype) for x in (u, delta, D, z, delta_bias, dt_proj))
    A, B, C, state = (cast_number(x, dtype) for x in (A, B, C, state))

    if dt_proj is not None:  # not a matrix product: autocast would make it one in 16 bits
        delta = (delta.unsqueeze(1) * dt_proj).sum(-1)
    step = delta if delta_bias is None else delta + delta_bias
    step = torch.nn.functional.softplus(step) if delta_softplus else step
    B, C = (m.repeat_interleave(d // m.shape[1], dim=1) for m in (B, C))
    state = torch.exp(step.unsqueeze(-1) * A) * state + (step * u_).unsqueeze(-1) * B
    y = (C * state).sum(-1)
    y = 2 * y.real if A.is_complex() else y
    y = y if D is None else y + D * u_
    return cast(y if z is None else y * torch.nn.functional.silu(z), u.dtype), state


def _composite(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor] = None, z: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None, delta_softplus: bool = False, dt_proj: Optional[Tensor] = None,
    initial_state: Optional[Tensor] = None, reset: Optional[Tensor] = None, routes: Optional[Tensor] = None,
    merge: bool = True, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Canonical shapes and float32 in, the caller's shapes and dtype out."""
    floats = {"u": u, "delta": delta, "D": D, "z": z, "delta_bias": delta_bias, "dt_proj": dt_proj}
    numbers = {"A": A, "B": B, "C": C, "initial_state": initial_state}
    expect_real("selective_scan", floats if A.is_complex() else floats | numbers)
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    routed = A.dim() == 3
    x, delta, A, B, C, D, delta_bias, dt_proj, initial_state, reset = _canonical(
        u, delta, A, B, C, D, delta_bias, dt_proj, initial_state, reset
    )
    _check(x, delta, A, B, C, D, z, delta_bias, dt_proj, initial_state, reset, routes, merge)
    D, delta_bias, dt_proj = (cast(t, dtype) for t in (D, delta_bias, dt_proj))
    options = (reset, routes, delta_softplus, merge, backend)
    if A.is_complex():
        expect_number("selective_scan", numbers)
        A, B, C, initial_state = (cast_number(t, dtype) for t in (A, B, C, initial_state))
        y, last = complex_selective_scan(
            cast(x, dtype), cast(delta, dtype), A, B, C, D, delta_bias, dt_proj, initial_state, *options
        )
    else:
        y, last, _ = _backend.run(
            "selective_scan", cast_token(x, dtype), cast_token(delta, dtype), cast(A, dtype), cast_token(B, dtype),
            cast_token(C, dtype), D, delta_bias, dt_proj, cast(initial_state, dtype), *options,
        )  # fmt: skip
    if merge or not routed:
        y = y.squeeze(1)
    if z is not None:
        y = y * torch.nn.functional.silu(cast(z, dtype))
    return cast(y, u.dtype), last if routed else last.squeeze(1)


def _canonical(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], delta_bias: Optional[Tensor],
    dt_proj: Optional[Tensor], initial_state: Optional[Tensor], reset: Optional[Tensor],
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments with their route dimension, B and C also with those of groups and tokens."""
    if A.dim() != 3:  # one scan is k = 1
        delta, A = delta.unsqueeze(1), A.unsqueeze(0)
        B, C = (x.unsqueeze(0) if x.dim() == 2 else x.unsqueeze(1) for x in (B, C))
        D, delta_bias, dt_proj = (None if x is None else x.unsqueeze(0) for x in (D, delta_bias, dt_proj))
        initial_state = None if initial_state is None else initial_state.unsqueeze(1)
    u = u if u.dim() == 4 else u.unsqueeze(1)
    B, C = (_grouped(m, u) for m in (B, C))
    if reset is not None and reset.dim() == 2:
        reset = reset.unsqueeze(1)
    return u, delta, A, B, C, D, delta_bias, dt_proj, initial_state, reset


def _direct(
    backend: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], z: Optional[Tensor],
    delta_bias: Optional[Tensor], delta_softplus: bool, dt_proj: Optional[Tensor], initial_state: Optional[Tensor],
    reset: Optional[Tensor], routes: Optional[Tensor], merge: bool,
) -> Optional[tuple[Tensor, Tensor]]:  # fmt: skip
    """The whole operator past torch's dispatcher; None if the backend cannot run these tensors so."""
    gate = None if z is None else z.detach()  # only looked at, so that it fits
    args = (u, delta, A, B, C, D, gate, delta_bias, delta_softplus, dt_proj, initial_state, reset, routes, merge)
    if _backend.builds_graph(u, delta, A, B, C, D, delta_bias, dt_proj, initial_state):
        y, last = _Direct.apply(backend, *args)
    else:
        y, last, _ = backend.direct(*args, False)
    if y is None or z is None:
        return None if y is None else (y, last)
    return y * torch.nn.functional.silu(z), last


class _Direct(torch.autograd.Function):
    """What autograd knows of `_direct`, but for the gate."""

    @staticmethod
    def forward(ctx: Any, backend: Any, *args: Any) -> tuple[Optional[Tensor], Optional[Tensor]]:
        y, last, checkpoints = backend.direct(*args, True)
        u, delta, A, B, C, D, _, delta_bias, ctx.delta_softplus, dt_proj, initial_state, reset, routes, ctx.merge = args
        ctx.backend = backend
        ctx.save_for_backward(checkpoints, routes, u, delta, A, B, C, D, delta_bias, dt_proj, initial_state, reset)
        ctx.set_materialize_grads(False)
        return y, last

    @staticmethod
    def backward(ctx: Any, dy: Optional[Tensor], dlast: Optional[Tensor]) -> Any:
        checkpoints, routes, *given = ctx.saved_tensors
        tensors = _canonical(*given)
        u, _, A, *_ = tensors
        if dy is None:
            dy = u.new_zeros(u.shape[0], 1 if ctx.merge else A.shape[0], *u.shape[2:])
        dy = dy if dy.dim() == 4 else dy.unsqueeze(1)
        dlast = dlast if dlast is None or dlast.dim() == 4 else dlast.unsqueeze(1)
        arguments = (*tensors, routes, ctx.delta_softplus, ctx.merge)
        if torch.is_grad_enabled():  # create_graph=True: the reference adjoint is itself differentiable
            with no_autocast(dy):
                found = reference.adjoint(dy, dlast, *arguments)
        else:
            found = ctx.backend.backward(dy, dlast, checkpoints, *arguments)
        du, ddelta, dA, dB, dC, dD, dbias, dproj, dinitial = map(_restored, found, given[:9])
        return None, du, ddelta, dA, dB, dC, dD, None, dbias, None, dproj, dinitial, None, None, None


def _restored(gradient: Optional[Tensor], x: Optional[Tensor]) -> Optional[Tensor]:
    """The gradient of a canonical tensor as that of `x`, from which it was made."""
    if gradient is None or x is None:
        return None
    if gradient.numel() != x.numel():  # B or C per channel
        gradient = gradient.sum((0, 4))
    return gradient.reshape(x.shape)


def _grouped(m: Tensor, u: Tensor) -> Tensor:
    """B or C as (b, k, g, n, l)."""
    if m.dim() == 3:  # (k, d, n): the same at every token, one group per channel
        return m[None, ..., None].expand(u.shape[0], -1, -1, -1, u.shape[-1])
    return m.unsqueeze(2) if m.dim() == 4 else m


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], z: Optional[Tensor],
    delta_bias: Optional[Tensor], dt_proj: Optional[Tensor], initial_state: Optional[Tensor], reset: Optional[Tensor],
    routes: Optional[Tensor], merge: bool,
) -> None:  # fmt: skip
    (b, ku, _, length), (k, d, n) = u.shape, A.shape
    rank = d if dt_proj is None else dt_proj.shape[-1]
    for name, x, shape in (
        ("u", u, (b, 1 if ku == 1 else k, d, length)),
        ("delta", delta, (b, k, rank, length)),
        ("B", B, (b, k, B.shape[2], n, length)),
        ("C", C, (b, k, C.shape[2], n, length)),
        ("D", D, (k, d)),
        ("z", z, (b, d, length)),
        ("delta_bias", delta_bias, (k, d)),
        ("dt_proj", dt_proj, (k, d, rank)),
        ("initial_state", initial_state, (b, k, d, n)),
    ):
        if x is not None:
            expect("selective_scan", name, x, shape)
    _expect_groups("selective_scan", B.shape[2], C.shape[2], d)
    expect_reset("selective_scan", reset, (b, 1 if reset is None or reset.shape[1] == 1 else k, length))
    expect_routes("selective_scan", routes, (k, None if routes is None else routes.shape[-1]))
    if z is not None and not merge:
        raise RuntimeError("selective_scan: a gate z needs merge=True")


def _expect_groups(operator: str, of_B: int, of_C: int, d: int) -> None:
    if d % of_B or d % of_C:
        raise RuntimeError(f"{operator}: the groups of B ({of_B}) and C ({of_C}) must divide {d} channels")


def _allocate(u: Tensor, A: Tensor, routes: Optional[Tensor], merge: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized y, last state and checkpoints. Backends and fake tensors share these layouts."""
    (b, _, d, length), (k, _, n) = u.shape, A.shape
    steps = length if routes is None else routes.shape[1]
    y = empty_like_layout(u, (b, 1 if merge else k, d, length), A.dtype)
    last = A.new_empty(b, k, n, d).transpose(-1, -2)
    return y, last, A.new_empty(b, k, (steps + CHUNK - 1) // CHUNK, n, d)


def _forward(u: Tensor, delta: Tensor, A: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = args
    out = _allocate(u, A, routes=args[7], merge=args[9])
    _backend.choose("selective_scan", backend, u).forward(u, delta, A, *rest, out=out)
    return out


def _forward_fake(u: Tensor, delta: Tensor, A: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(u, A, routes=args[7], merge=args[9])


def _allocate_grads(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], delta_bias: Optional[Tensor],
    dt_proj: Optional[Tensor], initial_state: Optional[Tensor],
) -> list[Tensor]:  # fmt: skip
    """Uninitialized gradients in the layouts in which kernels produce them; empty ones for absent inputs."""

    def transposed(x: Tensor) -> Tensor:
        return x.new_empty(*x.shape[:-2], x.shape[-1], x.shape[-2]).transpose(-1, -2)

    grads = [empty_like_layout(u, u.shape), empty_like_layout(delta, delta.shape), *map(transposed, (A, B, C))]
    grads += [u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (D, delta_bias, dt_proj)]
    return [*grads, u.new_empty(0) if initial_state is None else transposed(initial_state)]


def _backward(dy: Tensor, dlast: Optional[Tensor], checkpoints: Tensor, u: Tensor, *args: Any) -> list[Tensor]:
    *rest, backend = args
    grads = _allocate_grads(u, *rest[:8])
    found = _backend.choose("selective_scan", backend, u).backward(dy, dlast, checkpoints, u, *rest)
    return settle(grads, found, given=(dy, dlast))


def _backward_fake(dy: Tensor, dlast: Optional[Tensor], checkpoints: Tensor, *args: Any) -> list[Tensor]:
    return _allocate_grads(*args[:9])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.delta_softplus, ctx.merge, ctx.backend = inputs
    ctx.save_for_backward(output[2], *tensors)


def _autograd(ctx: Any, dy: Tensor, dlast: Optional[Tensor], _: Optional[Tensor]) -> Gradients:
    saved: Any = ctx.saved_tensors
    checkpoints, tensors = saved[0], saved[1:]
    if torch.is_grad_enabled():  # create_graph=True: the reference adjoint is itself differentiable
        with no_autocast(dy):
            grads = reference.adjoint(dy, dlast, *(*tensors, ctx.delta_softplus, ctx.merge))
    else:
        found = torch.ops.ssmvision.selective_scan_backward(
            dy, dlast, checkpoints, *tensors, ctx.delta_softplus, ctx.merge, ctx.backend
        )
        grads = tuple(None if x is None else g for x, g in zip(tensors[:9], found, strict=True))
    return (*grads, None, None, None, None, None)


_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor? dt_proj, "
    "Tensor? initial_state, Tensor? reset, Tensor? routes, bool delta_softplus, bool merge, str backend"
)
register(
    "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
    "Tensor? delta_bias=None, bool delta_softplus=False, Tensor? dt_proj=None, Tensor? initial_state=None, "
    "Tensor? reset=None, Tensor? routes=None, bool merge=True, str backend='auto') -> (Tensor, Tensor)",
    _composite,
    Kernel(f"selective_scan_forward({_TENSORS}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake),
    Kernel(
        f"selective_scan_backward(Tensor dy, Tensor? dlast, Tensor checkpoints, {_TENSORS}) -> Tensor[]",
        _backward,
        _backward_fake,
    ),
    _autograd,
    _setup_context,
)
