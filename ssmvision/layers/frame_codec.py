"""The convolutional encoder and decoder between frames and the latents of a video predictor (ConvS5, arXiv:2310.19694).

Letters: n pictures, h height, w width.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ssmvision.layers.frame_norm import FrameNorm

__all__ = ["GROUPS", "FrameDecoder", "FrameEncoder"]

GROUPS = 32  # of every norm but the last


class ResBlock(nn.Module):
    """x + conv(elu(norm(conv(elu(norm(x)))))) / 10, with a 1 x 1 convolution of x where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(GROUPS, in_channels, "elu", eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = FrameNorm(GROUPS, out_channels, "elu", eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) → (n, out_channels, h, w)."""
        y = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return self.skip(x) + 0.1 * y


class FrameEncoder(nn.Module):
    """Pictures to latents: one residual block at full size, then `blocks` of them after each halving."""

    def __init__(self, in_channels: int, depths: Sequence[int], blocks: int) -> None:
        super().__init__()
        widths = [depths[0], *(depth for depth in depths[1:] for _ in range(blocks))]
        self.stem = nn.Conv2d(in_channels, depths[0], 3, padding=1)
        self.blocks = nn.ModuleList(map(ResBlock, [depths[0], *widths], widths))
        self.halved_before = {1 + blocks * level for level in range(len(depths) - 1)}

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) → (n, depths[-1], h / 2^halvings, w / 2^halvings)."""
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            x = block(F.avg_pool2d(x, 2) if index in self.halved_before else x)
        return x


class FrameDecoder(nn.Module):
    """Latents to pictures in (-1, 1): `blocks` residual blocks at each size, from the widest depth to the first."""

    def __init__(self, latent_channels: int, out_channels: int, depths: Sequence[int], blocks: int) -> None:
        super().__init__()
        widths = [depth for depth in reversed(depths) for _ in range(blocks)]
        self.stem = nn.Conv2d(latent_channels, depths[0], 3, padding=1)
        self.blocks = nn.ModuleList(map(ResBlock, [depths[0], *widths], widths))
        self.doubled_before = {blocks * level for level in range(1, len(depths))}
        self.norm = LayerNorm2d(depths[0], eps=1e-6)
        self.head = nn.Conv2d(depths[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, latent_channels, h, w) → (n, out_channels, h 2^doublings, w 2^doublings)."""
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            x = block(F.interpolate(x, scale_factor=2.0) if index in self.doubled_before else x)
        return self.head(self.norm(x)).tanh()
