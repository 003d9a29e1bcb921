"""LightM-UNet: a residual U-Net for pictures and volumes whose encoder mixes with Mamba layers.

Paper: `LightM-UNet: Mamba Assists in Lightweight UNet for Medical Image Segmentation` - https://arxiv.org/abs/2403.05246
Official code (Apache-2.0): https://github.com/MrBlankness/LightM-UNet
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.models._official import OfficialModel, Tap, refuse_unpublished, rename
from ssmvision.segmentation._blocks import CONVS
from ssmvision.segmentation._mixers import MakeMixer, mamba_or_twin
from ssmvision.segmentation._shapes import check_input, check_spatial_dims

__all__ = ["LightMUNet"]

_POOLS: dict[int, Any] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}


class SeparableConv(nn.Sequential):
    """A convolution of every channel alone, then one of every position alone: (b, c, ...) → (b, out_channels, ...)."""

    def __init__(
        self, spatial_dims: int, in_channels: int, out_channels: int, kernel_size: int = 3, bias: bool = False
    ) -> None:
        conv = CONVS[spatial_dims]
        super().__init__(
            conv(in_channels, in_channels, kernel_size, padding=kernel_size // 2, groups=in_channels, bias=bias),
            conv(in_channels, out_channels, 1, bias=bias),
        )


class MambaLayer(nn.Module):
    """Norm, mixer and a scaled shortcut of the unnormed input, the same norm again, projection.

    (b, in_channels, ...) → (b, out_channels, ...), the positions in raster order.
    """

    def __init__(self, in_channels: int, out_channels: int, make: MakeMixer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.mamba = make(in_channels)
        self.proj = nn.Linear(in_channels, out_channels)
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, ...) → (b, out_channels, ...)."""
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.mamba(self.norm(tokens)) + self.skip_scale * tokens
        return self.proj(self.norm(mixed)).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


class ResMambaBlock(nn.Module):
    """Two Mamba layers, each after a group norm and a ReLU, around a shortcut."""

    def __init__(self, channels: int, groups: int, make: MakeMixer) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv1 = MambaLayer(channels, channels, make)
        self.conv2 = MambaLayer(channels, channels, make)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, ...) → the same."""
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


class ResUpBlock(nn.Module):
    """A separable convolution with a scaled shortcut between two group norms; no shortcut around the whole."""

    def __init__(self, spatial_dims: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.conv = SeparableConv(spatial_dims, channels, channels)
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, ...) → the same."""
        return self.norm2(self.conv(self.norm1(x).relu()) + self.skip_scale * x).relu()


class LightMUNet(nn.Module):
    """LightM-UNet: (b, in_channels, ...) → logits (b, out_channels, ...), for sides that its poolings divide.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Input channels.
        out_channels: Classes.
        init_filters: Channels of the first stage, doubled from stage to stage; a multiple of `num_groups`.
        blocks_down: Blocks of each stage of the encoder; all but the first halve the resolution.
        blocks_up: Blocks of each stage of the decoder, coarsest first, one less than in the encoder.
        num_groups: Groups of the group norms.
        dropout: Rate of dropout after the first convolution.
        d_state: Size of the state of the scans.
        mixer: "mamba", or "none" for gated convolutions instead.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        init_filters: int = 32,
        blocks_down: Sequence[int] = (1, 2, 2, 4),
        blocks_up: Sequence[int] = (1, 1, 1),
        num_groups: int = 8,
        dropout: float = 0.0,
        d_state: int = 16,
        mixer: str = "mamba",
    ) -> None:
        check_spatial_dims("LightM-UNet", spatial_dims, 2, 3)
        super().__init__()
        if init_filters % num_groups:
            raise ValueError(f"LightM-UNet: init_filters must be a multiple of {num_groups}, not {init_filters}")
        if len(blocks_up) != len(blocks_down) - 1:
            raise ValueError(f"LightM-UNet: blocks_up must have one entry less than blocks_down, not {blocks_up}")
        self.in_channels = in_channels
        self.divisors = (2 ** len(blocks_up),) * spatial_dims
        make = mamba_or_twin("LightM-UNet", mixer, d_state)
        dims = [init_filters * 2**i for i in range(len(blocks_down))]
        self.stem = SeparableConv(spatial_dims, in_channels, init_filters)
        self.dropout = nn.Dropout(dropout)
        self.down_layers = nn.ModuleList()
        for index, (dim, depth) in enumerate(zip(dims, blocks_down, strict=True)):
            pool = nn.Sequential(MambaLayer(dim // 2, dim, make), _POOLS[spatial_dims](2)) if index else nn.Identity()
            self.down_layers.append(nn.Sequential(pool, *(ResMambaBlock(dim, num_groups, make) for _ in range(depth))))
        self.up_samples, self.up_layers = nn.ModuleList(), nn.ModuleList()
        mode = {2: "bilinear", 3: "trilinear"}[spatial_dims]
        for dim, depth in zip(dims[-2::-1], blocks_up, strict=True):
            conv = CONVS[spatial_dims](2 * dim, dim, 1, bias=False)
            self.up_samples.append(nn.Sequential(conv, nn.Upsample(scale_factor=2, mode=mode)))
            self.up_layers.append(nn.Sequential(*(ResUpBlock(spatial_dims, dim, num_groups) for _ in range(depth))))
        head = SeparableConv(spatial_dims, init_filters, out_channels, kernel_size=1, bias=True)
        self.head = nn.Sequential(nn.GroupNorm(num_groups, init_filters), nn.ReLU(), head)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, ...) → (b, out_channels, ...)."""
        check_input("LightM-UNet", x, self.in_channels, self.divisors)
        maps = [self.dropout(self.stem(x))]
        for layer in self.down_layers:
            maps.append(layer(maps[-1]))
        x = maps[-1]
        for sample, layer, skip in zip(self.up_samples, self.up_layers, maps[-2:0:-1], strict=True):
            x = layer(sample(x) + skip)
        return self.head(x)


# Official key → ours: each convolution sits in a container of one.
_RENAMES = (
    (r"(\d)\.conv\.(weight|bias)$", r"\1.\2"),
    (r"^convInit\b", "stem"),
    (r"^conv_final\b", "head"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged."""
    return {rename(key, _RENAMES): value for key, value in state_dict.items()}


# Official arguments and the values that are built here.
_UNDERSTOOD = {"use_conv_final": (True,), "norm_name": ("",)}


def from_official(official_class: str, kwargs: Mapping[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `LightMUNet`."""
    refuse_unpublished("LightM-UNet", kwargs, _UNDERSTOOD)
    model = LightMUNet(
        spatial_dims=kwargs.get("spatial_dims", 3),
        in_channels=kwargs.get("in_channels", 1),
        out_channels=kwargs.get("out_channels", 2),
        init_filters=kwargs.get("init_filters", 8),
        blocks_down=kwargs.get("blocks_down", (1, 2, 2, 4)),
        blocks_up=kwargs.get("blocks_up", (1, 1, 1)),
        num_groups=kwargs.get("num_groups", 8),
        dropout=kwargs.get("dropout_prob") or 0.0,
    )
    return OfficialModel(model, lambda name: [Tap(rename(name, _RENAMES))])


def _cfg(**fields: Any) -> NetworkCfg:
    common = {
        "paper_name": "LightM-UNet: Mamba Assists in Lightweight UNet for Medical Image Segmentation",
        "paper_ids": "arXiv:2403.05246", "origin_url": "https://github.com/MrBlankness/LightM-UNet",
        "license": "Apache-2.0", "results_source": "https://arxiv.org/abs/2403.05246",
        "caveats": (
            "The paper counts 1.09M (2-D) and 1.87M (3-D) parameters; what its own trainer builds has 5.0M.",
            "Two norms in a row amplify small differences: train without mixed precision, as the authors do.",
        ),
    }  # fmt: skip
    return NetworkCfg(**(common | fields))


@register_network(
    _cfg(input_size=(1, 512, 512), results=(("X-ray mIoU", "92.74*"), ("X-ray DSC", "96.17*"))), twin=True
)
def lightm_unet_2d(**kwargs: Any) -> LightMUNet:
    """LightM-UNet for pictures as the official trainer builds it, 5.01M parameters."""
    args: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    return LightMUNet(**(args | kwargs))


@register_network(
    _cfg(input_size=(1, 128, 128, 128), results=(("LiTS mIoU", "77.48*"), ("LiTS DSC", "84.58*"))), twin=True
)
def lightm_unet_3d(**kwargs: Any) -> LightMUNet:
    """LightM-UNet for volumes as the official trainer builds it, 5.02M parameters."""
    args: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}
    return LightMUNet(**(args | kwargs))


@register_network(_cfg(input_size=(1, 8, 8, 16)), twin=True)
def test_lightm_unet(**kwargs: Any) -> LightMUNet:
    """A micro network for tests, for volumes in the absence of other `spatial_dims`."""
    args: dict[str, Any] = {
        "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "init_filters": 8, "blocks_down": (1, 1, 1),
        "blocks_up": (1, 1), "d_state": 4,
    }  # fmt: skip
    return LightMUNet(**(args | kwargs))
