"""SegMamba: a U-Net for volumes whose encoder scans them forward, backward and across slices.

Paper: `SegMamba: Long-range Sequential Modeling Mamba For 3D Medical Image Segmentation` -
https://arxiv.org/abs/2401.13560
Official code (no licence stated; no weights were published): https://github.com/ge-xing/SegMamba
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers import TriMamba
from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.models._official import OfficialModel, Tap, refuse_unpublished, rename
from ssmvision.segmentation._blocks import instance_norm
from ssmvision.segmentation._mixers import MakeMixer, in_full_precision, mixer_or_twin
from ssmvision.segmentation._shapes import check_input, check_spatial_dims
from ssmvision.segmentation._unetr import UNETR_RENAMES, ResBlock, UpBlock

__all__ = ["SegMamba"]


class GatedSpatialConv(nn.Module):
    """GSC (equation 1): two 3x3x3 convolutions and a 1x1x1 one side by side, then a 1x1x1 one, with a residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(dim, dim, 3, padding=1)
        self.proj2 = nn.Conv3d(dim, dim, 3, padding=1)
        self.proj3 = nn.Conv3d(dim, dim, 1)
        self.proj4 = nn.Conv3d(dim, dim, 1)
        self.norm = instance_norm(3, dim, affine=False)

    def _normed(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        y = self._normed(self.proj2(self._normed(self.proj(x)))) + self._normed(self.proj3(x))
        return self._normed(self.proj4(y)) + x


class MambaLayer(nn.Module):
    """x + mixer(norm(x)) over the tokens of a volume: (b, c, d, h, w) → the same."""

    def __init__(self, dim: int, make: MakeMixer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mamba = make(dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + in_full_precision(self._mix, x, self.norm.weight)

    def _mix(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.mamba(self.norm(tokens)).transpose(1, 2).reshape(x.shape)


class VoxelMlp(nn.Module):
    """Two layers with GELU in between, at every voxel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv3d(dim, 2 * dim, 1)
        self.fc2 = nn.Conv3d(2 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class MambaEncoder(nn.Module):
    """Returns the map of every stage for the decoder; those are normed and have gone through an MLP, the way on not."""

    def __init__(
        self, in_channels: int, dims: Sequence[int], depths: Sequence[int], makes: Sequence[MakeMixer]
    ) -> None:
        super().__init__()
        down = [nn.Sequential(nn.Conv3d(in_channels, dims[0], 7, stride=2, padding=3))]
        for before, after in pairwise(dims):
            down.append(nn.Sequential(instance_norm(3, before, affine=False), nn.Conv3d(before, after, 2, stride=2)))
        self.downsample_layers = nn.ModuleList(down)
        self.gscs = nn.ModuleList(GatedSpatialConv(dim) for dim in dims)
        self.stages = nn.ModuleList(
            nn.Sequential(*(MambaLayer(dim, make) for _ in range(depth)))
            for dim, depth, make in zip(dims, depths, makes, strict=True)
        )
        self.norms = nn.ModuleList(instance_norm(3, dim, affine=False) for dim in dims)
        self.mlps = nn.ModuleList(VoxelMlp(dim) for dim in dims)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        parts = zip(self.downsample_layers, self.gscs, self.stages, self.norms, self.mlps, strict=True)
        for down, gsc, stage, norm, mlp in parts:
            x = stage(gsc(down(x)))
            maps.append(mlp(norm(x)))
        return maps


class SegMamba(nn.Module):
    """SegMamba (figure 2): (b, in_channels, d, h, w) → logits (b, out_channels, d, h, w).

    Axes are multiples of 16, and the tokens of stage i, d * h * w / 8^(i + 1), of `nslices[i]`. The third scan of
    every layer goes from slice to slice only where `nslices` are the depths of the stages' maps: those of 128 slices.

    Args:
        spatial_dims: 3.
        in_channels: Input channels.
        out_channels: Classes, the background included.
        depths: Mamba layers of each of the four stages.
        feat_size: Channels of each stage.
        hidden_size: Channels of the bottleneck.
        nslices: Pieces of the third scan in each stage, whatever the size of the input.
        mixer: "mamba", or "none" for gated convolutions of as many parameters in its place.

    Raises:
        ValueError: `spatial_dims` is not 3, stages are not four; inputs that do not fit.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 4,
        out_channels: int = 4,
        depths: Sequence[int] = (2, 2, 2, 2),
        feat_size: Sequence[int] = (48, 96, 192, 384),
        hidden_size: int = 768,
        nslices: Sequence[int] = (64, 32, 16, 8),
        mixer: str = "mamba",
    ) -> None:
        super().__init__()
        check_spatial_dims("SegMamba", spatial_dims, 3)
        if {len(depths), len(feat_size), len(nslices)} != {4}:
            raise ValueError(
                f"SegMamba has four stages; depths, feat_size and nslices have {len(depths)}, {len(feat_size)} and "
                f"{len(nslices)} entries"
            )
        self.in_channels, self.nslices = in_channels, tuple(nslices)
        makes = [mixer_or_twin("SegMamba", mixer, "mamba", TriMamba, nslices=pieces) for pieces in nslices]
        self.vit = MambaEncoder(in_channels, feat_size, depths, makes)
        widths = [in_channels, *feat_size, hidden_size]
        self.encoder1, self.encoder2, self.encoder3, self.encoder4, self.encoder5 = (
            ResBlock(3, before, after) for before, after in pairwise(widths)
        )
        self.decoder5, self.decoder4, self.decoder3, self.decoder2 = (
            UpBlock(3, widths[i], widths[i - 1]) for i in (5, 4, 3, 2)
        )
        self.decoder1 = ResBlock(3, feat_size[0], feat_size[0])
        self.out = nn.Conv3d(feat_size[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, d, h, w) → logits (b, out_channels, d, h, w)."""
        check_input("SegMamba", x, self.in_channels, (16, 16, 16))
        self._check_slices(x)
        maps = self.vit(x)
        y = self.decoder5(self.encoder5(maps[3]), self.encoder4(maps[2]))
        y = self.decoder4(y, self.encoder3(maps[1]))
        y = self.decoder3(y, self.encoder2(maps[0]))
        y = self.decoder2(y, self.encoder1(x))
        return self.out(self.decoder1(y))

    def _check_slices(self, x: Tensor) -> None:
        voxels = x.shape[2] * x.shape[3] * x.shape[4]
        for stage, pieces in enumerate(self.nslices):
            if (tokens := voxels // 8 ** (stage + 1)) % pieces:
                raise ValueError(
                    f"SegMamba: the tokens of stage {stage} must be a multiple of nslices={pieces}; an input of "
                    f"{tuple(x.shape[2:])} gives {tokens}"
                )


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged."""
    return {key if key.startswith("vit.") else rename(key, UNETR_RENAMES): value for key, value in state_dict.items()}


def from_official(official_class: str, kwargs: Mapping[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `SegMamba`; its head, made for 48 channels, takes any number here."""
    refuse_unpublished("SegMamba", kwargs, {"norm_name": ("instance",), "res_block": (True,), "spatial_dims": (3,)})
    arguments = {"in_chans": "in_channels", "out_chans": "out_channels"}
    same = ("depths", "feat_size", "hidden_size")
    given = {name: kwargs[name] for name in same if name in kwargs}
    given |= {ours: kwargs[theirs] for theirs, ours in arguments.items() if theirs in kwargs}
    model = SegMamba(**{"in_channels": 1, "out_channels": 13, **given})
    return OfficialModel(model, lambda name: [Tap(name)])


_CFG = NetworkCfg(
    paper_name="SegMamba: Long-range Sequential Modeling Mamba For 3D Medical Image Segmentation",
    paper_ids="arXiv:2401.13560",
    origin_url="https://github.com/ge-xing/SegMamba",
    license="none stated",
    input_size=(4, 128, 128, 128),
    results=(
        ("BraTS2023 Dice, whole tumor", "93.61"),
        ("BraTS2023 Dice, tumor core", "92.65*"),
        ("BraTS2023 Dice, enhancing tumor", "87.71*"),
        ("AIIB2023 IoU", "88.59"),
        ("CRC-500 DSC", "48.46*"),
    ),
    results_source="https://arxiv.org/abs/2401.13560",
    caveats=(
        "The repository states no licence.",
        "The third scan follows the slices only at 128 x 128 x 128; nslices stay 64, 32, 16, 8 at other sizes.",
        "Channels are t2w, t2f, t1n, t1c at 1 mm, z-scored; trained for four classes, evaluated on TC, WT and ET.",
    ),
)


@register_network(_CFG, twin=True)
def segmamba(**kwargs: Any) -> SegMamba:
    """SegMamba as trained on BraTS2023, 67.42M parameters."""
    return SegMamba(**kwargs)


@register_network(replace(_CFG, input_size=(1, 16, 16, 32), results=()), twin=True)
def test_segmamba(**kwargs: Any) -> SegMamba:
    """A micro network for tests."""
    args: dict[str, Any] = {
        "in_channels": 1, "out_channels": 3, "depths": (1, 1, 1, 1), "feat_size": (8, 8, 12, 12), "hidden_size": 12,
        "nslices": (8, 4, 2, 1),
    }  # fmt: skip
    return SegMamba(**(args | kwargs))
