"""The scans of segmenters, and what stands in their place in the twins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ssmvision.layers import SS2D, GatedConv, Mamba

__all__ = ["mamba_or_twin", "mixer_or_twin", "ss2d_or_twin"]


def ss2d_or_twin(mixer: str, d_state: int = 16) -> Callable[..., nn.Module]:
    """`mixer_or_twin` of maps (b, h, w, dim): "ss2d" is the gated scan of VMamba v0."""
    return mixer_or_twin(mixer, "ss2d", SS2D, d_state=d_state, conv_bias=True, gate=True)


def mamba_or_twin(mixer: str, d_state: int = 16) -> Callable[..., nn.Module]:
    """`mixer_or_twin` of tokens (b, l, dim)."""
    return mixer_or_twin(mixer, "mamba", Mamba, d_state=d_state)


def mixer_or_twin(mixer: str, name: str, scan: type[nn.Module], **kwargs: Any) -> Callable[..., nn.Module]:
    """What builds the mixer of a block from its channels.

    Args:
        mixer: `name`, or "none" for a gated convolution of as many parameters.
        name: What the scan is called.
        scan: The layer that scans.
        **kwargs: Its arguments after the channels.
    """
    make = partial(scan, **kwargs)
    if mixer == name:
        return make
    if mixer != "none":
        raise ValueError(f"mixer must be {name!r} or 'none', not {mixer!r}")
    conv = {"d_conv": 3, "spatial_dims": 2} if scan is SS2D else {"d_conv": 4, "spatial_dims": 1}
    return lambda dim, **dd: GatedConv.matching(make(dim, device="meta"), dim, **conv, **dd)
