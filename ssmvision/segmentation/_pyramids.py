"""Networks over the maps of any hierarchical backbone: their encoder, their names, and their twins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.models._builder import convert_state_dict
from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.segmentation._mixers import check_mixer
from ssmvision.segmentation._shapes import check_input, check_spatial_dims

__all__ = ["PyramidNetwork", "cropped", "padded", "register_over_encoders"]


def padded(x: Tensor, stride: int) -> Tensor:
    """Maps (b, c, *size) with zeros at their ends, up to a multiple of `stride` that is at least the second.

    Training cannot normalize a map of one position, so the coarsest one gets two along each axis.
    """
    short = [max(2, math.ceil(side / stride)) * stride - side for side in x.shape[2:]]
    return F.pad(x, [pad for missing in reversed(short) for pad in (0, missing)]) if any(short) else x


def cropped(x: Tensor, size: Sequence[int]) -> Tensor:
    """The beginnings of maps (b, c, ...) along each axis: (b, c, *size)."""
    for axis, side in enumerate(size, start=2):
        x = x.narrow(axis, 0, side)
    return x


class PyramidNetwork(nn.Module):
    """A backbone whose maps a subclass decodes: (b, in_channels, h, w) of any size → logits (b, out_channels, h, w).

    Zeros fill the images up to the backbone's stride; what they lead to is cut off.

    Args:
        spatial_dims: 2.
        in_channels: Input channels.
        out_channels: Classes, the background included.
        encoder: Name of a hierarchical backbone of this package or of timm.
        encoder_kwargs: Further arguments of the backbone, such as `pretrained=True`.

    Raises:
        ValueError: Unknown encoders, such as have no pyramid of maps; wrong inputs.
    """

    encoder_keys = "encoder."

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        encoder: str,
        encoder_kwargs: Mapping[str, Any] | None,
    ) -> None:
        network = type(self).__name__
        check_spatial_dims(network, spatial_dims, 2)
        super().__init__()
        self.in_channels, self.out_channels, self.backbone = in_channels, out_channels, encoder
        self.encoder = _create_encoder(network, encoder, in_channels, encoder_kwargs or {})
        info: Any = self.encoder.feature_info
        self.widths, self.reductions = info.channels(), info.reduction()
        if len(self.widths) < 2 or any(c <= f or c % f for f, c in pairwise(self.reductions)):
            raise ValueError(
                f"{network}: the encoder must be a hierarchical backbone, each map coarser than the one before; "
                f"{encoder} has strides {tuple(self.reductions)}"
            )
        self.channels_last = str(getattr(self.encoder, "output_fmt", "NCHW")).endswith("NHWC")

    def from_backbone(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the backbone under our keys; timm joins the first two parts of a key where it takes maps out."""
        with torch.device("meta"):
            whole = timm.create_model(self.backbone)
        own, found = self.encoder.state_dict(), convert_state_dict(whole, dict(weights))
        joined = {key.replace(".", "_", 1): key for key in found}
        return {f"encoder.{name if name in own else key}": found[key] for name, key in joined.items()}

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) → logits (b, out_channels, h, w)."""
        check_input(type(self).__name__, x, self.in_channels, (1, 1))
        maps = self.encoder(padded(x, self.reductions[-1]))
        return cropped(self.decode([m.permute(0, 3, 1, 2) for m in maps] if self.channels_last else maps), x.shape[2:])

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Maps (b, widths[i], h / reductions[i], w / reductions[i]), finest first → logits (b, out_channels, h, w)."""
        raise NotImplementedError


def _create_encoder(network: str, name: str, in_channels: int, kwargs: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        raise ValueError(f"{network}: there is no encoder named {name!r}; timm.list_models() names all")
    try:
        return timm.create_model(name, features_only=True, in_chans=in_channels, **kwargs)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{network}: the encoder must be a hierarchical backbone; {name} gives no maps: {error}"
        ) from error


@dataclass(frozen=True)
class _Encoder:
    """A backbone, and the widths and depths of the ConvNeXt that stands in its place in twins.

    Whole networks differ from their twins by less than 3 % in parameters.
    """

    name: str
    dims: tuple[int, ...]
    depths: tuple[int, ...]


# What the names of networks end in.
_ENCODERS = {
    "vmamba_tiny": _Encoder("vmamba_tiny_s1l8", (96, 192, 384, 768), (3, 3, 10, 3)),
    "mambavision_tiny": _Encoder("mambavision_tiny", (80, 160, 320, 640), (3, 3, 15, 5)),
    "vssd_tiny": _Encoder("vssd_tiny", (64, 128, 256, 512), (3, 3, 15, 7)),
    "efficientvmamba_tiny": _Encoder("efficientvmamba_tiny", (48, 96, 192, 384), (2, 2, 6, 3)),
}
_MICRO = _Encoder("test_vmamba", (16, 32, 64, 128), (1, 1, 5, 1))


def register_over_encoders(
    prefix: str, title: str, network: type[PyramidNetwork], cfg: NetworkCfg, **micro: Any
) -> None:
    """Register a network over every encoder, with twins over ConvNeXts: `<prefix>_<encoder>` and `test_<prefix>`.

    Args:
        prefix: What names begin with.
        title: What the network is called in prose.
        network: Its class.
        cfg: What is known of it, to which what holds for every encoder is added.
        **micro: Arguments of the micro network.
    """
    for name, encoder in _ENCODERS.items():
        _register(f"{prefix}_{name}", title, network, encoder, cfg, {})
    _register(f"test_{prefix}", title, network, _MICRO, replace(cfg, input_size=(3, 64, 64)), micro)


def _register(
    name: str, title: str, network: type[PyramidNetwork], encoder: _Encoder, cfg: NetworkCfg, args: Mapping[str, Any]
) -> None:
    def entrypoint(mixer: str = "ssm", **kwargs: Any) -> PyramidNetwork:
        check_mixer(name, mixer, "ssm")
        kwargs = {**args, **kwargs}
        if mixer == "ssm":
            return network(encoder=encoder.name, **kwargs)
        convnext = {"dims": encoder.dims, "depths": encoder.depths} | (kwargs.pop("encoder_kwargs", None) or {})
        return network(encoder="convnext_tiny", encoder_kwargs=convnext, **kwargs)

    entrypoint.__name__, entrypoint.__module__ = name, network.__module__
    entrypoint.__doc__ = f"{title} with {encoder.name} as its encoder."
    caveats = (
        "The combination is this package's own: it has neither weights nor reported results.",
        "The twin has another encoder in the place of the whole one, so what differs is more than the SSM.",
        f"Pretrained weights of the encoder (encoder_weights=True) keep the licence that the card of {encoder.name} "
        "states; some allow no commercial use.",
    )
    convnext = f"a ConvNeXt of widths {encoder.dims} and depths {encoder.depths}"
    instead = f"{convnext} in the place of the encoder {encoder.name}"
    register_network(replace(cfg, caveats=caveats, instead=instead), twin=True)(entrypoint)
