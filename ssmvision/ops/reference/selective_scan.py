"""What `selective_scan` means, in plain PyTorch: sequential, differentiable, float64-capable."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import CHUNK, Gradients, in_float32, no_autocast
from ._routes import along_routes, back_to_tokens, stack


def definition(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    dt_proj: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, routes: Tensor | None,
    delta_softplus: bool, merge: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """S6 along every route (Mamba, arXiv:2312.00752, section 3.2 and algorithm 2).

        delta_t = softplus(delta_t + delta_bias)
        h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t        (h_{t-1} = 0 where reset)
        y_t     = C_t h_t + D u_t

    Shapes: u (b, 1|k, d, l), delta (b, k, d, l) or, with dt_proj (k, d, r), (b, k, r, l); A (k, d, n);
    B and C (b, k, g, n, l); D and delta_bias (k, d); initial_state (b, k, d, n); reset (b, 1|k, l); routes (k, t).

    Returns:
        y (b, 1|k, d, l), summed over routes if `merge`; the last state (b, k, d, n); the state before each step
        (t, b, k, d, n).
    """
    k, d, n = A.shape
    raw = _project(delta, dt_proj, delta_bias)
    step = along_routes(F.softplus(raw) if delta_softplus else raw, k, routes)  # (b, k, d, t)
    u_t, B_t, C_t = (along_routes(x, k, routes) for x in (u, _per_channel(B, d), _per_channel(C, d)))
    h = u.new_zeros(u.shape[0], k, d, n) if initial_state is None else initial_state
    before, after = [], []
    # unbind, not indexing: the backward pass of x[..., t] fills a zero tensor of full length at each of the t steps.
    decay = _decay(step, A, reset, routes, from_zero=initial_state is None).unbind(-1)
    drive = ((step * u_t).unsqueeze(3) * B_t).unbind(-1)
    for decay_t, drive_t in zip(decay, drive, strict=True):
        before.append(h)
        h = decay_t * h + drive_t
        after.append(h)
    y = torch.einsum("tbkdn,bkdnt->bkdt", stack(after, h), C_t)
    if D is not None:
        y = y + D[..., None] * u_t
    y = back_to_tokens(y, routes, u.shape[-1])
    return y.sum(1, keepdim=True) if merge else y, h, stack(before, h)


def adjoint(
    dy: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    delta_bias: Tensor | None, dt_proj: Tensor | None, initial_state: Tensor | None, reset: Tensor | None,
    routes: Tensor | None, delta_softplus: bool, merge: bool,
) -> Gradients:  # fmt: skip
    """The adjoint of `definition`, itself differentiable.

    Returns:
        Gradients of u, delta, A, B, C, D, delta_bias, dt_proj and initial_state; None where the input is None.
    """
    k, d, _ = A.shape
    tokens = u.shape[-1]
    _, h, before = definition(
        u, delta, A, B, C, D, delta_bias, dt_proj, initial_state, reset, routes, delta_softplus, merge
    )
    raw = _project(delta, dt_proj, delta_bias)
    step = along_routes(F.softplus(raw) if delta_softplus else raw, k, routes)
    u_t, B_t, C_t, dy_t = (along_routes(x, k, routes) for x in (u, _per_channel(B, d), _per_channel(C, d), dy))
    decay = _decay(step, A, reset, routes, from_zero=initial_state is None)

    dh = torch.zeros_like(h) if dlast is None else dlast
    grads = []  # d loss / d h_t, last step first
    for decay_t, dy_s, C_s in zip(*(reversed(x.unbind(-1)) for x in (decay, dy_t, C_t)), strict=True):
        grads.append(dh + dy_s.unsqueeze(-1) * C_s)
        dh = grads[-1] * decay_t
    grad = stack(grads[::-1], h).movedim(0, -1)  # (b, k, d, n, t)
    before = before.movedim(0, -1)
    drive = (step * u_t).unsqueeze(3)
    after = decay * before + drive * B_t

    ddecay = grad * decay * before  # d loss / d (step * A)
    dx = (grad * B_t).sum(3)  # d loss / d (step * u)
    draw = back_to_tokens((ddecay * A[..., None]).sum(3) + dx * u_t, routes, tokens)
    if delta_softplus:
        draw = draw * torch.sigmoid(raw)
    du = dx * step if D is None else dx * step + D[..., None] * dy_t
    du = back_to_tokens(du, routes, tokens)
    dB = back_to_tokens(_per_group(grad * drive, B.shape[2]), routes, tokens)
    dC = back_to_tokens(_per_group(dy_t.unsqueeze(3) * after, C.shape[2]), routes, tokens)
    return (
        du.sum(1, keepdim=True) if u.shape[1] == 1 else du,
        draw if dt_proj is None else torch.einsum("bkdl,kdr->bkrl", draw, dt_proj),
        (ddecay * step.unsqueeze(3)).sum((0, -1)),
        dB,
        dC,
        None if D is None else (dy_t * u_t).sum((0, -1)),
        None if delta_bias is None else draw.sum((0, -1)),
        None if dt_proj is None else torch.einsum("bkdl,bkrl->kdr", draw, delta),
        None if initial_state is None else dh,
    )


def _project(delta: Tensor, dt_proj: Tensor | None, delta_bias: Tensor | None) -> Tensor:
    if dt_proj is not None:
        delta = torch.einsum("bkrl,kdr->bkdl", delta, dt_proj)
    return delta if delta_bias is None else delta + delta_bias[..., None]


def _decay(step: Tensor, A: Tensor, reset: Tensor | None, routes: Tensor | None, from_zero: bool) -> Tensor:
    """exp(step A), and exactly 0 where the state before is: (b, k, d, n, t)."""
    exponent = step.unsqueeze(3) * A[..., None]
    cut = torch.zeros(1, 1, 1, 1, step.shape[-1], dtype=torch.bool, device=step.device)
    if reset is not None:
        cut = along_routes(reset, A.shape[0], routes)[:, :, None, None]
    if from_zero:
        cut = cut | (torch.arange(step.shape[-1], device=step.device) == 0)
    # Masked before and after: a decay that overflows must not meet the zero state, neither here nor in its gradient.
    return torch.exp(exponent.masked_fill(cut, 0)).masked_fill(cut, 0)


def _per_channel(x: Tensor, channels: int) -> Tensor:
    return x.repeat_interleave(channels // x.shape[2], dim=2)  # (b, k, g, n, l) -> (b, k, d, n, l)


def _per_group(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(2, (groups, -1)).sum(3)


def forward(*args: Any, out: Sequence[Tensor]) -> None:
    """Fill `out` = (y, last state, checkpoints: the state before every CHUNK-th step)."""
    y, last, checkpoints = out
    with no_autocast(y):
        y_ref, last_ref, before = definition(*in_float32(args))
    y.copy_(y_ref)
    last.copy_(last_ref)
    checkpoints.copy_(before[::CHUNK].permute(1, 2, 0, 4, 3))


def backward(dy: Tensor, dlast: Tensor | None, checkpoints: Tensor, *args: Any) -> Gradients:
    """Gradients as `adjoint` returns them."""
    with no_autocast(dy):
        return adjoint(dy, dlast, *in_float32(args))
