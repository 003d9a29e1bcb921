"""What `convs5_step` means, in torch's own operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import frame_norm


def definition(
    u: Tensor, state: Tensor, A: Tensor, B: Tensor, C: Tensor, feedthrough: tuple[Tensor, ...], groups: int, eps: float,
    activation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Shapes as in `ops.convs5_step`."""
    driven = _conv(u, B).permute(0, 2, 3, 1).to(A.real.dtype).contiguous()
    x = A * state.permute(0, 2, 3, 1) + torch.view_as_complex(driven.unflatten(-1, (-1, 2)))
    y = _conv(torch.view_as_real(x).flatten(-2).permute(0, 3, 1, 2).to(u.dtype), C)
    state = x.permute(0, 3, 1, 2)
    if not feedthrough:
        return y, state
    z = y
    for norm_weight, norm_bias, weight, bias in (feedthrough[:4], feedthrough[4:]):
        z = _conv(frame_norm.definition(z, norm_weight, norm_bias, groups, eps, activation), weight, bias)
    return frame_norm.activate(y + z, activation), state


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x, weight.permute(3, 2, 0, 1).to(x.dtype), bias, padding="same")
