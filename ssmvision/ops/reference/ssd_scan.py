"""What `ssd_scan` means, in plain PyTorch: sequential, differentiable, float64-capable.

Letters: b batch, h head, p head channel, n state, g group of heads, l token (and step).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._library import CHUNK, Gradients, in_float32, no_autocast
from ._routes import stack


def definition(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The state space dual recurrence (Mamba-2, arXiv:2405.21060, section 2.1, with A a multiple of the identity).

        s_t = exp(step_t A) s_{t-1} + step_t x_t B_t^T        (s_{t-1} = 0 where reset)
        y_t = s_t C_t

    Shapes: x (b, l, h, p), step (b, l, h), A (h,), B and C (b, l, g, n), initial_state (b, h, p, n), reset (b, l).

    Returns:
        y (b, l, h, p); the last state (b, h, p, n); the state before each step (l, b, h, p, n).
    """
    b, _, h, p = x.shape
    B_t, C_t = (_per_head(m, h) for m in (B, C))
    state = x.new_zeros(b, h, p, B.shape[-1]) if initial_state is None else initial_state
    before, after = [], []
    # unbind, not indexing: the backward pass of x[:, t] fills a zero tensor of full length at each of the steps.
    decay = _decay(step, A, reset, from_zero=initial_state is None)[..., None, None].unbind(1)
    drive = ((step[..., None] * x).unsqueeze(-1) * B_t.unsqueeze(-2)).unbind(1)
    for decay_t, drive_t in zip(decay, drive, strict=True):
        before.append(state)
        state = decay_t * state + drive_t
        after.append(state)
    y = torch.einsum("lbhpn,blhn->blhp", stack(after, state), C_t)
    return y, state, stack(before, state)


def adjoint(
    dy: Tensor, dlast: Tensor | None, x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor,
    initial_state: Tensor | None, reset: Tensor | None,
) -> Gradients:  # fmt: skip
    """The adjoint of `definition`, itself differentiable.

    Returns:
        Gradients of x, step, A, B, C and initial_state; None where the input is None.
    """
    h = x.shape[2]
    _, state, before = definition(x, step, A, B, C, initial_state, reset)
    B_t, C_t = (_per_head(m, h) for m in (B, C))
    decay = _decay(step, A, reset, from_zero=initial_state is None)[..., None, None]

    dstate = torch.zeros_like(state) if dlast is None else dlast
    grads = []  # d loss / d s_t, last step first
    for decay_t, dy_t, C_s in zip(*(reversed(m.unbind(1)) for m in (decay, dy, C_t)), strict=True):
        grads.append(dstate + dy_t.unsqueeze(-1) * C_s.unsqueeze(-2))
        dstate = grads[-1] * decay_t
    grad = stack(grads[::-1], state).movedim(0, 1)  # (b, l, h, p, n)
    before = before.movedim(0, 1)
    drive = step[..., None] * x
    after = decay * before + drive.unsqueeze(-1) * B_t.unsqueeze(-2)

    dexponent = (grad * decay * before).sum((-2, -1))  # d loss / d (step * A)
    ddrive = (grad * B_t.unsqueeze(-2)).sum(-1)
    return (
        ddrive * step[..., None],
        dexponent * A + (ddrive * x).sum(-1),
        (dexponent * step).sum((0, 1)),
        _per_group((grad * drive.unsqueeze(-1)).sum(-2), B.shape[2]),
        _per_group((dy.unsqueeze(-1) * after).sum(-2), C.shape[2]),
        None if initial_state is None else dstate,
    )


def _decay(step: Tensor, A: Tensor, reset: Tensor | None, from_zero: bool) -> Tensor:
    """exp(step A), and exactly 0 where the state before is: (b, l, h)."""
    cut = torch.zeros(1, step.shape[1], 1, dtype=torch.bool, device=step.device)
    if reset is not None:
        cut = reset.unsqueeze(-1)
    if from_zero:
        cut = cut | (torch.arange(step.shape[1], device=step.device) == 0).unsqueeze(-1)
    # Masked before and after: a decay that overflows must not meet the zero state, neither here nor in its gradient.
    return torch.exp((step * A).masked_fill(cut, 0)).masked_fill(cut, 0)


def _per_head(m: Tensor, heads: int) -> Tensor:
    return m.repeat_interleave(heads // m.shape[2], dim=2)  # (b, l, g, n) -> (b, l, h, n)


def _per_group(m: Tensor, groups: int) -> Tensor:
    return m.unflatten(2, (groups, -1)).sum(3)


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
