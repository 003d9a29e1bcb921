"""The door for nnU-Net 2: what `architecture.network_class_name` of a plans file may name.

    "architecture": {
        "network_class_name": "ssmvision.segmentation.nnunet.umamba_bot",
        "arch_kwargs": {... as nnU-Net planned ..., "patch_size": [...] for umamba_enc, "mixer": "none" for a twin},

nnU-Net's own trainer, without another, then builds the network, trains it and predicts with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ssmvision.segmentation._blocks import CONVS
from ssmvision.segmentation.lkm_unet import LKMUNet
from ssmvision.segmentation.umamba import UMamba

__all__ = ["lkm_unet", "umamba_bot", "umamba_enc"]


def umamba_bot(**plan: Any) -> UMamba:
    """U-Mamba with a Mamba layer at the bottleneck, from what `_arguments` takes.

    Raises:
        ValueError: The plan asks for layers that the network does not have.
    """
    return UMamba(placement="bot", **_arguments(**plan))


def umamba_enc(patch_size: Sequence[int] | None = None, **plan: Any) -> UMamba:
    """U-Mamba with Mamba layers throughout the encoder; nnU-Net plans no `patch_size`, add that of the configuration.

    Raises:
        ValueError: `patch_size` is missing; the plan asks for layers that the network does not have.
    """
    return UMamba(placement="enc", patch_size=patch_size, **_arguments(**plan))


def lkm_unet(**plan: Any) -> LKMUNet:
    """LKM-UNet, from what `_arguments` takes.

    Raises:
        ValueError: The plan asks for layers that the network does not have.
    """
    return LKMUNet(**_arguments(**plan))


def _arguments(
    input_channels: int,
    num_classes: int,
    n_stages: int,
    features_per_stage: Sequence[int],
    conv_op: Any,
    kernel_sizes: Sequence[Any],
    strides: Sequence[Any],
    n_conv_per_stage_decoder: Sequence[int],
    n_conv_per_stage: Sequence[int] | None = None,
    n_blocks_per_stage: Sequence[int] | None = None,
    conv_bias: bool = True,
    deep_supervision: bool = False,
    mixer: str = "mamba",
    **layers: Any,
) -> dict[str, Any]:
    """Our arguments from those of nnU-Net; `layers` must be its defaults, which these networks are made of."""
    dims = {conv: spatial_dims for spatial_dims, conv in CONVS.items()}
    if conv_op not in dims:
        raise ValueError(f"conv_op must be Conv2d or Conv3d, not {conv_op}")
    if len(features_per_stage) != n_stages:
        raise ValueError(f"n_stages={n_stages}, but features_per_stage has {len(features_per_stage)} entries")
    blocks = n_blocks_per_stage if n_conv_per_stage is None else n_conv_per_stage
    if blocks is None:
        raise ValueError("a plan gives n_blocks_per_stage or n_conv_per_stage")
    _check_layers(layers, dims[conv_op])
    return {
        "spatial_dims": dims[conv_op], "in_channels": input_channels, "out_channels": num_classes,
        "features_per_stage": features_per_stage, "kernel_sizes": kernel_sizes, "strides": strides,
        "n_conv_per_stage": blocks, "n_conv_per_stage_decoder": n_conv_per_stage_decoder,
        "conv_bias": conv_bias, "deep_supervision": deep_supervision, "mixer": mixer,
    }  # fmt: skip


def _check_layers(layers: Mapping[str, Any], spatial_dims: int) -> None:
    norm, nonlin = f"InstanceNorm{spatial_dims}d", "LeakyReLU"
    given = {name: getattr(value, "__name__", value) for name, value in layers.items()}
    right = {
        "norm_op": (norm,), "norm_op_kwargs": ({"eps": 1e-5, "affine": True},),
        "dropout_op": (None,), "dropout_op_kwargs": (None, {}), "nonlin": (nonlin,),
        "nonlin_kwargs": (None, {}, {"inplace": True}, {"inplace": False}),
    }  # fmt: skip
    for name, value in given.items():
        if name not in right:
            raise ValueError(f"these networks take no {name} from a plan")
        if value not in right[name]:
            raise ValueError(f"these networks are made with {name}={right[name][0]!r}; the plan says {value!r}")
