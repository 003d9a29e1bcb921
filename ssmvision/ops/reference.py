"""What the operators mean, in plain PyTorch: sequential, differentiable, float64-capable.

Every backend is tested against this file, and it is what runs where no faster backend can.

Letters: b batch, k route, d channel, n state, g group of channels, l token, t step along a route, r rank of delta.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
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
    y = torch.einsum("tbkdn,bkdnt->bkdt", _stack(after, h), C_t)
    if D is not None:
        y = y + D[..., None] * u_t
    y = back_to_tokens(y, routes, u.shape[-1])
    return y.sum(1, keepdim=True) if merge else y, h, _stack(before, h)


def selective_scan_backward(
    dy: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    delta_bias: Tensor | None, dt_proj: Tensor | None, initial_state: Tensor | None, reset: Tensor | None,
    routes: Tensor | None, delta_softplus: bool, merge: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The adjoint of `selective_scan`, itself differentiable.

    Returns:
        Gradients of u, delta, A, B, C, D, delta_bias, dt_proj and initial_state; None where the input is None.
    """
    k, d, _ = A.shape
    tokens = u.shape[-1]
    _, h, before = selective_scan(
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
    grad = _stack(grads[::-1], h).movedim(0, -1)  # (b, k, d, n, t)
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


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, silu: bool) -> Tensor:
    """Depthwise causal convolution along every route (Mamba, arXiv:2312.00752, figure 3).

    Shapes: x (b, 1, d, l), weight (k, d, w), bias (k, d), routes (k, l). Returns (b, k, d, l).
    """
    y = _convolve(_windows(x, weight, routes), weight, bias)
    return back_to_tokens(F.silu(y) if silu else y, routes, x.shape[-1])


def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of `causal_conv1d`, itself differentiable: gradients of x, weight and bias."""
    k, _, width = weight.shape
    tokens = x.shape[-1]
    windows = _windows(x, weight, routes)
    grad = along_routes(dy, k, routes)
    if silu:
        y = _convolve(windows, weight, bias)
        gate = torch.sigmoid(y)
        grad = grad * gate * (1 + y * (1 - gate))
    dwindows = grad.unsqueeze(-1) * weight[:, :, None]
    dx = torch.stack([F.pad(dwindows[..., j], (j, width - 1 - j)) for j in range(width)]).sum(0)
    dx = back_to_tokens(dx[..., width - 1 :], routes, tokens).sum(1, keepdim=True)
    return dx, (grad.unsqueeze(-1) * windows).sum((0, 3)), grad.sum((0, 3))


def _windows(x: Tensor, weight: Tensor, routes: Tensor | None) -> Tensor:
    """What the kernel sees at each step: (b, k, d, l, w)."""
    ordered = along_routes(x, weight.shape[0], routes)
    return F.pad(ordered, (weight.shape[-1] - 1, 0)).unfold(-1, weight.shape[-1], 1)


def _convolve(windows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = (windows * weight[:, :, None]).sum(-1)
    return y if bias is None else y + bias[..., None]


def along_routes(x: Tensor, k: int, routes: Tensor | None) -> Tensor:
    """Tokens (b, 1|k, ..., l) in the order in which each route visits them: (b, k, ..., t)."""
    x = x.expand(-1, k, *x.shape[2:])
    if routes is None:
        return x
    index = routes.view(1, k, *[1] * (x.dim() - 3), -1)
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


def back_to_tokens(y: Tensor, routes: Tensor | None, tokens: int) -> Tensor:
    """The inverse of `along_routes` for (b, k, ..., t); tokens that a route does not visit get zero."""
    if routes is None:
        return y
    index = routes.view(1, routes.shape[0], *[1] * (y.dim() - 3), -1)
    return y.new_zeros(*y.shape[:-1], tokens).scatter(-1, index.expand_as(y), y)


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


def _stack(states: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(states) if states else like.new_empty(0, *like.shape)
