"""`linear_scan` as a loop of standard operators. Letters: b batch, l step, p and q state."""

import torch
from torch import Tensor

from ._loop import loop


def forward(
    a: Tensor, x: Tensor, initial_state: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What `reference.linear_scan.definition` computes for finite decays."""
    b, length, p, q = x.shape
    x = x.to(a.dtype)
    a = a.expand(b, length, *a.shape[2:])
    if reset is not None:
        a = a.masked_fill(reset[..., None, None], 0)
    inputs = [m.flip(1) if reverse else m for m in (a, x)]
    start = x.new_zeros(b, p, q) if initial_state is None else initial_state
    h, last = _complex_loop(start, *inputs) if a.is_complex() else _loop(start, *inputs)
    return h.flip(1) if reverse else h, last


def _loop(start: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    def advance(h: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = a * h + x
        return h, h

    h, last = loop(advance, start, [a.transpose(0, 1), x.transpose(0, 1)])
    return h.transpose(0, 1), last


def _complex_loop(start: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same of pairs of real numbers: the loop knows no complex ones."""

    def advance(h: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        turned = torch.stack([-h[..., 1], h[..., 0]], dim=-1)  # i h
        h = a[..., :1] * h + a[..., 1:] * turned + x
        return h, h

    pairs = [torch.view_as_real(m.resolve_conj()) for m in (start, a, x)]
    h, last = loop(advance, pairs[0], [m.transpose(0, 1) for m in pairs[1:]])
    return torch.view_as_complex(h.transpose(0, 1).contiguous()), torch.view_as_complex(last.contiguous())
