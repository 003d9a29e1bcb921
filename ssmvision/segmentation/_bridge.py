"""The attention over skips that UltraLight VM-UNet and H-vmunet share (from MALUNet, arXiv:2211.01784)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Bridge"]


class SpatialAttention(nn.Module):
    """How much every pixel counts, from its mean and largest channel: (b, c, h, w) → (b, 1, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_conv2d = nn.Sequential(nn.Conv2d(2, 1, 7, padding=9, dilation=3), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, 1, h, w)."""
        return self.shared_conv2d(torch.cat([x.mean(1, True), x.amax(1, True)], dim=1))


class ChannelAttention(nn.Module):
    """How much every channel of every level counts, from the means of all channels of all levels.

    Args:
        dims: Channels of each level.
        split_att: "fc", a linear map for each level, or "conv", a convolution of width 1.
    """

    def __init__(self, dims: Sequence[int], split_att: str = "fc") -> None:
        super().__init__()
        if split_att not in ("fc", "conv"):
            raise ValueError(f"split_att must be 'fc' or 'conv', not {split_att!r}")
        self.get_all_att = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.split_att = split_att
        total = sum(dims)
        self.att = nn.ModuleList(
            nn.Linear(total, dim) if split_att == "fc" else nn.Conv1d(total, dim, 1) for dim in dims
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps (b, c_i, h_i, w_i) → (b, c_i, 1, 1) each."""
        means = torch.cat([level.mean((2, 3)) for level in levels], dim=1)
        means = self.get_all_att(means.unsqueeze(1)).squeeze(1)
        if self.split_att == "conv":
            return [att(means.unsqueeze(-1)).sigmoid().unsqueeze(-1) for att in self.att]
        return [att(means).sigmoid()[..., None, None] for att in self.att]


class Bridge(nn.Module):
    """Skips weighted by pixel plus themselves, weighted by channel, plus what was weighted by pixel alone.

    Args:
        dims: Channels of each level.
        split_att: See `ChannelAttention`.
    """

    def __init__(self, dims: Sequence[int], split_att: str = "fc") -> None:
        super().__init__()
        self.satt = SpatialAttention()
        self.catt = ChannelAttention(dims, split_att)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps (b, c_i, h_i, w_i) → the same shapes."""
        by_pixel = [self.satt(level) * level for level in levels]
        levels = [level + weighted for level, weighted in zip(levels, by_pixel, strict=True)]
        by_channel = [weight * level for level, weight in zip(levels, self.catt(levels), strict=True)]
        return [weighted + shortcut for weighted, shortcut in zip(by_channel, by_pixel, strict=True)]
