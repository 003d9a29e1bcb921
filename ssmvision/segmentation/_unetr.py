"""The convolutional blocks of UNETR (arXiv:2103.10504), which hybrids with an SSM encoder decode with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.segmentation._blocks import CONVS, TRANSPOSED_CONVS

__all__ = ["UNETR_RENAMES", "ResBlock", "UpBlock"]

# Official key → ours: each convolution, and the block in its wrapper, sits in containers of one.
UNETR_RENAMES = ((r"(\.conv)+\.(weight|bias)$", r".\2"), (r"\.layer\.conv", ".conv"))


class ResBlock(nn.Module):
    """Two 3-wide convolutions with instance norms around a shortcut: (b, in_channels, ...) → (b, out_channels, ...)."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        conv = CONVS[spatial_dims]
        self.conv1 = conv(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, bias=False)
        self.conv3 = conv(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, ...) → (b, out_channels, ...)."""
        shortcut = x if self.conv3 is None else F.instance_norm(self.conv3(x))
        x = F.leaky_relu(F.instance_norm(self.conv1(x)), 0.01)
        return F.leaky_relu(F.instance_norm(self.conv2(x)) + shortcut, 0.01)


class UpBlock(nn.Module):
    """Transposed convolution by 2, concatenation with a skip, residual block."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.transp_conv = TRANSPOSED_CONVS[spatial_dims](in_channels, out_channels, 2, stride=2, bias=False)
        self.conv_block = ResBlock(spatial_dims, 2 * out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(b, in_channels, s, ...) and (b, out_channels, 2 s, ...) → (b, out_channels, 2 s, ...)."""
        return self.conv_block(torch.cat([self.transp_conv(x), skip], dim=1))
