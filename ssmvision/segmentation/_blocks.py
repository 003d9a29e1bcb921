"""What several segmenters are made of: convolution blocks, a decoder, and checkpoints that repeat tensors."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "CONVS",
    "NNUNET_COPIES",
    "TRANSPOSED_CONVS",
    "ConvNormAct",
    "Decoder",
    "PlannedNetwork",
    "ResidualBlockD",
    "drop_path_rates",
    "init_residual_unet_",
    "instance_norm",
    "one_copy",
]

CONVS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED_CONVS: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_POOLS: dict[int, Any] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
_NORMS: dict[int, Any] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def instance_norm(spatial_dims: int, channels: int, affine: bool = True) -> nn.Module:
    """Instance norm with torch's epsilon of 1e-5."""
    return _NORMS[spatial_dims](channels, affine=affine)


def drop_path_rates(largest: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth rates that rise from 0 to `largest` over all blocks, by stage."""
    rates = torch.linspace(0, largest, sum(depths), device="cpu").split(list(depths))
    return [stage.tolist() for stage in rates]


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
