"""UPerNet: a pyramid of pooled contexts and a feature pyramid over any hierarchical backbone.

Paper: `Unified Perceptual Parsing for Scene Understanding` - https://arxiv.org/abs/1807.10221
The pooled contexts are those of PSPNet (arXiv:1612.01105), the feature pyramid that of FPN (arXiv:1612.03144).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.models._networks import NetworkCfg
from ssmvision.segmentation._pyramids import PyramidNetwork, register_over_encoders

__all__ = ["UPerNet"]


class ConvNormReLU(nn.Sequential):
    """Convolution, batch norm and ReLU: (b, in_channels, h, w) → (b, channels, h, w)."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels), nn.ReLU())


class PooledContexts(nn.Module):
    """Means over ever smaller parts of a map beside the map itself: (b, in_channels, h, w) → (b, channels, h, w).

    Args:
        in_channels: Input channels.
        channels: Output channels, and those of each mean.
        scales: Into how many parts each axis is cut.
    """

    def __init__(self, in_channels: int, channels: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.contexts = nn.ModuleList(ConvNormReLU(in_channels, channels, 1) for _ in self.scales)
        self.fuse = ConvNormReLU(in_channels + len(self.scales) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) → (b, channels, h, w)."""
        means = [
            _resized(context(F.adaptive_avg_pool2d(x, scale)), x)
            for scale, context in zip(self.scales, self.contexts, strict=True)
        ]
        return self.fuse(torch.cat([x, *means], dim=1))


class UPerNet(PyramidNetwork):
    """UPerNet (figure 4, its head for one segmentation task) over a backbone.

    Logits (b, out_channels, h, w) for images (b, in_channels, h, w) of any size: zeros fill them up to the stride.

    Args:
        spatial_dims: 2.
        in_channels: Input channels.
        out_channels: Classes, the background included.
        encoder: Name of a hierarchical backbone of this package or of timm.
        channels: Channels of every level of the decoder.
        scales: Into how many parts the pooled contexts cut each axis of the coarsest map.
        dropout: Rate of dropout of whole channels before the logits.
        encoder_kwargs: Further arguments of the backbone, such as `pretrained=True`.

    Raises:
        ValueError: Unknown encoders, such as have no pyramid of maps; wrong inputs, such as a single image in training,
            which leaves batch norm one value per channel of the whole map's mean.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 2,
        encoder: str = "vmamba_tiny_s1l8",
        channels: int = 512,
        scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        encoder_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(spatial_dims, in_channels, out_channels, encoder, encoder_kwargs)
        *finer, coarsest = self.widths
        self.laterals = nn.ModuleList(ConvNormReLU(width, channels, 1) for width in finer)
        self.contexts = PooledContexts(coarsest, channels, scales)
        self.smooths = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in finer)
        self.fuse = ConvNormReLU(len(self.widths) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(channels, out_channels, 1)

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Maps, finest first → logits (b, out_channels, h, w)."""
        if self.training and len(maps[0]) == 1:
            raise ValueError("UPerNet normalizes over the batch: it trains on two images or more at a time, not on 1")
        levels = [self.contexts(maps[-1])]
        for lateral, finer in zip(reversed(self.laterals), maps[-2::-1], strict=True):
            finer = lateral(finer)
            levels.append(finer + _resized(levels[-1], finer))
        *levels, finest = [levels[0], *(smooth(x) for smooth, x in zip(self.smooths, levels[1:], strict=True))]
        fused = self.fuse(torch.cat([finest, *(_resized(level, finest) for level in reversed(levels))], dim=1))
        logits = self.head(self.dropout(fused))
        return F.interpolate(logits, scale_factor=float(self.reductions[0]), mode="bilinear")


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear")


_CFG = NetworkCfg(
    paper_name="Unified Perceptual Parsing for Scene Understanding",
    paper_ids="arXiv:1807.10221",
    origin_url="https://arxiv.org/abs/1807.10221",
    license="Apache-2.0",
)

register_over_encoders("upernet", "UPerNet", UPerNet, _CFG, channels=16)
