"""The scans of segmenters, and what stands in their place in the twins."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ssmvision.layers import SS2D, GatedConv, Mamba

__all__ = ["mamba_or_twin", "ss2d_or_twin"]


def ss2d_or_twin(mixer: str, d_state: int = 16) -> Callable[..., nn.Module]:
    """What builds the mixer of maps (b, h, w, dim) from their channels.

    Args:
        mixer: "ss2d", the gated scan of VMamba v0, or "none", a gated convolution of as many parameters.
        d_state: Size of the state of the scans.
    """
    ss2d = partial(SS2D, d_state=d_state, conv_bias=True, gate=True)
    return _or_twin(mixer, "ss2d", ss2d, d_conv=3, spatial_dims=2)


def mamba_or_twin(mixer: str, d_state: int = 16) -> Callable[..., nn.Module]:
    """What builds the mixer of tokens (b, l, dim) from their channels.

    Args:
        mixer: "mamba", or "none", a gated convolution of as many parameters.
        d_state: Size of the state of the scans.
    """
    return _or_twin(mixer, "mamba", partial(Mamba, d_state=d_state), d_conv=4, spatial_dims=1)


def _or_twin(mixer: str, name: str, scan: Callable[..., nn.Module], **conv: Any) -> Callable[..., nn.Module]:
    if mixer == name:
        return scan
    if mixer != "none":
        raise ValueError(f"mixer must be {name!r} or 'none', not {mixer!r}")
    return lambda dim, **dd: GatedConv.matching(scan(dim, device="meta"), dim, **conv, **dd)
