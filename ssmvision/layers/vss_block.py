"""The frame of VMamba v0 (arXiv:2401.10166) that others took over: stem, downsampling and block."""

from collections.abc import Callable
from typing import Any, Type

import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp
from torch import Tensor, nn


class PatchStem(nn.Sequential):
    """Non-overlapping square patches, of 4 pixels a side: (b, in_chans, h, w) → (b, dim, h/4, w/4)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **dd)
        self.norm1 = LayerNorm2d(dim, eps=1e-5, **dd)


class PatchMerging(nn.Module):
    """2 x 2 neighbours concatenated, normalised and projected; odd sides get a row or column of zeros, or lose one."""

    def __init__(self, dim: int, out_dim: int, pad: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.pad = pad
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, h, w) → (b, out_dim, ceil(h / 2), ceil(w / 2)); floor without pad."""
        x = x.permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        x = F.pad(x, [0, 0, 0, W % 2, 0, H % 2]) if self.pad else x[:, : H // 2 * 2, : W // 2 * 2]
        x = x.reshape(B, x.shape[1] // 2, 2, x.shape[2] // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class VSSBlock(nn.Module):
    """SS2D and, if mlp_ratio > 0, an MLP, both pre-norm and residual: (b, h, w, dim) → the same."""

    def __init__(
        self,
        dim: int,
        mixer: Callable[..., nn.Module],
        mlp_ratio: float = 4.0,
        mlp_act: Type[nn.Module] = nn.GELU,
        drop_path: float = 0.0,
        mlp: Callable[..., nn.Module] = Mlp,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.op = mixer(dim, **dd)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd) if mlp_ratio > 0 else nn.Identity()
        self.mlp = mlp(dim, int(dim * mlp_ratio), act_layer=mlp_act, **dd) if mlp_ratio > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → (b, h, w, dim)."""
        x = x + self.drop_path(self.op(self.norm(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x
