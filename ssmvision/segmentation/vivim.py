"""Vivim: segmentation of video by SegFormer stages per frame and Mamba layers over whole clips.

Paper: `Vivim: a Video Vision Mamba for Medical Video Segmentation` - https://arxiv.org/abs/2401.14168
Official code (CC-BY-NC-4.0): https://github.com/scott-yjyang/Vivim
The stages per frame are those of SegFormer (arXiv:2105.15203).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ssmvision.layers import TriMamba
from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.models._official import OfficialModel, Tap, as_is, refuse_unpublished, rename
from ssmvision.segmentation._blocks import CONVS, drop_path_rates
from ssmvision.segmentation._mixers import mixer_or_twin
from ssmvision.segmentation._shapes import check_input, check_spatial_dims

__all__ = ["Vivim"]

_FRAMES = 5  # pieces of the scan across frames, whatever the length of the clip
_SMALLEST = 32
_PATCHES = ((7, 4), (3, 2), (3, 2), (3, 2))  # kernel and stride
_REDUCTIONS = (8, 4, 2, 1)


class PatchEmbed(nn.Module):
    """Overlapping patches: (b, in_channels, h, w) → (b, h', w', dim)."""

    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) → (b, h', w', dim)."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Attention(nn.Module):
    """Self-attention to a map reduced by a strided convolution: (b, h, w, dim) → the same."""

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.sr = nn.Conv2d(dim, dim, reduction, reduction) if reduction > 1 else None
        self.norm = nn.LayerNorm(dim) if reduction > 1 else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → the same."""
        seen = x
        if self.sr is not None and self.norm is not None:
            seen = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        q, k, v = (self._split(part) for part in (self.query(x), self.key(seen), self.value(seen)))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))

    def _split(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ConvMlp(nn.Module):
    """MLP with a depthwise convolution before its activation, over (b, h, w, dim) or (b, t, h, w, dim)."""

    def __init__(self, dim: int, spatial_dims: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.dwconv = CONVS[spatial_dims](ratio * dim, ratio * dim, 3, padding=1, groups=ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, ..., dim) → the same."""
        x = self.dwconv(self.fc1(x).movedim(-1, 1)).movedim(1, -1)
        return self.fc2(F.gelu(x))


class FrameBlock(nn.Module):
    """Attention and MLP, both pre-norm and residual, over single frames: (b, h, w, dim) → the same."""

    def __init__(self, dim: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, reduction)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → the same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClipBlock(nn.Module):
    """Mixer and MLP, both pre-norm and residual, over clips: (b, t, h, w, dim) → the same."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mamba = mixer
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, h, w, dim) → the same."""
        x = x + self.drop_path(self.mamba(self.norm1(x).flatten(1, 3)).view_as(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Vivim(nn.Module):
    """Vivim: clips (b, in_channels, t, h, w) → logits (b, out_channels, t, h, w).

    The third scan of every Mamba layer cuts the clip into 5 pieces, so the number of frames must be a multiple of 5;
    sides are 32 or more. Official checkpoints hold a norm per stage and a classifier that nothing reads: they are kept,
    without gradients. `load_encoder` takes a file of SegFormer under the keys of transformers, encoder and decoder.

    Args:
        spatial_dims: 3.
        in_channels: Input channels.
        out_channels: Classes.
        dims: Channels of each stage.
        depths: Blocks of each stage per frame.
        heads: Heads of each stage's attention.
        clip_depths: Mamba layers of each stage over the clip.
        decoder_dim: Channels of the decoder.
        edge: Also give logits of contours (b, 1, t, h, w), from the first stage; the output is then a list.
        unused_labels: Classes of the unused classifier; 0 for none.
        d_state: Size of the state of the scans.
        drop_rate: Dropout before the logits.
        drop_path_rate: Largest stochastic depth rate.
        mixer: "mamba", or "none" for gated convolutions instead.
    """

    backbone, encoder_keys = "", ("patch_embeds.", "blocks.")
    backbone_license = "NVIDIA's licence of SegFormer, non-commercial"

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 3,
        out_channels: int = 1,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 18, 3),
        heads: Sequence[int] = (1, 2, 5, 8),
        clip_depths: Sequence[int] = (2, 2, 2, 2),
        decoder_dim: int = 768,
        edge: bool = False,
        unused_labels: int = 150,
        d_state: int = 16,
        drop_rate: float = 0.1,
        drop_path_rate: float = 0.0,
        mixer: str = "mamba",
    ) -> None:
        check_spatial_dims("Vivim", spatial_dims, 3)
        super().__init__()
        if not len(dims) == len(depths) == len(heads) == len(clip_depths) == 4:
            raise ValueError("Vivim has four stages: dims, depths, heads and clip_depths must have four entries")
        self.in_channels = in_channels
        wider = [in_channels, *dims[:-1]]
        self.patch_embeds = nn.ModuleList(
            PatchEmbed(before, dim, *patch) for before, dim, patch in zip(wider, dims, _PATCHES, strict=True)
        )
        rates = drop_path_rates(drop_path_rate, depths)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(FrameBlock(dim, count, reduction, rate) for rate in stage))
            for dim, count, reduction, stage in zip(dims, heads, _REDUCTIONS, rates, strict=True)
        )
        make = mixer_or_twin("Vivim", mixer, "mamba", TriMamba, nslices=_FRAMES, d_state=d_state, merge="mean")
        # As officially, the layers of stage i have the i-th of the rates of all blocks.
        first = [rate for stage in rates for rate in stage]
        self.stages = nn.ModuleList(
            nn.Sequential(*(ClipBlock(dim, make(dim), first[i]) for _ in range(depth)))
            for i, (dim, depth) in enumerate(zip(dims, clip_depths, strict=True))
        )
        self.linear_c = nn.ModuleList(nn.Linear(dim, decoder_dim) for dim in dims)
        self.linear_fuse = nn.Conv2d(4 * decoder_dim, decoder_dim, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(decoder_dim)
        self.dropout = nn.Dropout(drop_rate)
        self.out = nn.Conv2d(decoder_dim, out_channels, 1)
        self.edge_head = nn.Conv2d(dims[0], 1, 1) if edge else None
        self.unused_norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims if unused_labels).requires_grad_(False)
        self.unused_classifier = (
            nn.Conv2d(decoder_dim, unused_labels, 1).requires_grad_(False) if unused_labels else None
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(b, in_channels, t, h, w) → (b, out_channels, t, h, w), or a list with that of the contours."""
        self._check(x)
        frames, size = x.shape[2], x.shape[3:]
        maps = self._encode(x)
        logits = [self.out(self._decode(maps))]
        if self.edge_head is not None:
            logits.append(self.edge_head(maps[0]))
        resized = [F.interpolate(each, size, mode="bilinear").unflatten(0, (-1, frames)) for each in logits]
        clips = [each.transpose(1, 2) for each in resized]
        return clips if len(clips) > 1 else clips[0]

    def from_backbone(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of SegFormer, under the keys of transformers, under ours."""
        return {rename(key, (*_SEGFORMER_RENAMES, *_RENAMES)): value for key, value in weights.items()}

    def _check(self, x: Tensor) -> None:
        check_input("Vivim", x, self.in_channels, (1, 1, 1))
        if x.shape[2] % _FRAMES:
            raise ValueError(f"Vivim needs a number of frames that is a multiple of {_FRAMES}, not {x.shape[2]}")
        if min(x.shape[3:]) < _SMALLEST:
            raise ValueError(f"Vivim needs frames of at least {_SMALLEST} x {_SMALLEST}, not {tuple(x.shape[3:])}")

    def _encode(self, x: Tensor) -> list[Tensor]:
        """Clips → maps of every stage with the frames as samples, (b * t, dim, h, w)."""
        frames = x.shape[2]
        x = x.transpose(1, 2).flatten(0, 1)
        maps = []
        for embed, blocks, stage in zip(self.patch_embeds, self.blocks, self.stages, strict=True):
            x = blocks(embed(x)).unflatten(0, (-1, frames))
            x = stage(x).flatten(0, 1).permute(0, 3, 1, 2)
            maps.append(x)
        return maps

    def _decode(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        levels = []
        for linear, level in zip(self.linear_c, maps, strict=True):
            level = linear(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            levels.append(F.interpolate(level, size, mode="bilinear"))
        return self.dropout(self.batch_norm(self.linear_fuse(torch.cat(levels[::-1], dim=1))).relu())


# Official key → ours.
_RENAMES = (
    (r"^encoder\.downsample_layers\.patch_embeddings\.(\d)\.layer_norm", r"patch_embeds.\1.norm"),
    (r"^encoder\.downsample_layers\.patch_embeddings", "patch_embeds"),
    (r"^encoder\.downsample_layers\.layer_norm", "unused_norms"),
    (r"^encoder\.downsample_layers\.block", "blocks"),
    (r"^encoder\.stages\.(\d)\.(\d+)\.0\.", r"stages.\1.\2."),
    (r"^encoder\.stages", "stages"),
    (r"^decoder\.classifier", "unused_classifier"),
    (r"^decoder\.linear_c\.(\d)\.proj", r"linear_c.\1"),
    (r"^decoder\.", ""),
    (r"^edgeocr_cls_head", "edge_head"),
    (r"\.layer_norm_(\d)\.", r".norm\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.self\.layer_norm\.", ".attn.norm."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.mlp\.dense(\d)\.", r".mlp.fc\1."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
)


# Key of SegFormer in transformers → that of the official Vivim around it.
_SEGFORMER_RENAMES = (
    (r"^segformer\.encoder\.", "encoder.downsample_layers."),
    (r"^decode_head\.", "decoder."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official keys, also with the `model.` of Lightning, → ours; ours pass unchanged."""
    converted = {rename(key.removeprefix("model."), _RENAMES): value for key, value in state_dict.items()}
    if isinstance(model, Vivim) and model.unused_classifier is None:
        return {key: value for key, value in converted.items() if not key.startswith("unused_")}
    return converted


class _FramesFirst(nn.Module):
    """The official layout around ours: (b, t, c, h, w) → (b * t, out_channels, h, w)."""

    def __init__(self, model: Vivim) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        result = self.model(x.transpose(1, 2))
        clips = result if isinstance(result, list) else [result]
        return [clip.transpose(1, 2).flatten(0, 1) for clip in clips]


# SegFormer's own arguments: what its configuration takes where nothing is given, and what is built here.
_SEGFORMER = {"depths": (2, 2, 2, 2), "hidden_sizes": (32, 64, 160, 256), "num_attention_heads": (1, 2, 5, 8)}
_UNDERSTOOD = {
    "patch_sizes": (tuple(kernel for kernel, _ in _PATCHES),),
    "strides": (tuple(stride for _, stride in _PATCHES),),
    "sr_ratios": (_REDUCTIONS,),
    "mlp_ratios": ((4, 4, 4, 4),),
    "hidden_act": ("gelu",),
}


_OF_TRAINING = (
    "attention_probs_dropout_prob", "classifier_dropout_prob", "drop_path_rate", "hidden_dropout_prob",
    "initializer_range",
)  # fmt: skip
_WITHOUT_EFFECT = ("feat_size", *(f"segformer_config.{name}" for name in _OF_TRAINING))


def from_official(official_class: str, kwargs: Mapping[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `Vivim` and of the SegFormer in it, by default b3."""
    arguments: dict[str, Any] = {}
    if "segformer_config" in kwargs:
        segformer = kwargs["segformer_config"]
        values = {name: segformer[name] for name in _UNDERSTOOD if name in segformer}
        refuse_unpublished("Vivim", {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}, _UNDERSTOOD)
        depths, dims, heads = (segformer.get(name, default) for name, default in _SEGFORMER.items())
        arguments = {
            "depths": depths, "dims": dims, "heads": heads, "decoder_dim": segformer.get("decoder_hidden_size", 256),
            "unused_labels": segformer.get("num_labels", 2),
        }  # fmt: skip
    model = Vivim(
        in_channels=kwargs.get("in_chans", 3), out_channels=kwargs.get("out_chans", 1),
        clip_depths=kwargs.get("mamba_depths", (2, 2, 2, 2)), edge=kwargs.get("with_edge", False), **arguments,
    )  # fmt: skip
    return OfficialModel(_FramesFirst(model), lambda name: [_tap(name)], without_effect=_WITHOUT_EFFECT)


def _tap(name: str) -> Tap:
    ours = f"model.{rename(name, _RENAMES)}"
    if "patch_embeds" in ours:
        return Tap(ours, lambda inputs, output: output.flatten(1, 2))
    if ".stages." in ours:
        return Tap(ours, lambda inputs, output: output.movedim(-1, 1))
    return Tap(ours, as_is)


_CFG = NetworkCfg(
    paper_name="Vivim: a Video Vision Mamba for Medical Video Segmentation",
    paper_ids="arXiv:2401.14168",
    origin_url="https://github.com/scott-yjyang/Vivim",
    license="CC-BY-NC-4.0",
    weights_license="none published; SegFormer-b3, where training starts officially, is non-commercial (NVIDIA)",
    input_size=(3, 5, 256, 256),
    caveats=(
        "The official code forbids commercial use; this one was written from the paper and shares none of it.",
        "The number of frames must be a multiple of 5, into which the third scan cuts every clip.",
        "Checkpoints hold a norm per stage and a classifier that nothing reads; they count as parameters.",
        "The paper's results were not read, so none are stated.",
    ),
)


@register_network(_CFG, twin=True)
def vivim_b3(**kwargs: Any) -> Vivim:
    """Vivim on SegFormer-b3, 59.6M parameters."""
    return Vivim(**kwargs)


@register_network(replace(_CFG, input_size=(3, 5, 32, 32)), twin=True)
def test_vivim(**kwargs: Any) -> Vivim:
    """A micro network for tests."""
    args: dict[str, Any] = {
        "dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "heads": (1, 1, 2, 2), "clip_depths": (1, 1, 1, 1),
        "decoder_dim": 16, "unused_labels": 0, "d_state": 4,
    }  # fmt: skip
    return Vivim(**(args | kwargs))
