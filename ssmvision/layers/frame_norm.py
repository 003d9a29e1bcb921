"""Normalization of many small pictures."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.ops import frame_norm

__all__ = ["FrameLayerNorm", "FrameNorm"]


class FrameNorm(nn.GroupNorm):
    """nn.GroupNorm and an activation, in one operator.

    Args:
        num_groups: Groups of channels.
        num_channels: Channels.
        activation: "none", "gelu" (its tanh form), "relu", "silu" or "elu".
        **kwargs: eps, device and dtype of nn.GroupNorm.
    """

    def __init__(self, num_groups: int, num_channels: int, activation: str = "none", **kwargs: Any) -> None:
        super().__init__(num_groups, num_channels, **kwargs)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → the same."""
        return frame_norm(x, self.weight, self.bias, self.num_groups, self.eps, self.activation)


class FrameLayerNorm(nn.LayerNorm):
    """Normalization of each pixel's channels, as timm's LayerNorm2d: a frame of a stream feels every check of that."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → the same."""
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)
