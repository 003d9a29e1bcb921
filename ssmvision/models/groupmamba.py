"""GroupMamba: four groups of channels, each scanned in its own direction, and a gate that brings them together.

Paper: `GroupMamba: Efficient Group-Based Visual State Space Model` - https://arxiv.org/abs/2407.13772
Official code and weights (MIT): https://github.com/Amshaker/GroupMamba
"""

import re
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.layers import (
    ConvNormAct,
    DropPath,
    LayerNorm2d,
    Mlp,
    SelectAdaptivePool2d,
    calculate_drop_path_rates,
)
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ssmvision.layers import ModulatedGroupMamba
from ssmvision.layers.conv_mlp import ConvMlp
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._init import init_linear
from ssmvision.models._official import OfficialModel, Tap, refuse_unpublished, rename
from ssmvision.models._pyramid import Pyramid, Stage

__all__ = ["GroupMamba"]


class ConvStem(nn.Sequential):
    """Convolutions of stride 4: (b, in_chans, h, w) → (b, dim, h/4, w/4)."""

    def __init__(self, in_chans: int, hidden: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = ConvNormAct(in_chans, hidden, 7, stride=2, **dd)
        self.conv2 = ConvNormAct(hidden, hidden, 3, **dd)
        self.conv3 = ConvNormAct(hidden, hidden, 3, **dd)
        self.proj = nn.Conv2d(hidden, dim, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)


class Downsample(nn.Sequential):
    """A norm, a convolution of stride 2 and a norm: (b, dim, h, w) → (b, out_dim, h/2, w/2)."""

    def __init__(self, dim: int, out_dim: int, norm_eps: float, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=norm_eps, **dd)
        self.proj = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm2 = LayerNorm2d(out_dim, eps=1e-5, **dd)


class Block(nn.Module):
    """A mixer, which normalises itself, and an MLP, both residual: (b, h, w, dim) → the same."""

    def __init__(
        self, dim: int, mlp_ratio: float, norm_eps: float, drop_path: float, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.attn = ModulatedGroupMamba(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassBlock(nn.Module):
    """What a class token passes through, as a map of one pixel: (b, dim) → (b, dim)."""

    def __init__(self, dim: int, mlp_ratio: float, norm_eps: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.attn = ModulatedGroupMamba(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x.unsqueeze(1).unsqueeze(1)).flatten(1))
        return x + self.mlp(self.norm2(x))


class ClassTokenHead(nn.Module):
    """The pooled map becomes a class token, which a block of its own refines and two classifiers read.

    Args:
        dim: Channels.
        num_classes: Classes; 0 for none.
        global_pool: What makes the class token; "" for the bare map, without the block and without classifiers.
        mlp_ratio: Of the block.
        norm_eps: Of its norms.
        drop_rate: Dropout before the classifiers.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        global_pool: str,
        mlp_ratio: float,
        norm_eps: float,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_features = dim
        self._set_pool(global_pool)
        self.block: nn.Module = ClassBlock(dim, mlp_ratio, norm_eps, **dd)
        self.norm: nn.Module = nn.LayerNorm(dim, eps=norm_eps, **dd)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.fc_dist = nn.Linear(dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

    def reset(
        self,
        num_classes: int,
        pool_type: Optional[str] = None,
        in_features: Optional[int] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """New classifiers, and pooling if it is given."""
        self.num_features = in_features or self.num_features
        if pool_type is not None:
            self._set_pool(pool_type)
        for name in ("fc", "fc_dist"):
            dd = {"device": device, "dtype": dtype}
            fc = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
            init_linear(fc)
            setattr(self, name, fc.train(self.training))

    @torch.jit.ignore
    def _set_pool(self, pool_type: str) -> None:
        self.pooled = bool(pool_type)
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=self.pooled).train(self.training)
        # timm's models assert their pooling, and code written for them catches that.
        assert self.global_pool.feat_mult() == 1, f"GroupMamba: pooling {pool_type!r} changes the number of channels"

    def remove_block(self) -> None:
        """Leave nothing but pooling and classifiers."""
        self.block, self.norm = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(b, dim, h, w) → (b, num_classes), the mean of both classifiers; with pre_logits (b, dim)."""
        x = self.global_pool(x)
        if self.pooled:
            x = self.norm(self.block(x))
        x = self.drop(x)
        if pre_logits:
            return x
        if not self.pooled:  # classifiers read the channels of every pixel
            x = x.movedim(1, 3)
        x = (self.fc(x) + self.fc_dist(x)) / 2
        return x if self.pooled else x.movedim(3, 1)


class GroupMamba(Pyramid):
    """GroupMamba; the defaults are those of the tiny model.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling of the head.
        stem_dim: Channels inside the stem.
        dims: Channels of each stage, multiples of 4.
        depths: Blocks of each stage.
        mlp_ratios: Hidden channels of the MLPs / channels, for each stage.
        norm_eps: Of the norms of MLPs and between stages.
        drop_rate: Dropout before the classifiers.
        drop_path_rate: Largest stochastic depth rate, reached in the last block.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem_dim: int = 32,
        dims: Sequence[int] = (64, 128, 348, 448),
        depths: Sequence[int] = (3, 4, 9, 3),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        norm_eps: float = 1e-6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if not len(dims) == len(depths) == len(mlp_ratios):
            raise ValueError(f"GroupMamba: {len(dims)} dims, {len(depths)} depths and {len(mlp_ratios)} mlp_ratios")
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                Downsample(dims[i - 1], dims[i], norm_eps, **dd) if i else nn.Identity(),
                [Block(dims[i], mlp_ratios[i], norm_eps, rate, **dd) for rate in rates[i]],
            )
            for i in range(len(dims))
        ]
        super().__init__(
            patch_embed=ConvStem(in_chans, stem_dim, dims[0], **dd),
            stages=stages,
            dims=dims,
            norm=nn.Identity(),
            in_chans=in_chans,
            num_classes=num_classes,
            head=ClassTokenHead(dims[-1], num_classes, global_pool, mlp_ratios[-1], norm_eps, drop_rate, **dd),
            **dd,
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def get_classifier(self) -> Tuple[nn.Module, nn.Module]:  # type: ignore[override]
        return self.head.fc, self.head.fc_dist

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        stages = len(self.stages)
        taken = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head or len(self.stages) < stages:
            self.head.remove_block()
        return taken


# Official key → ours. Stages begin with their downsampling here, and with the norm before it; there every stage ends
# with that norm.
_RENAMES = (
    (r"^patch_embed1\.conv\.0\.", "patch_embed.conv1.conv."),
    (r"^patch_embed1\.conv\.1\.", "patch_embed.conv1.bn."),
    (r"^patch_embed1\.conv\.3\.", "patch_embed.conv2.conv."),
    (r"^patch_embed1\.conv\.4\.", "patch_embed.conv2.bn."),
    (r"^patch_embed1\.conv\.6\.", "patch_embed.conv3.conv."),
    (r"^patch_embed1\.conv\.7\.", "patch_embed.conv3.bn."),
    (r"^patch_embed1\.", "patch_embed."),
    (r"^patch_embed(\d+)\.proj\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.proj."),
    (r"^patch_embed(\d+)\.norm\.", lambda match: f"stages.{int(match[1]) - 1}.downsample.norm2."),
    (r"^patch_embed(\d+)$", lambda match: f"stages.{int(match[1]) - 1}.downsample"),
    (r"^block(\d+)\.(\d+)", lambda match: f"stages.{int(match[1]) - 1}.blocks.{match[2]}"),
    (r"^norm(\d+)\.", lambda match: f"stages.{match[1]}.downsample.norm1."),
    (r"^post_network\.0\.", "head.block."),
    (r"^head\.(?=weight|bias)", "head.fc."),
    (r"^dist_head\.", "head.fc_dist."),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
)

# Of the four groups: official parameter → ours, along whose first axis the groups are concatenated.
_GROUPED = {
    "in_proj.weight": "in_proj_weight", "conv2d.weight": "conv2d.weight", "conv2d.bias": "conv2d.bias",
    "x_proj_weight": "x_proj_weight", "dt_projs_weight": "dt_projs_weight", "dt_projs_bias": "dt_projs_bias",
    "A_logs": "A_logs", "Ds": "Ds", "out_norm.weight": "out_norm_weight", "out_norm.bias": "out_norm_bias",
    "out_proj.weight": "out_proj_weight",
}  # fmt: skip


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged."""
    if any(key.startswith("stages.") for key in state_dict):
        return state_dict
    stages = 1 + max((int(key[5]) - 1 for key in state_dict if re.match(r"block\d+\.", key)), default=0)
    converted = {}
    for key, value in state_dict.items():
        key = rename(key, ((rf"^norm{stages}\.", "head.norm."), *_RENAMES))
        converted[key] = value
    for key in [key for key in converted if ".mamba_g1." in key]:
        prefix, name = key.split(".mamba_g1.")
        groups = [converted.pop(f"{prefix}.mamba_g{i}.{name}") for i in range(1, 5)]
        ours = _GROUPED[name]
        stacked = name.startswith("conv2d") or name in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias")
        converted[f"{prefix}.mixer.{ours}"] = torch.cat(groups) if stacked else torch.stack(groups)
    return converted


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `GroupMamba`."""
    refuse_unpublished("GroupMamba", kwargs, {"norm_layer": ("LayerNorm", "LayerNorm eps 1e-6", "LayerNorm eps 1e-5")})
    model = GroupMamba(
        in_chans=kwargs.get("in_chans", 3),
        num_classes=kwargs.get("num_classes", 1000),
        stem_dim=kwargs.get("stem_hidden_dim", 32),
        dims=kwargs.get("embed_dims", (64, 128, 348, 448)),
        depths=kwargs.get("depths", (3, 4, 9, 3)),
        mlp_ratios=kwargs.get("mlp_ratios", (8, 8, 4, 4)),
        norm_eps=1e-6 if str(kwargs.get("norm_layer")).endswith("1e-6") else 1e-5,
    )

    def taps(name: str) -> List[Tap]:
        in_block = name.startswith("block")
        ours = "patch_embed" if name == "patch_embed1" else rename(name, _RENAMES)
        return [Tap(ours, _tokens_of_block if in_block else _tokens_of_map)]

    return OfficialModel(model, taps)


def _tokens_of_map(inputs: Tuple[Any, ...], output: Tensor) -> Tensor:
    return output.flatten(2).transpose(1, 2)


def _tokens_of_block(inputs: Tuple[Any, ...], output: Tensor) -> Tensor:
    return output.flatten(1, 2)


_SOURCE = "https://github.com/Amshaker/GroupMamba"
_GRADIENT = (
    "On maps that are not square the official gradient of the column scans is wrong; here it is that of the scans, "
    "which is the official one on square maps."
)
_HEADS = "As in the official evaluation, logits are the mean of two classifiers; here also in training."

# The published weights: architecture → (Google Drive file, top-1).
_WEIGHTS = {
    "groupmamba_tiny": ("1TrYYs0uGZbja_2ONQLyfiNdp8C5ZYP1o", 83.3),
    "groupmamba_small": ("1vTN9ynDcsDuOVrcT9GcQ5nBSk-hXySlh", 83.9),
    "groupmamba_base": ("1A_srBeDYpsinU5W3PAEADu1saoz413EU", 84.5),
}

PUBLISHED = {
    f"{name}.in1k": Published(
        source=_SOURCE, top1=top1, caveats=(_GRADIENT, _HEADS), by_hand=f"https://drive.google.com/file/d/{file}/view",
    )
    for name, (file, top1) in _WEIGHTS.items()
}  # fmt: skip


def _cfg(**fields: Any) -> Any:
    common = {
        "pool_size": (7, 7), "first_conv": "patch_embed.conv1.conv", "classifier": ("head.fc", "head.fc_dist"),
        "license": "mit", "paper_name": "GroupMamba: Efficient Group-Based Visual State Space Model",
        "paper_ids": "arXiv:2407.13772", "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _cfg() for name in _WEIGHTS}
    | {"test_groupmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5))}
)


def _create_groupmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    return build_model(
        GroupMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True}, **kwargs,
    )  # fmt: skip


@register_model
def groupmamba_tiny(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-T, 23.4M parameters."""
    args = dict(stem_dim=32, dims=(64, 128, 348, 448), depths=(3, 4, 9, 3))
    return _create_groupmamba("groupmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def groupmamba_small(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-S, 34.8M parameters."""
    args = dict(stem_dim=64, dims=(64, 128, 348, 512), depths=(3, 4, 16, 3))
    return _create_groupmamba("groupmamba_small", pretrained, **dict(args, **kwargs))


@register_model
def groupmamba_base(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """GroupMamba-B, 57.2M parameters."""
    args = dict(stem_dim=64, dims=(96, 192, 424, 512), depths=(3, 6, 21, 3))
    return _create_groupmamba("groupmamba_base", pretrained, **dict(args, **kwargs))


@register_model
def test_groupmamba(pretrained: bool = False, **kwargs: Any) -> GroupMamba:
    """A micro model for tests."""
    args = dict(stem_dim=8, dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), mlp_ratios=(2, 2, 2, 2))
    return _create_groupmamba("test_groupmamba", pretrained, **dict(args, **kwargs))
