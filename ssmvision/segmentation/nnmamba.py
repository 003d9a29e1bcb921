"""nnMamba: 3-D ResNets with Mamba layers, for segmentation and classification.

Paper: `nnMamba: 3D Biomedical Image Segmentation, Classification and Landmark Detection with State Space Model` -
https://arxiv.org/abs/2402.03526
Official code and weights (no licence stated): https://github.com/lhaof/nnMamba
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.models._official import OfficialModel, Tap, rename
from ssmvision.segmentation._blocks import one_copy
from ssmvision.segmentation._mixers import MakeMixer, in_full_precision, mamba_or_twin
from ssmvision.segmentation._shapes import check_input, check_spatial_dims

__all__ = ["NNMambaClassifier", "NNMambaSegmenter"]


class DoubleConv(nn.Module):
    """Twice a 3x3x3 convolution, batch norm and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv3d(in_channels, channels, 3, stride, padding=1),
            nn.BatchNorm3d(channels),
            nn.ReLU(),
            nn.Conv3d(channels, channels, 3, padding=1),
            nn.BatchNorm3d(channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class MambaLayer(nn.Module):
    """A Mamba over the voxels between two 1x1x1 convolutions: (b, dim, d, h, w) → the same.

    Args:
        dim: Channels.
        make: Builds the mixer.
        flips: Average the mixer over the tokens as they are, with channels reversed, with their order reversed, and
            with both reversed.
    """

    def __init__(self, dim: int, make: MakeMixer, flips: bool = False) -> None:
        super().__init__()
        self.flips: list[list[int]] = [[], [2], [1], [1, 2]] if flips else [[]]
        self.nin = nn.Conv3d(dim, dim, 1, bias=False)
        self.norm = nn.BatchNorm3d(dim)
        self.mamba = make(dim)
        self.nin2 = nn.Conv3d(dim, dim, 1, bias=False)
        self.norm2 = nn.BatchNorm3d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.nin(x)))
        x = x + in_full_precision(self._mix, x, self.nin.weight)
        return F.relu(self.norm2(self.nin2(x)))

    def _mix(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        y = torch.zeros_like(tokens)
        for dims in self.flips:
            y = y + self.mamba(tokens.flip(dims)).flip(dims)
        return (y / len(self.flips)).transpose(1, 2).reshape(x.shape)


class BasicBlock(nn.Module):
    """ResNet's basic block in 3-D; where a Mamba layer is given, its output is added before the last ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv3d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(channels))

    def forward(self, x: Tensor, mamba_layer: nn.Module | None = None) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if mamba_layer is not None:
            y = y + mamba_layer(x)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Stage(nn.Module):
    """Blocks that halve the size and double the channels; all but the first add what one Mamba layer, shared, gives."""

    def __init__(self, in_channels: int, blocks: int, mamba_layer: nn.Module | None) -> None:
        super().__init__()
        channels = 2 * in_channels
        further = [BasicBlock(channels, channels) for _ in range(blocks - 1)]
        self.blocks = nn.ModuleList([BasicBlock(in_channels, channels, stride=2), *further])
        self.mamba_layer = mamba_layer if further else None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x, self.mamba_layer if index else None)
        return x


class ChannelScale(nn.Module):
    """Squeeze and excitation: channels times the sigmoid of an MLP of their means."""

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(dim, dim // reduction)
        self.layer2 = nn.Linear(dim // reduction, dim)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.layer2(F.relu(self.layer1(x.mean((2, 3, 4))))))
        return x * scale[:, :, None, None, None]


class NNMambaSegmenter(nn.Module):
    """nnMamba for segmentation: (b, in_channels, d, h, w) → logits (b, out_channels, d, h, w), axes multiples of 16.

    As in the official code the logits end in batch norm and ReLU: they are never negative.

    Args:
        spatial_dims: 3.
        in_channels: Input channels.
        out_channels: Classes, the background included.
        channels: Channels of the first of four resolutions; each further one has twice as many.
        blocks: Blocks of each of the three stages.
        reduction: channels / hidden channels of what scales the skips.
        mixer: "mamba", or "none" for gated convolutions of as many parameters in its place.

    Raises:
        ValueError: `spatial_dims` is not 3; inputs that do not fit.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 6,
        channels: int = 32,
        blocks: int = 3,
        reduction: int = 16,
        mixer: str = "mamba",
    ) -> None:
        super().__init__()
        check_spatial_dims("nnMamba", spatial_dims, 3)
        self.in_channels = in_channels
        make = mamba_or_twin("nnMamba", mixer)
        c = [channels, 2 * channels, 4 * channels, 8 * channels]
        self.in_conv = DoubleConv(in_channels, c[0], stride=2)
        self.layer1, self.layer2, self.layer3 = (
            Stage(c[i], blocks, MambaLayer(c[i + 1], make, flips=True)) for i in range(3)
        )
        self.att1, self.att2, self.att3 = (ChannelScale(c[i], reduction) for i in range(3))
        self.conv5, self.conv6, self.conv7 = (DoubleConv(c[i + 1] + c[i], c[i]) for i in (2, 1, 0))
        self.conv8 = DoubleConv(c[0], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, d, h, w) → logits (b, out_channels, d, h, w)."""
        check_input("nnMamba", x, self.in_channels, (16, 16, 16))
        c1 = self.in_conv(x)
        c2 = self.layer1(c1)
        c3 = self.layer2(c2)
        y = self.layer3(c3)
        y = self.conv5(torch.cat([_double(y), self.att3(c3)], dim=1))
        y = self.conv6(torch.cat([_double(y), self.att2(c2)], dim=1))
        y = self.conv7(torch.cat([_double(y), self.att1(c1)], dim=1))
        return self.conv8(_double(y))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False)


class NNMambaClassifier(nn.Module):
    """nnMamba for classification: (b, in_channels, d, h, w) of any size → logits (b, out_channels).

    Args:
        spatial_dims: 3.
        in_channels: Input channels.
        out_channels: Classes.
        channels: Channels after the stem; each of three stages doubles them.
        blocks: Blocks of each stage.
        drop_rate: Dropout before the last layer.
        mixer: "mamba", or "none" for a gated convolution of as many parameters in its place.

    Raises:
        ValueError: `spatial_dims` is not 3; inputs that do not fit.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        channels: int = 32,
        blocks: int = 3,
        drop_rate: float = 0.5,
        mixer: str = "mamba",
    ) -> None:
        super().__init__()
        check_spatial_dims("nnMamba", spatial_dims, 3)
        self.in_channels = in_channels
        self.in_conv = DoubleConv(in_channels, channels, stride=2)
        self.mamba_layer_stem = MambaLayer(channels, mamba_or_twin("nnMamba", mixer, d_state=8))
        self.layer1, self.layer2, self.layer3 = (Stage(channels << i, blocks, None) for i in range(3))
        self.mlp = nn.Sequential(
            nn.Linear(14 * channels, channels), nn.ReLU(), nn.Dropout(drop_rate), nn.Linear(channels, out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, d, h, w) → logits (b, out_channels)."""
        check_input("nnMamba", x, self.in_channels, (1, 1, 1))
        x = self.in_conv(x)
        x = self.mamba_layer_stem(x) + x
        means = []
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
            means.append(x.mean((2, 3, 4)))
        return self.mlp(torch.cat(means, dim=1))


# The blocks of a stage refer to the same Mamba layer, which the official files therefore repeat.
_RENAMES = ((r"^(layer\d)\.\d+\.mamba_layer\.", r"\1.mamba_layer."), (r"^(layer\d)\.(\d+\.)", r"\1.blocks.\2"))

# Heads for deep supervision, which one of the official copies of the network has and none uses to predict.
_DEEP_HEADS = ("ds1_cls_conv.", "ds2_cls_conv.", "ds3_cls_conv.")


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official keys → ours, every tensor once and without heads for deep supervision; ours pass unchanged."""
    return one_copy({key: value for key, value in state_dict.items() if not key.startswith(_DEEP_HEADS)}, _RENAMES)


def from_official(official_class: str, kwargs: Mapping[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `nnMambaSeg` or `nnMambaEncoder`."""
    names = {"in_ch": "in_channels", "number_classes": "out_channels", "attention_r": "reduction"}
    given = {names.get(name, name): value for name, value in kwargs.items()}
    network: Any = NNMambaClassifier if "encoder" in official_class.lower() else NNMambaSegmenter
    return OfficialModel(network(**given), lambda name: [Tap(rename(f"{name}.", _RENAMES)[:-1])])


_NO_LICENCE = "The repository states no licence, neither for the code nor for the weights."

_SEG = NetworkCfg(
    paper_name="nnMamba: 3D Biomedical Image Segmentation, Classification and Landmark Detection with State Space "
    "Model",
    paper_ids="arXiv:2402.03526",
    origin_url="https://github.com/lhaof/nnMamba",
    license="none stated",
    by_hand="https://github.com/lhaof/nnMamba",
    input_size=(1, 128, 128, 128),
    results=(
        ("BraTS2023 Dice, mean of WT, TC, ET", "89.97"),
        ("BraTS2023 HD95, mean of WT, TC, ET", "6.53"),
        ("AMOS2022 CT mDice", "89.63"),
        ("AMOS2022 CT mNSD", "79.73"),
        ("AMOS2022 MRI mDice", "73.98"),
        ("AMOS2022 MRI mNSD", "65.13"),
    ),
    results_source="https://github.com/lhaof/nnMamba",
    caveats=(
        _NO_LICENCE,
        "The logits are never negative: the official network ends in batch norm and ReLU.",
        "The repository holds several networks of this name and states 15.55M parameters; this one has 15.94M.",
    ),
)
_CLS = replace(
    _SEG,
    input_size=(1, 128, 128, 128),
    results=(
        ("ADNI NC/AD accuracy", "89.53±0.68"),
        ("ADNI NC/AD AUC", "95.76±0.18"),
        ("ADNI sMCI/pMCI accuracy", "68.06±4.65"),
        ("ADNI sMCI/pMCI AUC", "77.55±1.29"),
    ),
    caveats=(_NO_LICENCE,),
)


@register_network(_SEG, twin=True)
def nnmamba_seg(**kwargs: Any) -> NNMambaSegmenter:
    """The segmenter of nnMamba, 15.94M parameters."""
    return NNMambaSegmenter(**kwargs)


@register_network(_CLS, twin=True)
def nnmamba_cls(**kwargs: Any) -> NNMambaClassifier:
    """The classifier of nnMamba, 12.88M parameters."""
    return NNMambaClassifier(**kwargs)


@register_network(replace(_SEG, by_hand="", input_size=(1, 16, 16, 32), results=()), twin=True)
def test_nnmamba_seg(**kwargs: Any) -> NNMambaSegmenter:
    """A micro network for tests."""
    return NNMambaSegmenter(**({"out_channels": 3, "channels": 6, "blocks": 2, "reduction": 3} | kwargs))


@register_network(replace(_CLS, by_hand="", input_size=(1, 16, 16, 32), results=()), twin=True)
def test_nnmamba_cls(**kwargs: Any) -> NNMambaClassifier:
    """A micro network for tests."""
    return NNMambaClassifier(**({"channels": 6, "blocks": 1} | kwargs))
