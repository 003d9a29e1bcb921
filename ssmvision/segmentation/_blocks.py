"""What several segmenters are made of: convolution blocks, the Mamba mixer or its twin, and checks of the input."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmvision.layers import GatedConv
from ssmvision.ops._library import no_autocast

__all__ = [
    "CONVS",
    "NNUNET_COPIES",
    "TRANSPOSED_CONVS",
    "ConvNormAct",
    "Decoder",
    "ResidualBlockD",
    "blocks_per_stage",
    "check_mixer",
    "check_plan",
    "check_volume",
    "in_full_precision",
    "init_residual_unet_",
    "instance_norm",
    "matching_twin",
    "one_copy",
    "per_axis",
    "reported",
]  # fmt: skip

CONVS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED_CONVS: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOLS: dict[int, Any] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
_NORMS: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def instance_norm(spatial_dims: int, channels: int, affine: bool = True) -> nn.Module:
    """Instance norm with torch's epsilon of 1e-5."""
    return _NORMS[spatial_dims](channels, affine=affine)


def per_axis(value: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """A kernel size or stride for each axis."""
    return (value,) * spatial_dims if isinstance(value, int) else tuple(value)


def check_mixer(family: str, mixer: str) -> None:
    """Raise a ValueError for a mixer that is neither Mamba nor its twin."""
    if mixer not in ("mamba", "none"):
        raise ValueError(f"{family}: mixer must be 'mamba' or 'none' (the twin without an SSM), not {mixer!r}")


def check_plan(
    family: str, spatial_dims: int, stages: int, kernel_sizes: Sequence[Any], strides: Sequence[Any]
) -> None:
    """Raise a ValueError for a plan of nnU-Net's kind that contradicts itself."""
    if spatial_dims not in CONVS:
        raise ValueError(f"{family}: spatial_dims must be 2 or 3, not {spatial_dims}")
    if stages < 2 or len(kernel_sizes) != stages or len(strides) != stages:
        raise ValueError(
            f"{family}: features_per_stage, kernel_sizes and strides must be of one length, at least 2; they are of "
            f"{stages}, {len(kernel_sizes)} and {len(strides)}"
        )


def blocks_per_stage(family: str, blocks: int | Sequence[int], stages: int) -> list[int]:
    """A number of blocks for each stage, from a list of them or one for all."""
    numbers = [blocks] * stages if isinstance(blocks, int) else list(blocks)
    if len(numbers) != stages:
        raise ValueError(f"{family}: {stages} stages need as many numbers of blocks, not {len(numbers)}")
    return numbers


def matching_twin(make: Callable[[], nn.Module], dim: int) -> GatedConv:
    """The gated convolution over tokens (b, l, dim) with as many parameters as what `make` builds."""
    with torch.device("meta"):
        mixer = make()
    return GatedConv.matching(mixer, dim)


def in_full_precision(mix: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """mix(x) in the precision of `weight`, even under autocast: in half precision what surrounds a scan overflows."""
    with no_autocast(x):
        return mix(x.to(weight.dtype))


def check_volume(
    family: str, x: Tensor, in_channels: int, divisors: Sequence[int], patch_size: Sequence[int] | None = None,
    why: str = "",
) -> None:  # fmt: skip
    """Raise a ValueError that names the rule which an input (b, c, *size) breaks.

    Args:
        family: Name for the error.
        x: The input.
        in_channels: Channels that the network takes.
        divisors: What the strides divide each axis by.
        patch_size: The only size that the weights work at, if they fix one.
        why: What fixes it.
    """
    size = tuple(x.shape[2:])
    if len(size) != len(divisors):
        raise ValueError(f"{family} takes inputs (b, c{', size' * len(divisors)}), not {tuple(x.shape)}")
    if x.shape[1] != in_channels:
        raise ValueError(f"{family} was built for in_channels={in_channels}; the input has {x.shape[1]}")
    if patch_size is not None and size != tuple(patch_size):
        raise ValueError(f"{family}: {why}; its patch_size is {tuple(patch_size)}, the input's {size}")
    if any(length % divisor for length, divisor in zip(size, divisors, strict=True)):
        raise ValueError(
            f"{family}: axes must be multiples of {tuple(divisors)}, the product of strides; {size} are not"
        )


class ConvNormAct(nn.Module):
    """Convolution, instance norm and, unless `act=False`, LeakyReLU(0.01): (b, c, *size) → (b, out, *size / stride)."""

    def __init__(
        self, spatial_dims: int, in_channels: int, channels: int, kernel_size: Sequence[int], stride: Any = 1,
        bias: bool = True, act: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        padding = tuple((k - 1) // 2 for k in kernel_size)
        self.conv = CONVS[spatial_dims](in_channels, channels, tuple(kernel_size), stride, padding, bias=bias)
        self.norm = instance_norm(spatial_dims, channels)
        self.act = nn.LeakyReLU(0.01) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ResidualBlockD(nn.Module):
    """Residual block of nnU-Net with the shortcut of ResNet-D: average pooling, then a normed 1x1 convolution."""

    def __init__(
        self, spatial_dims: int, in_channels: int, channels: int, kernel_size: Sequence[int],
        stride: Sequence[int] = (), bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        stride = tuple(stride) or (1,) * spatial_dims
        one = (1,) * spatial_dims
        self.conv1 = ConvNormAct(spatial_dims, in_channels, channels, kernel_size, stride, bias)
        self.conv2: Any = ConvNormAct(spatial_dims, channels, channels, kernel_size, bias=bias, act=False)
        skip: list[nn.Module] = [] if stride == one else [_POOLS[spatial_dims](stride, stride)]
        if in_channels != channels:
            skip.append(ConvNormAct(spatial_dims, in_channels, channels, one, bias=False, act=False))
        self.skip = nn.Sequential(*skip)
        self.act = nn.LeakyReLU(0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(self.conv1(x)) + self.skip(x))


def init_residual_unet_(network: nn.Module) -> None:
    """As nnU-Net starts its residual networks: He's convolutions, residual branches that begin at zero."""
    modules: list[Any] = list(network.modules())
    for module in modules:
        if type(module) in (*CONVS.values(), *TRANSPOSED_CONVS.values()):
            nn.init.kaiming_normal_(module.weight, a=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif type(module) is ResidualBlockD:
            nn.init.zeros_(module.conv2.norm.weight)


class Decoder(nn.Module):
    """Stages from the coarsest to the finest: upsampling, concatenation with the skip, a block, a classifier.

    Every stage has a classifier, but those of the coarser ones are used with `deep_supervision` alone, which may be
    switched at any time.
    """

    def __init__(self, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.upsample_layers, self.stages, self.seg_layers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.takes_skip: list[bool] = []

    def add_stage(self, upsample: nn.Module, block: nn.Module, classifier: nn.Module, takes_skip: bool = True) -> None:
        """Append the next finer stage."""
        self.upsample_layers.append(upsample)
        self.stages.append(block)
        self.seg_layers.append(classifier)
        self.takes_skip.append(takes_skip)

    def forward(self, skips: list[Tensor]) -> Tensor | list[Tensor]:
        """Logits of the finest stage; with deep supervision a list of those of every stage, finest first.

        Args:
            skips: Maps of the encoder, finest first; the last is where decoding begins.
        """
        x, outputs = skips[-1], []
        for stage, (upsample, block) in enumerate(zip(self.upsample_layers, self.stages, strict=True)):
            x = upsample(x)
            x = block(torch.cat([x, skips[-2 - stage]], dim=1) if self.takes_skip[stage] else x)
            if self.deep_supervision or stage == len(self.stages) - 1:
                outputs.append(self.seg_layers[stage](x))
        return outputs[::-1] if self.deep_supervision else outputs[0]


class PlannedNetwork(nn.Module):
    """A network that nnU-Net plans: it knows its `in_channels` and can tell how much memory its maps need."""

    in_channels: int

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Elements that all convolutions put out for one sample of `input_size`; nnU-Net's measure of memory."""
        elements = 0

        def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal elements
            elements += output[0].numel()

        network = copy.deepcopy(self).to("meta")
        for module in network.modules():
            if isinstance(module, (*CONVS.values(), *TRANSPOSED_CONVS.values())):
                module.register_forward_hook(count)
        with torch.no_grad():
            network(torch.empty(1, self.in_channels, *input_size, device="meta"))
        return elements


# Networks of nnU-Net's making refer to their encoder twice, and to the parts of each convolution block.
NNUNET_COPIES = (
    (r"^decoder\.encoder\.", "encoder."),
    (r"\.all_modules\.0\.", ".conv."),
    (r"\.all_modules\.1\.", ".norm."),
)


def one_copy(state_dict: Mapping[str, Tensor], copies: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """A state dict that names every tensor once.

    Args:
        state_dict: Official keys; what a class refers to twice is in it twice, or once in a file without duplicates.
        copies: (pattern, replacement) from the name of a copy to that of the original, applied in turn; where
            both are there, the original is taken, otherwise the first of the copies by name.
    """
    kept: dict[str, Tensor] = {}
    spare: dict[str, Tensor] = {}
    for key in sorted(state_dict):
        name = key
        for pattern, replacement in copies:
            name = re.sub(pattern, replacement, name)
        (kept if name == key else spare).setdefault(name, state_dict[key])
    return spare | kept


def reported(*results: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """What authors report, data and metric → value; a `*` marks what was recalled from the paper, not re-read."""
    return tuple((what, value.replace("*", " (recalled from the paper, not re-read)")) for what, value in results)
