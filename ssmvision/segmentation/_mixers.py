"""The scans of segmenters, what stands in their place in the twins, and the precision that they run in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssmvision.layers import SS2D, GatedConv, Mamba
from ssmvision.ops._library import no_autocast

__all__ = ["MakeMixer", "check_mixer", "in_full_precision", "mamba_or_twin", "mixer_or_twin", "ss2d_or_twin"]

# What builds the mixer of a block from its channels.
MakeMixer = Callable[..., nn.Module]


def ss2d_or_twin(network: str, mixer: str, d_state: int = 16) -> MakeMixer:
    """`mixer_or_twin` of maps (b, h, w, dim): "ss2d" is the gated scan of VMamba v0."""
    return mixer_or_twin(network, mixer, "ss2d", SS2D, d_state=d_state, conv_bias=True, gate=True)


def mamba_or_twin(network: str, mixer: str, d_state: int = 16) -> MakeMixer:
    """`mixer_or_twin` of tokens (b, l, dim)."""
    return mixer_or_twin(network, mixer, "mamba", Mamba, d_state=d_state)


def mixer_or_twin(network: str, mixer: str, name: str, scan: type[nn.Module], **kwargs: Any) -> MakeMixer:
    """What builds the mixers of a network, or of its twin.

    Args:
        network: Name for the error.
        mixer: `name`, or "none" for a gated convolution of as many parameters.
        name: What the scan is called.
        scan: The layer that scans.
        **kwargs: Its arguments after the channels.

    Raises:
        ValueError: `mixer` is neither.
    """
    check_mixer(network, mixer, name)
    make = partial(scan, **kwargs)
    if mixer == name:
        return make
    conv = {"d_conv": 3, "spatial_dims": 2} if scan is SS2D else {"d_conv": 4, "spatial_dims": 1}

    def twin(dim: int, **dd: Any) -> nn.Module:
        with torch.device("meta"):
            counted = make(dim)
        return GatedConv.matching(counted, dim, **conv, **dd)

    return twin


def check_mixer(network: str, mixer: str, name: str) -> None:
    """Raise a ValueError for a mixer that is neither the one called `name` nor "none"."""
    if mixer not in (name, "none"):
        raise ValueError(f"{network}: mixer must be {name!r} or 'none' (the twin without an SSM), not {mixer!r}")


def in_full_precision(mix: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """mix(x) in the precision of `weight`, even under autocast: in half precision what surrounds a scan overflows."""
    with no_autocast(x):
        return mix(x.to(weight.dtype))
