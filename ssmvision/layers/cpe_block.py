"""The frame that MLLA (arXiv:2405.16605, figure 3) gave to VSSD and Spatial-Mamba: stem, downsampling and block."""

from collections.abc import Callable
from typing import Any

from timm.layers import ConvNormAct, DropPath, Mlp
from torch import Tensor, nn


class ResidualStem(nn.Module):
    """Convolutions of stride 4 with a residual pair at half resolution.

    Args:
        in_chans: Input channels.
        dim: Output channels, an even number.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = dim // 2
        self.conv1 = ConvNormAct(in_chans, hidden, 3, stride=2, **dd)
        self.conv2 = nn.Sequential(
            ConvNormAct(hidden, hidden, 3, **dd),
            ConvNormAct(hidden, hidden, 3, apply_act=False, **dd),
        )
        self.conv3 = nn.Sequential(
            ConvNormAct(hidden, 4 * dim, 3, stride=2, **dd),
            ConvNormAct(4 * dim, dim, 1, apply_act=False, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) → (b, dim, h / 4, w / 4), sides rounded up."""
        x = self.conv1(x)
        return self.conv3(x + self.conv2(x))


class InvertedDownsample(nn.Sequential):
    """Inverted bottleneck of stride 2: (b, dim, h, w) → (b, out_dim, h / 2, w / 2), sides rounded up."""

    def __init__(self, dim: int, out_dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        hidden = 4 * out_dim
        self.expand = nn.Conv2d(dim, hidden, 1, **dd)
        self.act1 = nn.ReLU()
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride=2, padding=1, groups=hidden, **dd)
        self.act2 = nn.ReLU()
        self.project = nn.Conv2d(hidden, out_dim, 1, **dd)
        self.norm = nn.BatchNorm2d(out_dim, **dd)


class CPEBlock(nn.Module):
    """A mixer and an MLP, both pre-norm and residual, each after a conditional position encoding (arXiv:2102.10882).

    The position encoding is a residual depthwise convolution: what the mixer adds up without order gets one from it.

    Args:
        dim: Channels.
        mixer: Makes the mixer, (b, h, w, dim) → the same, from `dim`, `device` and `dtype`.
        mlp_ratio: Hidden channels of the MLP / dim.
        drop_path: Stochastic depth rate.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        mixer: Callable[..., nn.Module],
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mixer = mixer(dim, **dd)
        self.drop_path = DropPath(drop_path)
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → (b, h, w, dim)."""
        x = x + self.cpe1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        x = x + self.cpe2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.mlp(self.norm2(x)))
