"""LKM-UNet: nnU-Net's residual U-Net with two Mamba layers per encoder stage, one that strides and one that pools.

Paper: `LKM-UNet: Large Kernel Vision Mamba UNet for Medical Image Segmentation` - https://arxiv.org/abs/2403.07332
Official code (no licence stated; no weights were published): https://github.com/wjh892521292/LKM-UNet
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers import Mamba
from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.models._official import OfficialModel, Tap, refuse_unpublished, rename
from ssmvision.segmentation._blocks import (
    CONVS,
    NNUNET_COPIES,
    TRANSPOSED_CONVS,
    ConvNormAct,
    Decoder,
    PlannedNetwork,
    ResidualBlockD,
    init_residual_unet_,
    one_copy,
)
from ssmvision.segmentation._mixers import MakeMixer, in_full_precision, mixer_or_twin
from ssmvision.segmentation._plans import (
    ABDOMEN_CT,
    ABDOMEN_MR_2D,
    blocks_per_stage,
    check_plan,
    nnunet_plan,
    per_axis,
)
from ssmvision.segmentation._shapes import check_input

__all__ = ["LKMUNet"]

# The window of the striding layer in pixels, times the stage's scale: what the deepest map of AbdomenCT measures.
_WINDOWS = {2: (5, 5), 3: (5, 7, 6)}


class TwoWayMamba(nn.Module):
    """Two Mambas, one on the reversed tokens, with one output projection: (b, l, dim) → the same."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mamba_forw, self.mamba_backw = Mamba(dim), Mamba(dim)
        self.out_proj = nn.Linear(self.mamba_forw.d_inner, dim, bias=False)
        for mamba in (self.mamba_forw, self.mamba_backw):
            mamba.out_proj = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.mamba_forw(x) + self.mamba_backw(x.flip(1)).flip(1))


class TokenLayer(nn.Module):
    """Layer norm and mixer over the positions of a map: (b, c, *size) → the same."""

    def __init__(self, dim: int, make: MakeMixer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mixer = make(dim)

    def mix(self, x: Tensor) -> Tensor:
        """What the layer adds to a map."""
        return in_full_precision(self._mix, x, self.norm.weight)

    def _mix(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.mixer(self.norm(tokens)).transpose(1, 2).reshape(x.shape)


class PixelLayer(TokenLayer):
    """PiM (section 2.2): one sequence for each place in a window, of the pixels at that place in all windows.

    Where a side is no multiple of its window the whole map is one sequence, as in the official code.
    """

    def __init__(self, dim: int, scale: int, spatial_dims: int, make: MakeMixer) -> None:
        super().__init__(dim, make)
        self.window = [scale * side for side in _WINDOWS[spatial_dims]]

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        if any(length % side for length, side in zip(size, self.window, strict=True)):
            return self.mix(x) + x
        return self._join(self.mix(self._split(x)), x) + x

    def _split(self, x: Tensor) -> Tensor:
        """(b, c, *size) → (b * places, c, *windows)."""
        n = len(self.window)
        for axis, side in enumerate(self.window):
            x = x.unflatten(2 + 2 * axis, (-1, side))
        return x.permute(0, *range(3, 3 + 2 * n, 2), 1, *range(2, 2 + 2 * n, 2)).flatten(0, n)

    def _join(self, y: Tensor, x: Tensor) -> Tensor:
        """(b * places, c, *windows) → the shape of x."""
        n = len(self.window)
        y = y.unflatten(0, (x.shape[0], *self.window))
        pairs = [axis for i in range(n) for axis in (n + 2 + i, 1 + i)]
        return y.permute(0, n + 1, *pairs).reshape(x.shape)


class WindowLayer(TokenLayer):
    """PaM (section 2.2): one sequence of the means of windows; every pixel gets what its window does.

    Where a side is no multiple of the window's the pixels themselves are the sequence, as in the official code.
    """

    def __init__(self, dim: int, scale: int, make: MakeMixer) -> None:
        super().__init__(dim, make)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        if self.scale == 1 or any(length % self.scale for length in x.shape[2:]):
            return self.mix(x) + x
        pool = F.avg_pool2d if x.dim() == 4 else F.avg_pool3d
        y = self.mix(pool(x, self.scale))
        return F.interpolate(y, scale_factor=float(self.scale), mode="nearest") + x


class Encoder(nn.Module):
    """Stem, and stages of residual blocks and the two Mamba layers; returns the map of each, finest first."""

    def __init__(
        self, spatial_dims: int, in_channels: int, features: Sequence[int], kernels: Sequence[tuple[int, ...]],
        strides: Sequence[tuple[int, ...]], depths: Sequence[int], bias: bool, make: MakeMixer,
    ) -> None:  # fmt: skip
        super().__init__()
        n, widths = len(features), [features[0], *features]
        self.stem = ConvNormAct(spatial_dims, in_channels, features[0], kernels[0], bias=bias)
        self.stages = nn.ModuleList(
            _stage(spatial_dims, widths[i], widths[i + 1], kernels[i], strides[i], depths[i], bias) for i in range(n)
        )
        scales = [2 ** ((n - 1 - stage) // 2) for stage in range(n)]
        self.mamba_layers = nn.ModuleList(
            PixelLayer(dim, scale, spatial_dims, make) for dim, scale in zip(features, scales, strict=True)
        )
        self.w_mamba_layers = nn.ModuleList(
            WindowLayer(dim, scale, make) for dim, scale in zip(features, scales, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x, skips = self.stem(x), []
        for stage, pixel, window in zip(self.stages, self.mamba_layers, self.w_mamba_layers, strict=True):
            x = window(pixel(stage(x)))
            skips.append(x)
        return skips


def _stage(
    spatial_dims: int, in_channels: int, channels: int, kernel: Sequence[int], stride: Sequence[int], blocks: int,
    bias: bool,
) -> nn.Sequential:  # fmt: skip
    further = [ResidualBlockD(spatial_dims, channels, channels, kernel, bias=bias) for _ in range(blocks - 1)]
    return nn.Sequential(ResidualBlockD(spatial_dims, in_channels, channels, kernel, stride, bias), *further)


class LKMUNet(PlannedNetwork):
    """LKM-UNet (figure 1 of the paper, sizes of the official code).

    Logits (b, out_channels, *size) for inputs (b, in_channels, *size); with deep supervision a list of logits, the
    finest first, in training and evaluation alike. Switch that by `network.decoder.deep_supervision`, as nnU-Net does.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Input channels.
        out_channels: Classes, the background included.
        features_per_stage: Channels of each stage.
        kernel_sizes: Kernel of each stage, per axis or one for all axes.
        strides: Stride of each stage, likewise; the first is as a rule 1.
        n_conv_per_stage: Residual blocks of each encoder stage.
        n_conv_per_stage_decoder: The same of the decoder, coarsest stage first.
        conv_bias: Give the convolutions of blocks, except shortcuts, and those that upsample a bias.
        deep_supervision: Return the logits of every decoder stage.
        mixer: "mamba", or "none" for gated convolutions of as many parameters in its place.

    Raises:
        ValueError: Arguments that contradict each other; inputs that do not fit.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        features_per_stage: Sequence[int],
        kernel_sizes: Sequence[int | Sequence[int]],
        strides: Sequence[int | Sequence[int]],
        n_conv_per_stage: int | Sequence[int] = 2,
        n_conv_per_stage_decoder: int | Sequence[int] = 2,
        conv_bias: bool = True,
        deep_supervision: bool = False,
        mixer: str = "mamba",
    ) -> None:
        super().__init__()
        make = mixer_or_twin("LKM-UNet", mixer, "mamba", TwoWayMamba)
        check_plan("LKM-UNet", spatial_dims, len(features_per_stage), kernel_sizes, strides)
        kernels = [per_axis(kernel, spatial_dims) for kernel in kernel_sizes]
        steps = [per_axis(stride, spatial_dims) for stride in strides]
        n, features = len(features_per_stage), features_per_stage
        depths = blocks_per_stage("LKM-UNet", n_conv_per_stage, n)
        self.in_channels = in_channels
        self.divisors = [math.prod(axis) for axis in zip(*steps, strict=True)]
        self.encoder = Encoder(spatial_dims, in_channels, features, kernels, steps, depths, conv_bias, make)
        self.decoder = Decoder(deep_supervision)
        depths = blocks_per_stage("LKM-UNet", n_conv_per_stage_decoder, n - 1)
        for below, blocks in zip(range(n - 1, 0, -1), depths, strict=True):
            channels, stride, kernel = features[below - 1], steps[below], kernels[below - 1]
            self.decoder.add_stage(
                TRANSPOSED_CONVS[spatial_dims](features[below], channels, stride, stride, bias=conv_bias),
                _stage(spatial_dims, 2 * channels, channels, kernel, (1,) * spatial_dims, blocks, conv_bias),
                CONVS[spatial_dims](channels, out_channels, 1),
            )
        init_residual_unet_(self)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(b, in_channels, *size) → logits (b, out_channels, *size), or a list of them (see the class)."""
        check_input("LKM-UNet", x, self.in_channels, self.divisors)
        return self.decoder(self.encoder(x))


# Official key → ours, once the copies have the name of the original.
_RENAMES = (
    *NNUNET_COPIES,
    (r"\.stem\.convs\.0\.", ".stem."),
    (r"(\.stages\.\d+)\.blocks\.", r"\1."),
    (r"\.transpconvs\.", ".upsample_layers."),
    (r"(mamba_layers\.\d+)\.(mamba_|out_proj)", r"\1.mixer.\2"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official keys → ours, every tensor once; ours pass unchanged."""
    return {rename(key, _RENAMES): value for key, value in one_copy(state_dict, NNUNET_COPIES).items()}


_UNDERSTOOD = {"norm": ("instance(eps=1e-5, affine)",), "nonlin": ("LeakyReLU(0.01)",)}


def from_official(official_class: str, kwargs: Mapping[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `LKMUNet` in either number of dimensions."""
    refuse_unpublished("LKM-UNet", kwargs, _UNDERSTOOD)
    same = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_conv_per_stage_decoder")
    model = LKMUNet(
        spatial_dims=len(kwargs["kernel_sizes"][0]),
        in_channels=kwargs["input_channels"],
        out_channels=kwargs["num_classes"],
        conv_bias=kwargs.get("conv_bias", True),
        deep_supervision=kwargs.get("deep_supervision", False),
        **{name: kwargs[name] for name in same},
    )
    return OfficialModel(model, lambda name: [Tap(rename(f"{name}.", _RENAMES)[:-1])])


_CFG = NetworkCfg(
    paper_name="LKM-UNet: Large Kernel Vision Mamba UNet for Medical Image Segmentation",
    paper_ids="arXiv:2403.07332",
    origin_url="https://github.com/wjh892521292/LKM-UNet",
    license="none stated",
    caveats=(
        "The repository states no licence.",
        "The authors published no plans: patch size, strides and kernels are those reconstructed for U-Mamba.",
        "Where sides are no multiples of a stage's windows, its layers scan the whole map as one sequence, as in the "
        "official code; the windows are made for 40 x 224 x 192 voxels.",
    ),
)


def _create(plan: dict[str, Any], kwargs: dict[str, Any]) -> LKMUNet:
    return LKMUNet(**({name: value for name, value in plan.items() if name != "patch_size"} | kwargs))


@register_network(replace(_CFG, input_size=(1, 40, 224, 192), results=(("AbdomenCT DSC", "0.8682*"),)), twin=True)
def lkm_unet_3d(**kwargs: Any) -> LKMUNet:
    """LKM-UNet as planned for AbdomenCT, 63.78M parameters."""
    return _create(ABDOMEN_CT, kwargs)


@register_network(replace(_CFG, input_size=(1, 320, 320)), twin=True)
def lkm_unet_2d(**kwargs: Any) -> LKMUNet:
    """LKM-UNet as planned for slices of AbdomenMR, 80.89M parameters."""
    return _create(ABDOMEN_MR_2D, kwargs)


@register_network(replace(_CFG, input_size=(1, 10, 28, 24)), twin=True)
def test_lkm_unet(**kwargs: Any) -> LKMUNet:
    """A micro network for tests."""
    plan = nnunet_plan((10, 28, 24), (8, 16, 24), 1, 3)
    return _create(plan, {"n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1} | kwargs)
