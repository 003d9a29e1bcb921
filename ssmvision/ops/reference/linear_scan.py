"""What `linear_scan` means, in plain PyTorch: sequential, differentiable, float64-capable."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._library import Gradients, in_float32, no_autocast
from ._routes import stack


def definition(
    a: Tensor, x: Tensor, initial_state: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The linear recurrence h_t = a_t h_{t-1} + x_t, with h_{t-1} = 0 where reset; from last to first if `reverse`.

    Shapes: a (b|1, l|1, p, q|1), x (b, l, p, q), initial_state (b, p, q), reset (b, l).

    Returns:
        h (b, l, p, q) and the state after the last step that is visited, (b, p, q).
    """
    cut = _cuts(x, initial_state, reset, reverse)
    state = x.new_zeros(x.shape[0], *x.shape[2:]) if initial_state is None else initial_state
    states = []
    for a_t, x_t, cut_t in _steps(reverse, _decay(a, cut), x, cut):
        state = a_t * state.masked_fill(cut_t, 0) + x_t
        states.append(state)
    return _in_order(states, state, reverse), state


def adjoint(
    dh: Tensor, dlast: Tensor | None, h: Tensor, a: Tensor, initial_state: Tensor | None, reset: Tensor | None,
    reverse: bool,
) -> Gradients:  # fmt: skip
    """The adjoint of `definition`, itself differentiable, also through h.

    Returns:
        Gradients of a, x and initial_state (None if that is), by torch's convention: conjugate for complex numbers.
    """
    cut = _cuts(h, initial_state, reset, reverse)
    start = h.new_zeros(h.shape[0], *h.shape[2:]) if initial_state is None else initial_state
    carried = torch.zeros_like(start) if dlast is None else dlast.clone()
    grads = []  # d loss / d h_t, last visited step first
    # conj_physical, not conj: compiled graphs call operators where lazy conjugation is not resolved.
    for a_t, dh_t, cut_t in _steps(not reverse, _decay(a, cut).conj_physical(), dh, cut):
        grads.append(dh_t + carried)
        carried = a_t * grads[-1].masked_fill(cut_t, 0)
    dx = _in_order(grads, start, not reverse)
    first = start.unsqueeze(1)
    before = torch.cat([h, first], 1)[:, 1:] if reverse else torch.cat([first, h], 1)[:, :-1]
    da = (dx.masked_fill(cut, 0) * before.masked_fill(cut, 0).conj_physical()).sum_to_size(a.shape)
    return da, dx, None if initial_state is None else carried


def _cuts(x: Tensor, initial_state: Tensor | None, reset: Tensor | None, reverse: bool) -> Tensor:
    """Where no state comes in, so that not even an infinite decay counts: at resets and at a start from nothing."""
    b, length = x.shape[:2]
    cut = torch.zeros(b, length, dtype=torch.bool, device=x.device) if reset is None else reset
    if initial_state is None:
        cut = cut | (torch.arange(length, device=x.device) == (length - 1 if reverse else 0))
    return cut[..., None, None]


def _decay(a: Tensor, cut: Tensor) -> Tensor:
    return a.expand(*cut.shape[:2], *a.shape[2:]).masked_fill(cut, 0)


def _steps(reverse: bool, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    # unbind, not indexing: the backward pass of x[:, t] fills a zero tensor of full length at each of the l steps.
    steps = list(zip(*(x.unbind(1) for x in tensors), strict=True))
    return reversed(steps) if reverse else iter(steps)


def _in_order(visited: list[Tensor], like: Tensor, reverse: bool) -> Tensor:
    return stack(visited[::-1] if reverse else visited, like).movedim(0, 1)


def forward(*args: Any, out: Sequence[Tensor]) -> None:
    """Fill `out` = (h, last state)."""
    h, last = out
    with no_autocast(h):
        found = definition(*in_float32(args))
    h.copy_(found[0])
    last.copy_(found[1])


def backward(dh: Tensor, *args: Any) -> Gradients:
    """Gradients as `adjoint` returns them."""
    with no_autocast(dh):
        return adjoint(dh, *args)
