"""Patches of images and tubelets of clips, by one convolution."""

from typing import Any, List

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Patches that may overlap: (b, in_chans, h, w) → (b, dim, (h - patch) // stride + 1, likewise w)."""

    def __init__(
        self, patch_size: int, stride: int, in_chans: int, dim: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=stride, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) → (b, dim, h', w')."""
        return self.proj(x)


class PaddedPatchEmbed(PatchEmbed):
    """Patches side by side; what the last ones lack is zero: (b, in_chans, h, w) → (b, dim, ceil(h / patch), …)."""

    def __init__(self, patch_size: int, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(patch_size, patch_size, in_chans, dim, device, dtype)
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) → (b, dim, h', w')."""
        return self.proj(F.pad(x, [0, -x.shape[3] % self.patch_size, 0, -x.shape[2] % self.patch_size]))


class TubeletEmbed(nn.Module):
    """Patches over a few frames: (b, in_chans, t, h, w) → (b, dim, t // tubelet, h // patch, w // patch).

    An image (b, in_chans, h, w) is a clip of one frame.
    """

    def __init__(
        self, patch_size: int, tubelet_size: int, in_chans: int, dim: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.tubelet_size = tubelet_size
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, dim, kernel, stride=kernel, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, [t,] h, w) → (b, dim, t', h', w')."""
        x = as_clip(x)
        torch._assert(x.shape[2] >= self.tubelet_size, "the clip has fewer frames than a tubelet (tubelet_size)")
        return self.proj(x)


@register_notrace_function
def as_clip(x: Tensor) -> Tensor:
    """(b, c, h, w) → (b, c, 1, h, w); clips (b, c, t, h, w) pass."""
    return x.unsqueeze(2) if x.dim() == 4 else x


@register_notrace_function
def grid_like(maps: Tensor, x: Tensor) -> List[int]:
    """Sides of the maps (b, c, t, h, w) of an input x: (t, h, w) of a clip, (h, w) of an image."""
    return list(maps.shape[2:]) if x.dim() == 5 else list(maps.shape[3:])
