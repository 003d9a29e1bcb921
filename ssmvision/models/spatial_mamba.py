"""Spatial-Mamba: one scan per block, whose states see their neighbours before they are read.

Paper: `Spatial-Mamba: Effective Visual State Space Models via Structure-aware State Fusion` -
https://arxiv.org/abs/2410.15091
Official code and weights (Apache-2.0): https://github.com/EdwardChasel/Spatial-Mamba
"""

from dataclasses import replace
from functools import partial
from typing import Any, Dict, Sequence, Union

from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from ssmvision.layers import StructureAwareSSM
from ssmvision.layers.spatial_ssm import StateFusion
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._cpe_pyramid import CPEPyramid, convert_keys, official_model
from ssmvision.models._official import OfficialModel, refuse_unpublished

__all__ = ["SpatialMamba"]


class SpatialMamba(CPEPyramid):
    """Spatial-Mamba.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling of the head.
        dims: Channels of each stage, or of the first (doubled from stage to stage).
        depths: Blocks of each stage.
        expand: Inner channels of the scans / channels.
        dt_rank: Rank of the step sizes; None for ceil(channels / 16).
        mlp_ratio: Hidden channels of the MLPs / channels.
        fusion_padding: What the fusion of states sees outside the map. The official code replicates the border in
            training and takes zeros in evaluation ("official"); "zeros" and "replicate" hold in both.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Largest stochastic depth rate, reached in the last block.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Union[int, Sequence[int]] = 64,
        depths: Sequence[int] = (2, 4, 8, 4),
        expand: int = 2,
        dt_rank: Union[int, None] = None,
        mlp_ratio: float = 4.0,
        fusion_padding: str = "official",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        mixer = partial(StructureAwareSSM, expand=expand, dt_rank=dt_rank, fusion_padding=fusion_padding)
        super().__init__(
            mixers=[mixer] * len(depths),
            depths=depths,
            dims=dims,
            mlp_ratio=mlp_ratio,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )


# Official key → ours, beyond the frame.
_RENAMES = {
    r"\.ln_([12])\.": r".norm\1.",
    r"\.self_attention\.": ".mixer.",
}


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged."""
    return convert_keys(state_dict, _RENAMES)


# Official arguments and the values that are understood here; others change the computation in ways nobody published.
_UNDERSTOOD = {"patch_size": (4,), "d_state": (1,)}


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `SpatialMamba`."""
    refuse_unpublished("SpatialMamba", kwargs, _UNDERSTOOD)
    depths = kwargs.get("depths", (2, 4, 8, 4))
    model = SpatialMamba(
        in_chans=kwargs.get("in_chans", 3),
        num_classes=kwargs.get("num_classes", 1000),
        dims=kwargs.get("dims", 64),
        depths=depths,
        mlp_ratio=kwargs.get("mlp_ratio", 4.0),
    )
    official = official_model(model, len(depths), as_tokens=False)
    return replace(official, variants={"output_train_padding": _pad_as_in_training})


def _pad_as_in_training(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, StateFusion):
            module.padding = "replicate"


_SOURCE = "https://github.com/EdwardChasel/Spatial-Mamba"
_PADDING = (
    "The official code pads the states with copies of the border in training and with zeros in evaluation, and so does "
    "this model; fusion_padding='zeros' or 'replicate' makes both alike, at the price of other outputs."
)

# The published weights: architecture → (Google Drive file, top-1, FLOPs).
_WEIGHTS = {
    "spatial_mamba_tiny": ("19kXoqGSTuKKs4AHbdUSrdKZTwTWenLIW", 83.5, "4.5G"),
    "spatial_mamba_small": ("1Wb3sYoWLpgmWrmHMYKwdgDwGPZaqM28O", 84.6, "7.1G"),
    "spatial_mamba_base": ("1k8dHp2QRCOqBSgAi36YkhZp_O8LqOPjM", 85.3, "15.8G"),
}

PUBLISHED = {
    f"{name}.in1k": Published(
        source=_SOURCE, top1=top1, flops=flops, caveats=(_PADDING,),
        by_hand=f"https://drive.google.com/file/d/{file}/view",
    )
    for name, (file, top1, flops) in _WEIGHTS.items()
}  # fmt: skip


def _cfg(**fields: Any) -> Any:
    common = {
        "pool_size": (7, 7), "first_conv": "patch_embed.conv1.conv", "classifier": "head.fc",
        "license": "apache-2.0", "paper_ids": "arXiv:2410.15091", "origin_url": _SOURCE,
        "paper_name": "Spatial-Mamba: Effective Visual State Space Models via Structure-aware State Fusion",
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _cfg() for name in _WEIGHTS}
    | {"test_spatial_mamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5))}
)


def _create_spatial_mamba(variant: str, pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    return build_model(
        SpatialMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True}, **kwargs,
    )  # fmt: skip


@register_model
def spatial_mamba_tiny(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-T, 26.7M parameters."""
    args = dict(dims=64, depths=(2, 4, 8, 4))
    return _create_spatial_mamba("spatial_mamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def spatial_mamba_small(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-S, 43.1M parameters."""
    args = dict(dims=64, depths=(2, 4, 21, 5))
    return _create_spatial_mamba("spatial_mamba_small", pretrained, **dict(args, **kwargs))


@register_model
def spatial_mamba_base(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """Spatial-Mamba-B, 95.7M parameters."""
    args = dict(dims=96, depths=(2, 4, 21, 5))
    return _create_spatial_mamba("spatial_mamba_base", pretrained, **dict(args, **kwargs))


@register_model
def test_spatial_mamba(pretrained: bool = False, **kwargs: Any) -> SpatialMamba:
    """A micro model for tests."""
    args = dict(dims=16, depths=(1, 1, 2, 1))
    return _create_spatial_mamba("test_spatial_mamba", pretrained, **dict(args, **kwargs))


# The names in the official code and its configurations.
register_model_deprecations(
    __name__, {f"spatialmamba_{size}": f"spatial_mamba_{size}" for size in ("tiny", "small", "base")}
)
