"""Generic U-Nets (arXiv:1505.04597): any hierarchical backbone as the encoder, or any token mixer in every stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from ssmvision.hub import NetworkCfg
from ssmvision.layers import SS2D, BiMamba, Chimera, Mamba, Mamba2
from ssmvision.models._networks import register_network
from ssmvision.ops import routes
from ssmvision.segmentation._blocks import CONVS, TRANSPOSED_CONVS, ConvNormAct, Decoder
from ssmvision.segmentation._mixers import in_full_precision, mamba_or_twin
from ssmvision.segmentation._pyramids import PyramidNetwork, cropped, padded, register_over_encoders
from ssmvision.segmentation._shapes import check_input, check_spatial_dims

__all__ = ["MIXERS", "SS3D", "MixerUNet", "UNet2d"]


class UNet2d(PyramidNetwork):
    """A backbone and a decoder of up-convolution, concatenation with the skip and two convolutions per step.

    Logits (b, out_channels, h, w) for images (b, in_channels, h, w) of any size: zeros fill them up to the stride.

    Args:
        spatial_dims: 2.
        in_channels: Input channels.
        out_channels: Classes, the background included.
        encoder: Name of a hierarchical backbone of this package or of timm.
        decoder_channels: Channels after each step of the decoder, coarsest first: one for every map of the encoder
            but the last, then one for each halving of the first map's stride.
        encoder_kwargs: Further arguments of the backbone, such as `pretrained=True`.

    Raises:
        ValueError: Unknown encoders, such as have no pyramid of maps; decoders that do not fit them; wrong inputs.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 2,
        encoder: str = "vmamba_tiny_s1l8",
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        encoder_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(spatial_dims, in_channels, out_channels, encoder, encoder_kwargs)
        steps = _steps(self.reductions)
        if len(decoder_channels) != len(steps):
            raise ValueError(
                f"UNet2d: {encoder} needs {len(steps)} decoder_channels, one for each step to full resolution, not "
                f"{len(decoder_channels)}"
            )
        self.decoder = Decoder(deep_supervision=False)
        skips = [*reversed(self.widths[:-1]), *[0] * (len(steps) - len(self.widths) + 1)]
        below = self.widths[-1]
        for step, skip, channels in zip(steps, skips, decoder_channels, strict=True):
            block = _two_convs(2, channels + skip, channels)
            self.decoder.add_stage(
                nn.ConvTranspose2d(below, channels, step, step), block, nn.Identity(), takes_skip=skip > 0
            )
            below = channels
        self.head = nn.Conv2d(below, out_channels, 1)

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Maps, finest first → logits (b, out_channels, h, w)."""
        return self.head(self.decoder(maps))


def _steps(reductions: Sequence[int]) -> list[int]:
    """Factors from the coarsest map to the finest, and on to the input in halves."""
    first = reductions[0]
    halves = first.bit_length() - 1
    steps = [coarse // fine for fine, coarse in pairwise(reductions)][::-1]
    return steps + ([2] * halves if first == 2**halves else [first])


def _two_convs(spatial_dims: int, in_channels: int, channels: int) -> nn.Sequential:
    kernel = (3,) * spatial_dims
    return nn.Sequential(
        ConvNormAct(spatial_dims, in_channels, channels, kernel), ConvNormAct(spatial_dims, channels, channels, kernel)
    )


class SS3D(SS2D):
    """SS2D for volumes: along each of the three axes, there and back, in one scan of six routes; d_state is 16.

    Args:
        dim: Channels of input and output.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, d_state=16, d_conv=1, gate=True, routes=6)
        self.conv3d = nn.Conv3d(self.d_inner, self.d_inner, 3, padding=1, groups=self.d_inner)

    def forward(self, x: Tensor) -> Tensor:
        """(b, d, h, w, dim) → the same."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.act(self.conv3d(u.movedim(-1, 1))).movedim(1, -1)
        return self.out_proj(self.out_norm(self.scan(u)) * self.act(z))

    def scan(self, u: Tensor) -> Tensor:
        """The six scans alone, (b, d, h, w, d_inner) → the same."""
        forward = torch.stack(
            [routes.raster(list(u.shape[1:4]), axes, u.device) for axes in ([0, 1, 2], [0, 2, 1], [1, 2, 0])]
        )
        y = self.scan_tokens(u.flatten(1, 3), torch.cat([forward, routes.reverse(forward)]))
        return y.transpose(1, 2).reshape(u.shape)


class _OverTokens(nn.Module):
    """A mixer of tokens (b, l, dim) over maps (b, *size, dim) in raster order."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x.flatten(1, -2)).reshape(x.shape)


class _Conv(nn.Module):
    """A convolution with a kernel of 3 over maps (b, *size, dim)."""

    def __init__(self, dim: int, spatial_dims: int) -> None:
        super().__init__()
        self.conv = CONVS[spatial_dims](dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.movedim(-1, 1)).movedim(1, -1)


# What builds a mixer of maps (b, *size, dim) from dim and spatial_dims; add to it what should have a name.
MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    "mamba": lambda dim, _: _OverTokens(Mamba(dim)),
    "bimamba": lambda dim, _: _OverTokens(BiMamba(dim)),
    "ss3d": lambda dim, dims: SS3D(dim) if dims == 3 else SS2D(dim, d_state=16, conv_bias=True, gate=True),
    "chimera": lambda dim, _: Chimera(dim, conv_bias=True, gate=True),
    "mamba2": lambda dim, _: _OverTokens(Mamba2(dim, headdim=math.gcd(2 * dim, 64))),
    "none": lambda dim, _: _OverTokens(mamba_or_twin("MixerUNet", "none")(dim)),
    "attention": lambda dim, _: _OverTokens(Attention(dim, num_heads=1 if dim % 32 else dim // 32, qkv_bias=True)),
    "conv": _Conv,
}


class _MixerBlock(nn.Module):
    """A convolution, then a pre-norm residual mixer: (b, c, *size) → (b, dim, *size / stride)."""

    def __init__(self, spatial_dims: int, in_channels: int, dim: int, mixer: str, stride: int = 1) -> None:
        super().__init__()
        self.conv = ConvNormAct(spatial_dims, in_channels, dim, (3,) * spatial_dims, stride)
        self.norm = nn.LayerNorm(dim)
        self.mixer = MIXERS[mixer](dim, spatial_dims)

    def forward(self, x: Tensor) -> Tensor:
        return in_full_precision(self._mix, self.conv(x), self.norm.weight)

    def _mix(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x.movedim(1, -1))).movedim(-1, 1)


class MixerUNet(nn.Module):
    """A U-Net in two or three dimensions that mixes tokens in every stage but that of full resolution.

    Logits (b, out_channels, *size) for inputs (b, in_channels, *size) of any size: zeros fill them up to the stride.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Input channels.
        out_channels: Classes, the background included.
        channels: Of each stage; every stage after the first halves the resolution.
        mixer: Name in `MIXERS`: "mamba", "bimamba", "ss3d" (routes along every axis, there and back; two axes have
            four), "chimera" (coupled scans along rows and columns; of a volume, each slice alone), "mamba2", "none"
            (gated convolutions of as many parameters as "mamba" has), "attention" (its cost is quadratic in the
            positions) or "conv".

    Raises:
        ValueError: Arguments out of range, unknown mixers, wrong inputs.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = (32, 64, 128, 256),
        mixer: str = "mamba",
    ) -> None:
        super().__init__()
        check_spatial_dims("MixerUNet", spatial_dims, 2, 3)
        if mixer not in MIXERS:
            raise ValueError(f"MixerUNet: mixer must be one of {', '.join(MIXERS)}, not {mixer!r}")
        if len(channels) < 2:
            raise ValueError(f"MixerUNet: channels must name at least two stages, not {tuple(channels)}")
        self.spatial_dims, self.in_channels, self.out_channels = spatial_dims, in_channels, out_channels
        self.stride = 2 ** (len(channels) - 1)
        self.stem = _two_convs(spatial_dims, in_channels, channels[0])
        self.stages = nn.ModuleList(
            _MixerBlock(spatial_dims, fine, coarse, mixer, stride=2) for fine, coarse in pairwise(channels)
        )
        self.decoder = Decoder(deep_supervision=False)
        for i in range(len(channels) - 2, -1, -1):
            dim = channels[i]
            block = _MixerBlock(spatial_dims, 2 * dim, dim, mixer) if i else _two_convs(spatial_dims, 2 * dim, dim)
            self.decoder.add_stage(TRANSPOSED_CONVS[spatial_dims](channels[i + 1], dim, 2, 2), block, nn.Identity())
        self.head = CONVS[spatial_dims](channels[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, *size) → logits (b, out_channels, *size)."""
        check_input("MixerUNet", x, self.in_channels, (1,) * self.spatial_dims)
        skips = [self.stem(padded(x, self.stride))]
        for stage in self.stages:
            skips.append(stage(skips[-1]))
        return cropped(self.head(self.decoder(skips)), x.shape[2:])


_CFG = NetworkCfg(
    paper_name="U-Net: Convolutional Networks for Biomedical Image Segmentation",
    paper_ids="arXiv:1505.04597",
    origin_url="https://arxiv.org/abs/1505.04597",
    license="Apache-2.0",
)

register_over_encoders("unet", "U-Net", UNet2d, _CFG, decoder_channels=(64, 32, 16, 8, 8))

_OWN = replace(_CFG, caveats=("The combination is this package's own: it has neither weights nor reported results.",))


@register_network(_OWN, twin=True)
def ssm_unet_2d(**kwargs: Any) -> MixerUNet:
    """U-Net of images with Mamba, or another mixer, in every stage but the finest."""
    return MixerUNet(**({"spatial_dims": 2, "in_channels": 1, "out_channels": 2} | kwargs))


@register_network(_OWN, twin=True)
def ssm_unet_3d(**kwargs: Any) -> MixerUNet:
    """U-Net of volumes with Mamba, or another mixer, in every stage but the finest."""
    return MixerUNet(**({"spatial_dims": 3, "in_channels": 1, "out_channels": 2} | kwargs))


@register_network(replace(_OWN, input_size=(1, 8, 16, 16)), twin=True)
def test_ssm_unet(**kwargs: Any) -> MixerUNet:
    """A micro network for tests."""
    args: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": (8, 12, 20)}
    return MixerUNet(**(args | kwargs))
