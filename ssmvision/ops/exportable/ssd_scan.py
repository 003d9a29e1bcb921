"""`ssd_scan` as a loop of standard operators. Letters: b batch, h head, p head channel, n state, l token."""

import torch
from torch import Tensor

from ._loop import loop


def forward(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor, None]:
    """What `reference.ssd_scan.definition` computes; decays must not overflow, as with A < 0 they cannot."""
    b, _, h, p = x.shape
    x, B, C = (m.to(step.dtype) for m in (x, B, C))
    B, C = (m.repeat_interleave(h // m.shape[2], dim=2) for m in (B, C))
    decay = torch.exp(step * A)
    if reset is not None:
        decay = decay.masked_fill(reset.unsqueeze(-1), 0)

    def advance(s: Tensor, decay: Tensor, x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        s = decay[..., None, None] * s + x.unsqueeze(-1) * B.unsqueeze(-2)
        return s, (s * C.unsqueeze(-2)).sum(-1)

    start = step.new_zeros(b, h, p, B.shape[-1]) if initial_state is None else initial_state
    inputs = [decay, step.unsqueeze(-1) * x, B, C]
    y, last = loop(advance, start, [m.transpose(0, 1) for m in inputs])
    return y.transpose(0, 1), last, None
