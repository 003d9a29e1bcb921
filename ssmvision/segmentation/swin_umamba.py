"""Swin-UMamba: U-Nets for pictures whose encoder is VMamba-T, with a convolutional or (D) a VSS decoder.

Paper: `Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining` - https://arxiv.org/abs/2402.03302
Official code (Apache-2.0): https://github.com/JiarunLiu/Swin-UMamba
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.models import named_apply
from torch import Tensor, nn

from ssmvision.layers.vss_block import PatchMerging, PatchStem
from ssmvision.models._init import init_linear
from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.models._official import OfficialModel, Tap, as_is, nhwc, refuse_unpublished, rename
from ssmvision.segmentation._blocks import drop_path_rates
from ssmvision.segmentation._mixers import MakeMixer, ss2d_or_twin
from ssmvision.segmentation._shapes import check_input, check_spatial_dims
from ssmvision.segmentation._unetr import UNETR_RENAMES, ResBlock, UpBlock
from ssmvision.segmentation._vss import VSS_RENAMES, PatchExpand, from_vmamba, make_layer

__all__ = ["SwinUMamba", "SwinUMambaD"]


class VSSEncoder(nn.Module):
    """VMamba-T with its downsampling beside the layers: (b, in_channels, h, w) → a map of every stage."""

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        dims: Sequence[int],
        depths: Sequence[int],
        make: MakeMixer,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        if len(dims) != len(depths):
            raise ValueError(f"Swin-UMamba has as many depths as stages, {len(dims)}, not {tuple(depths)}")
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = PatchStem(in_channels, dims[0], patch_size)
        self.layers = nn.ModuleList(make_layer(dim, rate, make) for dim, rate in zip(dims, rates, strict=True))
        self.downsamples = nn.ModuleList(PatchMerging(dim, wider) for dim, wider in pairwise(dims))
        named_apply(init_linear, self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(b, in_channels, h, w) → the maps of every stage before its downsampling, finest first."""
        maps = [self.layers[0](self.patch_embed(x))]
        for downsample, layer in zip(self.downsamples, self.layers[1:], strict=True):
            maps.append(layer(downsample(maps[-1])))
        return maps


class SwinUMamba(nn.Module):
    """Swin-UMamba: (b, in_channels, h, w) → logits (b, out_channels, h, w), for sides that are multiples of 32.

    `load_encoder` gives the encoder the weights of VMamba-T, as the paper does; those of its stem fit D alone.

    Args:
        spatial_dims: 2.
        in_channels: Input channels.
        out_channels: Classes.
        features: Channels of each resolution, of the stem (Swin-UMamba alone has one) and of each stage; None for 48,
            96, 192, 384 and 768, of which the first is the stem's.
        depths: Blocks of each stage.
        deep_supervision: Return logits of all heads instead, finest first: at 1, 1/2, 1/4 and 1/8 of the resolution,
            of Swin-UMamba-D at 1, 1/4, 1/8 and 1/16.
        d_state: Size of the state of the scans.
        drop_path_rate: Largest stochastic depth rate of the encoder.
        mixer: "ss2d", or "none" for gated convolutions instead of the scans.
    """

    name = "Swin-UMamba"
    default_features: tuple[int, ...] = (48, 96, 192, 384, 768)
    backbone, encoder_keys = "vmamba_v0_tiny", "vssm_encoder."
    _places: tuple[tuple[str, Any], ...] = (
        (r"^stages\.(\d)\.downsample", lambda match: f"vssm_encoder.downsamples.{int(match[1]) - 1}"),
        (r"^stages", "vssm_encoder.layers"),
    )

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        out_channels: int = 2,
        features: Sequence[int] | None = None,
        depths: Sequence[int] = (2, 2, 9, 2),
        deep_supervision: bool = False,
        d_state: int = 16,
        drop_path_rate: float = 0.0,
        mixer: str = "ss2d",
    ) -> None:
        check_spatial_dims(self.name, spatial_dims, 2)
        super().__init__()
        self.in_channels = in_channels
        make = ss2d_or_twin(self.name, mixer, d_state)
        features = features or self.default_features
        self.vssm_encoder = self._make_encoder(features, depths, make, drop_path_rate)
        self._make_decoder(features, out_channels, deep_supervision, make)

    def _make_encoder(
        self, features: Sequence[int], depths: Sequence[int], make: MakeMixer, drop_path_rate: float
    ) -> VSSEncoder:
        conv = nn.Conv2d(self.in_channels, features[0], 7, stride=2, padding=3)
        self.stem = nn.Sequential(conv, nn.InstanceNorm2d(features[0], affine=True))
        return VSSEncoder(features[0], 2, features[1:], depths, make, drop_path_rate)

    def _make_decoder(
        self, features: Sequence[int], out_channels: int, deep_supervision: bool, make: MakeMixer
    ) -> None:
        wider = [self.in_channels, *features]
        self.encoders = nn.ModuleList(ResBlock(2, wide, out) for wide, out in zip(wider, features, strict=False))
        below = [features[-1], *features[::-1]]
        self.decoders = nn.ModuleList(UpBlock(2, deep, out) for deep, out in zip(below, features[::-1], strict=False))
        self.last = ResBlock(2, features[0], features[0])
        self.out_layers = nn.ModuleList(nn.Conv2d(dim, out_channels, 1) for dim in features[:-1])
        self.deep_supervision = deep_supervision

    def from_backbone(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of VMamba v0 under our keys."""
        return from_vmamba(weights, self, self._places)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(b, in_channels, h, w) → (b, out_channels, h, w), or a list with `deep_supervision`."""
        divisor = 4 * 2 ** (len(self.vssm_encoder.layers) - 1)
        check_input(self.name, x, self.in_channels, (divisor, divisor))
        return self._segment(x)

    def _segment(self, x: Tensor) -> Tensor | list[Tensor]:
        stem = self.stem(x)
        *maps, deepest = self.vssm_encoder(stem)
        skips = [encoder(features) for encoder, features in zip(self.encoders, [x, stem, *maps], strict=True)]
        decoded = [deepest]
        for decoder, skip in zip(self.decoders, skips[::-1], strict=True):
            decoded.append(decoder(decoded[-1], skip))
        decoded[-1] = self.last(decoded[-1])
        heads = list(zip(self.out_layers, decoded[::-1], strict=False))
        return _predict(heads, self.deep_supervision)


def _predict(heads: Sequence[tuple[nn.Module, Tensor]], deep_supervision: bool) -> Tensor | list[Tensor]:
    """The logits of the first head, or of all; as officially, the others exist even where nothing supervises them."""
    logits = [head(features) for head, features in heads[: None if deep_supervision else 1]]
    return logits if deep_supervision else logits[0]


class VSSDecoder(nn.Module):
    """Patch expanding, concatenation with a skip and two VSS blocks per stage, and a patch expanding by 4."""

    def __init__(self, dims: Sequence[int], out_channels: int, deep_supervision: bool, make: MakeMixer) -> None:
        super().__init__()
        below, dims = dims[:0:-1], dims[-2::-1]
        self.expand_layers = nn.ModuleList(PatchExpand(deep, dim) for deep, dim in zip(below, dims, strict=True))
        self.expand_layers.append(PatchExpand(dims[-1], dims[-1], 4))
        self.concat_back_dim = nn.ModuleList(nn.Linear(2 * dim, dim) for dim in dims)
        self.stages = nn.ModuleList(make_layer(dim, [0.0, 0.0], make) for dim in dims)
        named_apply(init_linear, self)
        self.seg_layers = nn.ModuleList(nn.Conv2d(dim, out_channels, 1) for dim in [*dims, dims[-1]])
        self.deep_supervision = deep_supervision

    def forward(self, maps: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Maps of every stage, finest first → logits, or with `deep_supervision` a list of them, finest first."""
        x = maps[-1]
        decoded = []
        for index, skip in enumerate(maps[-2::-1]):
            x = torch.cat([self.expand_layers[index](x), skip], dim=1).permute(0, 2, 3, 1)
            x = self.stages[index](self.concat_back_dim[index](x).permute(0, 3, 1, 2))
            decoded.append(x)
        decoded.append(self.expand_layers[-1](x))
        heads = list(zip(self.seg_layers, decoded, strict=True))[::-1]
        return _predict(heads, self.deep_supervision)


class SwinUMambaD(SwinUMamba):
    """Swin-UMamba-D: no stem, and a decoder of VSS blocks; otherwise, with its arguments, as Swin-UMamba."""

    name = "Swin-UMamba-D"
    default_features = (96, 192, 384, 768)
    _places = (*SwinUMamba._places, (r"^patch_embed", "vssm_encoder.patch_embed"))

    def _make_encoder(
        self, features: Sequence[int], depths: Sequence[int], make: MakeMixer, drop_path_rate: float
    ) -> VSSEncoder:
        return VSSEncoder(self.in_channels, 4, features, depths, make, drop_path_rate)

    def _make_decoder(
        self, features: Sequence[int], out_channels: int, deep_supervision: bool, make: MakeMixer
    ) -> None:
        self.decoder = VSSDecoder(features, out_channels, deep_supervision, make)

    def _segment(self, x: Tensor) -> Tensor | list[Tensor]:
        return self.decoder(self.vssm_encoder(x))


# Official key → ours, outside of what is made of VSS blocks.
_RENAMES = (
    *UNETR_RENAMES,
    (r"^encoder(\d)", lambda match: f"encoders.{int(match[1]) - 1}"),
    (r"^decoder1", "last"),
    (r"^decoder(\d)", lambda match: f"decoders.{6 - int(match[1])}"),
)


def _ours(key: str) -> str:
    return rename(key, VSS_RENAMES if key.startswith(("vssm_encoder.", "decoder.")) else _RENAMES)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged."""
    return {_ours(key): value for key, value in state_dict.items()}


def from_official(official_class: str, kwargs: Mapping[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `SwinUMamba` or `SwinUMambaD`."""
    shared = {
        "depths": kwargs.get("depths", (2, 2, 9, 2)),
        "deep_supervision": kwargs.get("deep_supervision", False),
        "drop_path_rate": kwargs.get("drop_path_rate", 0.2),
    }
    if official_class.startswith("SwinUMambaD"):
        refuse_unpublished("Swin-UMamba-D", kwargs, {"patch_size": (4,)})
        dims = kwargs.get("dims", 96)
        dims = [dims * 2**i for i in range(len(shared["depths"]))] if isinstance(dims, int) else list(dims)
        _demand("features_per_stage", kwargs, dims)
        d = SwinUMambaD(2, kwargs.get("in_chans", 3), kwargs["num_classes"], dims, **shared)
        return OfficialModel(d, lambda name: [Tap(name, as_is if "seg_layers" in name else nhwc)])
    features = list(kwargs.get("feat_size", (48, 96, 192, 384, 768)))
    _demand("dims", kwargs, features[1:])
    _demand("hidden_size", kwargs, features[-1])
    model = SwinUMamba(2, kwargs.get("in_chans", 1), kwargs.get("out_chans", 13), features, **shared)
    return OfficialModel(model, lambda name: [Tap(_ours(name), nhwc if name.startswith("vssm_encoder") else as_is)])


def _demand(name: str, kwargs: Mapping[str, Any], value: Any) -> None:
    given = kwargs.get(name, value)
    if (list(given) if isinstance(value, list) else given) != value:
        raise ValueError(f"{name} must be {value} to fit the other widths, not {given}")


def _cfg(*input_size: int, **fields: Any) -> NetworkCfg:
    common = {
        "paper_name": "Swin-UMamba: Mamba-based UNet with ImageNet-based pretraining", "paper_ids": "arXiv:2402.03302",
        "origin_url": "https://github.com/JiarunLiu/Swin-UMamba", "license": "Apache-2.0", "input_size": input_size,
        "by_hand": "the Google Drive folder linked in https://github.com/JiarunLiu/Swin-UMamba",
        "results_source": "https://arxiv.org/abs/2402.03302",
        "caveats": (
            "The results rest on an encoder trained on ImageNet, with which encoder_weights=True starts this one.",
        ),
    }  # fmt: skip
    return NetworkCfg(**(common | fields))


# Channels and classes of the data sets.
_ABDOMEN_MR: dict[str, Any] = {"in_channels": 1, "out_channels": 14}
_ENDOSCOPY: dict[str, Any] = {"in_channels": 3, "out_channels": 8}
_MICROSCOPY: dict[str, Any] = {"in_channels": 3, "out_channels": 3}


@register_network(_cfg(1, 320, 320, results=(("AbdomenMR DSC", "0.7760*"), ("AbdomenMR NSD", "0.8421*"))), twin=True)
def swin_umamba(**kwargs: Any) -> SwinUMamba:
    """Swin-UMamba, 59.9M parameters, for AbdomenMR."""
    return SwinUMamba(**(_ABDOMEN_MR | kwargs))


@register_network(_cfg(3, 384, 640, results=(("Endoscopy DSC", "0.6767*"), ("Endoscopy NSD", "0.6922*"))), twin=True)
def swin_umamba_endoscopy(**kwargs: Any) -> SwinUMamba:
    """Swin-UMamba, 59.9M parameters, for Endoscopy."""
    return SwinUMamba(**(_ENDOSCOPY | kwargs))


@register_network(_cfg(3, 512, 512, results=(("Microscopy F1", "0.5806*"),)), twin=True)
def swin_umamba_microscopy(**kwargs: Any) -> SwinUMamba:
    """Swin-UMamba, 59.9M parameters, for Microscopy."""
    return SwinUMamba(**(_MICROSCOPY | kwargs))


@register_network(_cfg(1, 320, 320, results=(("AbdomenMR DSC", "0.7705*"), ("AbdomenMR NSD", "0.8376*"))), twin=True)
def swin_umamba_d(**kwargs: Any) -> SwinUMambaD:
    """Swin-UMamba-D, 27.5M parameters, for AbdomenMR."""
    return SwinUMambaD(**(_ABDOMEN_MR | kwargs))


@register_network(_cfg(3, 384, 640, results=(("Endoscopy DSC", "0.6783*"), ("Endoscopy NSD", "0.6933*"))), twin=True)
def swin_umamba_d_endoscopy(**kwargs: Any) -> SwinUMambaD:
    """Swin-UMamba-D, 27.5M parameters, for Endoscopy."""
    return SwinUMambaD(**(_ENDOSCOPY | kwargs))


@register_network(_cfg(3, 512, 512, results=(("Microscopy F1", "0.5935* (uncertain)"),)), twin=True)
def swin_umamba_d_microscopy(**kwargs: Any) -> SwinUMambaD:
    """Swin-UMamba-D, 27.5M parameters, for Microscopy."""
    return SwinUMambaD(**(_MICROSCOPY | kwargs))


_MICRO: dict[str, Any] = {"in_channels": 1, "out_channels": 2, "depths": (1, 1, 1, 1), "d_state": 4}


@register_network(_cfg(1, 64, 64, by_hand=""), twin=True)
def test_swin_umamba(**kwargs: Any) -> SwinUMamba:
    """A micro network for tests."""
    return SwinUMamba(**(_MICRO | {"features": (4, 8, 16, 32, 64)} | kwargs))


@register_network(_cfg(1, 64, 64, by_hand=""), twin=True)
def test_swin_umamba_d(**kwargs: Any) -> SwinUMambaD:
    """A micro network for tests."""
    return SwinUMambaD(**(_MICRO | {"features": (8, 16, 32, 64)} | kwargs))
