"""What nnU-Net plans: checks of it, and the sizes for the data sets of U-Mamba's paper.

The sizes are those of the paper's table; no plans were published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssmvision.segmentation._shapes import check_spatial_dims

__all__ = [
    "ABDOMEN_CT",
    "ABDOMEN_MR",
    "ABDOMEN_MR_2D",
    "ENDOSCOPY",
    "MICROSCOPY",
    "blocks_per_stage",
    "check_plan",
    "nnunet_plan",
    "per_axis",
]


def check_plan(
    network: str, spatial_dims: int, stages: int, kernel_sizes: Sequence[Any], strides: Sequence[Any]
) -> None:
    """Raise a ValueError for a plan of nnU-Net's kind that contradicts itself."""
    check_spatial_dims(network, spatial_dims, 2, 3)
    if stages < 2 or len(kernel_sizes) != stages or len(strides) != stages:
        raise ValueError(
            f"{network}: features_per_stage, kernel_sizes and strides must be of one length, at least 2; they are of "
            f"{stages}, {len(kernel_sizes)} and {len(strides)}"
        )


def blocks_per_stage(network: str, blocks: int | Sequence[int], stages: int) -> list[int]:
    """A number of blocks for each stage, from a list of them or one for all."""
    numbers = [blocks] * stages if isinstance(blocks, int) else list(blocks)
    if len(numbers) != stages:
        raise ValueError(f"{network}: {stages} stages need as many numbers of blocks, not {len(numbers)}")
    return numbers


def per_axis(value: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """A kernel size or stride for each axis."""
    return (value,) * spatial_dims if isinstance(value, int) else tuple(value)


def nnunet_plan(
    patch_size: Sequence[int], features: Sequence[int], in_channels: int, out_channels: int
) -> dict[str, Any]:
    """Arguments of a network that halves its axes in every stage but the first, depth neither in the second nor last.

    Args:
        patch_size: Size of the input per axis.
        features: Channels of each stage.
        in_channels: Input channels.
        out_channels: Classes, the background included.
    """
    n, dims = len(features), len(patch_size)
    strides, kernels = [(1,) * dims] + [(2,) * dims] * (n - 1), [(3,) * dims] * n
    if dims == 3:
        strides[1] = strides[-1] = (1, 2, 2)
        kernels[0] = (1, 3, 3)
    return {
        "spatial_dims": dims, "in_channels": in_channels, "out_channels": out_channels,
        "features_per_stage": tuple(features), "kernel_sizes": kernels, "strides": strides,
        "patch_size": tuple(patch_size),
    }  # fmt: skip


_FEATURES_3D = (32, 64, 128, 256, 320, 320)
_FEATURES_2D = (32, 64, 128, 256, 512, 512, 512)

ABDOMEN_CT = nnunet_plan((40, 224, 192), _FEATURES_3D, 1, 14)
ABDOMEN_MR = nnunet_plan((48, 160, 224), _FEATURES_3D, 1, 14)
ABDOMEN_MR_2D = nnunet_plan((320, 320), _FEATURES_2D, 1, 14)
ENDOSCOPY = nnunet_plan((384, 640), _FEATURES_2D, 3, 8)
MICROSCOPY = nnunet_plan((512, 512), (*_FEATURES_2D, 512), 3, 3)
