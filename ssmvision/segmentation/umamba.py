"""U-Mamba: nnU-Net's residual U-Net with a Mamba layer at the bottleneck (Bot) or throughout the encoder (Enc).

Paper: `U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation` - https://arxiv.org/abs/2401.04722
Official code (Apache-2.0; no weights were published): https://github.com/bowang-lab/U-Mamba
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.models._official import OfficialModel, Tap, refuse_unpublished
from ssmvision.segmentation._blocks import (
    CONVS,
    NNUNET_COPIES,
    Decoder,
    PlannedNetwork,
    ResidualBlockD,
    init_residual_unet_,
    instance_norm,
    one_copy,
)
from ssmvision.segmentation._mixers import MakeMixer, in_full_precision, mamba_or_twin
from ssmvision.segmentation._plans import (
    ABDOMEN_CT,
    ABDOMEN_MR,
    ABDOMEN_MR_2D,
    ENDOSCOPY,
    MICROSCOPY,
    blocks_per_stage,
    check_plan,
    nnunet_plan,
    per_axis,
)
from ssmvision.segmentation._shapes import check_input

__all__ = ["UMamba"]


class StrideBlock(nn.Module):
    """Residual block whose shortcut is a strided 1x1 convolution without a norm; the first of every stage."""

    def __init__(
        self, spatial_dims: int, in_channels: int, channels: int, kernel_size: Sequence[int], stride: Any = 1
    ) -> None:
        super().__init__()
        conv, padding = CONVS[spatial_dims], tuple(k // 2 for k in kernel_size)
        self.conv1 = conv(in_channels, channels, kernel_size, stride, padding)
        self.norm1 = instance_norm(spatial_dims, channels)
        self.conv2 = conv(channels, channels, kernel_size, padding=padding)
        self.norm2 = instance_norm(spatial_dims, channels)
        self.conv3 = conv(in_channels, channels, 1, stride)
        self.act = nn.LeakyReLU(0.01)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        return self.act(self.norm2(self.conv2(y)) + self.conv3(x))


def _stage(
    spatial_dims: int, in_channels: int, channels: int, kernel_size: Sequence[int], stride: Any, blocks: int, bias: bool
) -> nn.Sequential:
    further = [ResidualBlockD(spatial_dims, channels, channels, kernel_size, bias=bias) for _ in range(blocks - 1)]
    return nn.Sequential(StrideBlock(spatial_dims, in_channels, channels, kernel_size, stride), *further)


class MambaLayer(nn.Module):
    """Layer norm and a causal Mamba over the positions of a map, without a residual.

    Args:
        dim: Channels, or positions if `channel_tokens`.
        make: Builds the mixer.
        channel_tokens: Let the channels be the tokens and the positions the features of each; fixes the map's size.
    """

    def __init__(self, dim: int, make: MakeMixer, channel_tokens: bool = False) -> None:
        super().__init__()
        self.channel_tokens = channel_tokens
        self.norm = nn.LayerNorm(dim)
        self.mamba = make(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *size) → the same."""
        return in_full_precision(self._mix, x, self.norm.weight)

    def _mix(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        if self.channel_tokens:
            return self.mamba(self.norm(tokens)).reshape(x.shape)
        return self.mamba(self.norm(tokens.transpose(1, 2))).transpose(1, 2).reshape(x.shape)


class Encoder(nn.Module):
    """Stem and stages; returns what each stage hands to the decoder, finest first."""

    def __init__(self, stem: nn.Module, stages: list[nn.Module], mamba_layers: list[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.mamba_layers = nn.ModuleList(mamba_layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, skips = self.stem(x), []
        for stage, mamba in zip(self.stages, self.mamba_layers, strict=True):
            x = mamba(stage(x))
            skips.append(x)
        return skips


class Upsample(nn.Module):
    """Repeats every position along each axis, then a 1x1 convolution."""

    def __init__(self, spatial_dims: int, in_channels: int, channels: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.scale = tuple(float(s) for s in stride)
        self.conv = CONVS[spatial_dims](in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.scale, mode="nearest"))


def _decoder(
    spatial_dims: int, features: Sequence[int], kernel_sizes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]], blocks: Sequence[int], out_channels: int, deep_supervision: bool, bias: bool,
) -> Decoder:  # fmt: skip
    """The finest stage of two-dimensional networks takes no skip."""
    decoder = Decoder(deep_supervision)
    for stage, below in enumerate(range(len(features) - 1, 0, -1)):
        channels, takes_skip = features[below - 1], spatial_dims == 3 or below > 1
        decoder.add_stage(
            Upsample(spatial_dims, features[below], channels, strides[below]),
            _stage(
                spatial_dims, channels * (1 + takes_skip), channels, kernel_sizes[below - 1], 1, blocks[stage], bias
            ),
            CONVS[spatial_dims](channels, out_channels, 1),
            takes_skip,
        )
    return decoder


class UMamba(PlannedNetwork):
    """U-Mamba (figure 1 of the paper, sizes of the official code).

    Logits (b, out_channels, *size) for inputs (b, in_channels, *size); with deep supervision a list of logits, the
    finest first, in training and evaluation alike. Switch that by `network.decoder.deep_supervision`, as nnU-Net does.

    Where a stage of Enc has at most as many positions as channels, its tokens are the channels and its positions their
    features: such weights work at the size `patch_size` alone.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Input channels.
        out_channels: Classes, the background included.
        features_per_stage: Channels of each stage.
        kernel_sizes: Kernel of each stage, per axis or one for all axes.
        strides: Stride of each stage, likewise; the first is as a rule 1.
        n_conv_per_stage: Residual blocks of each encoder stage, which the deeper half ignores: it has one.
        n_conv_per_stage_decoder: The same of the decoder, coarsest stage first; here the finer half has one.
        placement: "bot", a Mamba layer at the bottleneck, or "enc", one after every encoder stage (of two-dimensional
            networks: after the last, the last but two, ...).
        patch_size: Size that the network is planned for; "enc" needs it.
        conv_bias: Give the convolutions of all residual blocks but the first of a stage, which have one, a bias.
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
        placement: str = "bot",
        patch_size: Sequence[int] | None = None,
        conv_bias: bool = True,
        deep_supervision: bool = False,
        mixer: str = "mamba",
    ) -> None:
        super().__init__()
        make = mamba_or_twin("U-Mamba", mixer)
        n = len(features_per_stage)
        check_plan("U-Mamba", spatial_dims, n, kernel_sizes, strides)
        _check_placement(spatial_dims, placement, patch_size)
        kernels = [per_axis(kernel, spatial_dims) for kernel in kernel_sizes]
        steps = [per_axis(stride, spatial_dims) for stride in strides]
        self.in_channels, self.out_channels = in_channels, out_channels
        self.patch_size = None if patch_size is None else tuple(patch_size)
        self.divisors = [math.prod(axis) for axis in zip(*steps, strict=True)]
        depths = _depths(n_conv_per_stage, n, math.ceil(n / 2))
        decoder_depths = _depths(n_conv_per_stage_decoder, n - 1, math.ceil((n - 1) / 2 + 0.5))
        widths = [features_per_stage[0], *features_per_stage]
        self.encoder = Encoder(
            _stage(spatial_dims, in_channels, widths[0], kernels[0], 1, depths[0], conv_bias),
            [
                _stage(spatial_dims, widths[i], widths[i + 1], kernels[i], steps[i], depths[i], conv_bias)
                for i in range(n)
            ],
            _mamba_layers(features_per_stage, steps, patch_size, make) if placement == "enc" else
            [nn.Identity() for _ in range(n)],
        )  # fmt: skip
        self.fixed_size = any(getattr(layer, "channel_tokens", False) for layer in self.encoder.mamba_layers)
        self.mamba_layer = MambaLayer(widths[-1], make) if placement == "bot" else nn.Identity()
        self.decoder = _decoder(
            spatial_dims, features_per_stage, kernels, steps, decoder_depths, out_channels, deep_supervision, conv_bias
        )
        init_residual_unet_(self)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(b, in_channels, *size) → logits (b, out_channels, *size), or a list of them (see the class)."""
        check_input("U-Mamba", x, self.in_channels, self.divisors)
        if self.fixed_size:
            self._check_size(tuple(x.shape[2:]))
        skips = self.encoder(x)
        return self.decoder([*skips[:-1], self.mamba_layer(skips[-1])])

    def _check_size(self, size: tuple[int, ...]) -> None:
        if size != self.patch_size:
            raise ValueError(
                f"U-Mamba: stages with channels for tokens fix the input's size; its patch_size is {self.patch_size}, "
                f"the input's {size}"
            )


def _check_placement(spatial_dims: int, placement: str, patch_size: Sequence[int] | None) -> None:
    if placement not in ("bot", "enc"):
        raise ValueError(f"U-Mamba: placement must be 'bot' or 'enc', not {placement!r}")
    if placement == "enc" and (patch_size is None or len(patch_size) != spatial_dims):
        raise ValueError(f"U-Mamba Enc is planned for one patch_size of {spatial_dims} axes, not {patch_size}")


def _depths(blocks: int | Sequence[int], stages: int, whole: int) -> list[int]:
    """Blocks of each stage; from stage `whole` on there is one, whatever was asked for."""
    return blocks_per_stage("U-Mamba", blocks, stages)[:whole] + [1] * (stages - whole)


def _mamba_layers(
    features: Sequence[int], strides: Sequence[Sequence[int]], patch_size: Sequence[int] | None, make: MakeMixer
) -> list[nn.Module]:
    """The layers of Enc: after every stage, in two dimensions after every second one that ends with the last."""
    assert patch_size is not None
    size, n = tuple(patch_size), len(features)
    layers: list[nn.Module] = []
    for stage, (channels, stride) in enumerate(zip(features, strides, strict=True)):
        size = tuple(length // step for length, step in zip(size, stride, strict=True))
        if len(size) == 2 and (n - 1 - stage) % 2:
            layers.append(nn.Identity())
            continue
        by_channel = math.prod(size) <= channels
        layers.append(MambaLayer(math.prod(size) if by_channel else channels, make, by_channel))
    return layers


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official keys, every tensor once; ours pass unchanged."""
    return one_copy(state_dict, NNUNET_COPIES)


_UNDERSTOOD = {"norm": ("instance(eps=1e-5, affine)",), "nonlin": ("LeakyReLU(0.01)",)}


def from_official(official_class: str, kwargs: Mapping[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `UMambaBot` and `UMambaEnc`."""
    refuse_unpublished("U-Mamba", kwargs, _UNDERSTOOD)
    found = [placement for placement in ("bot", "enc") if f"umamba{placement}" in official_class.lower()]
    if len(found) != 1:
        raise ValueError(f"U-Mamba has the classes UMambaBot and UMambaEnc, not {official_class!r}")
    model = UMamba(
        spatial_dims=len(kwargs["patch_size"]),
        in_channels=kwargs["input_channels"],
        out_channels=kwargs["num_classes"],
        placement=found[0],
        conv_bias=kwargs.get("conv_bias", True),
        deep_supervision=kwargs.get("deep_supervision", False),
        **{name: kwargs[name] for name in ("patch_size", "features_per_stage", "kernel_sizes", "strides")},
        **{name: kwargs[name] for name in ("n_conv_per_stage", "n_conv_per_stage_decoder")},
    )
    return OfficialModel(model, lambda name: [Tap(name)])


_SOURCE = "https://github.com/bowang-lab/U-Mamba"
_BASELINE = (
    "nnU-Net's own five-fold comparison on six datasets (documentation/resenc_presets.md) finds the same network "
    "without Mamba layers equal to or better than Bot on 4 and Enc on 5 of them."
)
_PLAN = "The authors published no plans: patch size, strides and kernels are reconstructed from the paper's table."
_CHANNEL_TOKENS = "Stages with at most as many positions as channels take channels for tokens: patch_size is fixed."


_MICRO_2D = nnunet_plan((32, 48), (8, 16, 24), 1, 3)
_MICRO_3D = nnunet_plan((8, 16, 16), (8, 12, 20, 20), 1, 3)


def _cfg(placement: str, plan: dict[str, Any], *results: tuple[str, str]) -> NetworkCfg:
    return NetworkCfg(
        paper_name="U-Mamba: Enhancing Long-range Dependency for Biomedical Image Segmentation",
        paper_ids="arXiv:2401.04722",
        origin_url=_SOURCE,
        license="Apache-2.0",
        input_size=(plan["in_channels"], *plan["patch_size"]),
        results=results,
        results_source="https://arxiv.org/abs/2401.04722",
        caveats=(_BASELINE, _PLAN, _CHANNEL_TOKENS) if placement == "enc" else (_BASELINE, _PLAN),
    )


def _create(placement: str, plan: dict[str, Any], kwargs: dict[str, Any]) -> UMamba:
    return UMamba(**(plan | {"placement": placement} | kwargs))


@register_network(
    _cfg("bot", ABDOMEN_CT, ("AbdomenCT DSC", "0.8683±0.0808"), ("AbdomenCT NSD", "0.9049±0.0821*")), twin=True
)
def umamba_bot_3d(**kwargs: Any) -> UMamba:
    """U-Mamba Bot as planned for AbdomenCT, 41.95M parameters."""
    return _create("bot", ABDOMEN_CT, kwargs)


@register_network(
    _cfg("enc", ABDOMEN_CT, ("AbdomenCT DSC", "0.8638±0.0908*"), ("AbdomenCT NSD", "0.8980±0.0921*")), twin=True
)
def umamba_enc_3d(**kwargs: Any) -> UMamba:
    """U-Mamba Enc as planned for AbdomenCT, 42.84M parameters."""
    return _create("enc", ABDOMEN_CT, kwargs)


@register_network(
    _cfg("bot", ABDOMEN_MR, ("AbdomenMR DSC", "0.8453±0.0673*"), ("AbdomenMR NSD", "0.9121±0.0634*")), twin=True
)
def umamba_bot_3d_abdomenmr(**kwargs: Any) -> UMamba:
    """U-Mamba Bot as planned for volumes of AbdomenMR, 41.95M parameters."""
    return _create("bot", ABDOMEN_MR, kwargs)


@register_network(
    _cfg("enc", ABDOMEN_MR, ("AbdomenMR DSC", "0.8501±0.0732"), ("AbdomenMR NSD", "0.9171±0.0689*")), twin=True
)
def umamba_enc_3d_abdomenmr(**kwargs: Any) -> UMamba:
    """U-Mamba Enc as planned for volumes of AbdomenMR, 42.84M parameters."""
    return _create("enc", ABDOMEN_MR, kwargs)


@register_network(
    _cfg("bot", ABDOMEN_MR_2D, ("AbdomenMR DSC", "0.7588±0.1051*"), ("AbdomenMR NSD", "0.8285±0.1074*")), twin=True
)
def umamba_bot_2d(**kwargs: Any) -> UMamba:
    """U-Mamba Bot as planned for slices of AbdomenMR, 47.53M parameters."""
    return _create("bot", ABDOMEN_MR_2D, kwargs)


@register_network(
    _cfg("enc", ABDOMEN_MR_2D, ("AbdomenMR DSC", "0.7625±0.1082"), ("AbdomenMR NSD", "0.8327±0.1087*")), twin=True
)
def umamba_enc_2d(**kwargs: Any) -> UMamba:
    """U-Mamba Enc as planned for slices of AbdomenMR, 47.02M parameters."""
    return _create("enc", ABDOMEN_MR_2D, kwargs)


@register_network(
    _cfg("bot", ENDOSCOPY, ("Endoscopy DSC", "0.6540±0.3008"), ("Endoscopy NSD", "0.6692±0.3050")), twin=True
)
def umamba_bot_2d_endoscopy(**kwargs: Any) -> UMamba:
    """U-Mamba Bot as planned for Endoscopy, 47.52M parameters."""
    return _create("bot", ENDOSCOPY, kwargs)


@register_network(
    _cfg("enc", ENDOSCOPY, ("Endoscopy DSC", "0.6303±0.3067*"), ("Endoscopy NSD", "0.6451±0.3104*")), twin=True
)
def umamba_enc_2d_endoscopy(**kwargs: Any) -> UMamba:
    """U-Mamba Enc as planned for Endoscopy, 47.68M parameters."""
    return _create("enc", ENDOSCOPY, kwargs)


@register_network(_cfg("bot", MICROSCOPY, ("Microscopy F1", "0.5389±0.2817*")), twin=True)
def umamba_bot_2d_microscopy(**kwargs: Any) -> UMamba:
    """U-Mamba Bot as planned for Microscopy, 64.80M parameters."""
    return _create("bot", MICROSCOPY, kwargs)


@register_network(_cfg("enc", MICROSCOPY, ("Microscopy F1", "0.5607±0.2784")), twin=True)
def umamba_enc_2d_microscopy(**kwargs: Any) -> UMamba:
    """U-Mamba Enc as planned for Microscopy, 64.01M parameters."""
    return _create("enc", MICROSCOPY, kwargs)


@register_network(_cfg("bot", _MICRO_2D), twin=True)
def test_umamba_bot(**kwargs: Any) -> UMamba:
    """A micro network for tests."""
    return _create("bot", _MICRO_2D, kwargs)


@register_network(_cfg("enc", _MICRO_3D), twin=True)
def test_umamba_enc(**kwargs: Any) -> UMamba:
    """A micro network for tests; its deepest stage takes channels for tokens."""
    return _create("enc", _MICRO_3D, kwargs)
