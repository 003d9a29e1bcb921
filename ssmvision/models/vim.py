"""Vision Mamba (Vim): a plain, ViT-like stack of bidirectional Mamba blocks.

Paper: `Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model` -
https://arxiv.org/abs/2401.09417
Official code and weights (Apache-2.0): https://github.com/hustvl/Vim
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Dict, Optional, Tuple, Union

from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from ssmvision.layers import BiMamba, ImportanceOrder
from ssmvision.layers.patch_embed import PatchEmbed
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._official import OfficialModel, block_taps, refuse_unpublished
from ssmvision.models._tokens import TokenModel, fit_pos_embed

__all__ = ["Vim"]


class Vim(TokenModel):
    """Vim v2. Images of any size go in: the position embedding is resampled where the grid differs.

    Args:
        img_size: Image size that the position embedding is stored for.
        patch_size: Side of a patch.
        stride: Step between patches; None for patch_size.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: "token" (the class token), "avg" or "max" over patches, "" for all tokens.
        embed_dim: Channels.
        depth: Blocks.
        d_state: State size of the scans.
        cls_position: Where the class token stands: "middle", "first" or "none".
        pos_embed: Add a position embedding.
        merge: "mean" or "sum" of the two directions.
        input_output: "positive" keeps the tokens of every layer from vanishing, see `layers/token_dynamics.py`.
        importance_order: Let the mixers see the tokens in the order of a learned score.
        rms_norm: RMSNorm; otherwise LayerNorm.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Largest stochastic depth rate, reached in the last block.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: int = 16,
        stride: Optional[int] = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        cls_position: str = "middle",
        pos_embed: bool = True,
        merge: str = "mean",
        input_output: str = "free",
        importance_order: bool = False,
        rms_norm: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if cls_position not in ("middle", "first", "none"):
            raise ValueError(f"Vim: cls_position must be 'middle', 'first' or 'none', not {cls_position!r}")
        stride = stride or patch_size
        mixer = partial(BiMamba, d_state=d_state, merge=merge, input_output=input_output)
        super().__init__(
            PatchEmbed(patch_size, stride, in_chans, embed_dim, device, dtype),
            _ordered(mixer) if importance_order else mixer,
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            embed_dim=embed_dim,
            depth=depth,
            cls_position=cls_position,
            pos_embed=pos_embed,
            rms_norm=rms_norm,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )
        self.init_weights(needs_reset=False)


def _ordered(mixer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Makes the same mixer within `ImportanceOrder`."""
    return lambda dim, **dd: ImportanceOrder(dim, mixer(dim, **dd), **dd)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: Any) -> Dict[str, Tensor]:
    """Keys are the official ones; only the position embedding may need another grid."""
    return fit_pos_embed(state_dict, model)


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `VisionMamba`."""
    cls_position = "none"
    if kwargs.get("if_cls_token", False):
        cls_position = "middle" if kwargs.get("use_middle_cls_token", False) else "first"
    understood = {
        "if_rope": (False,), "bimamba_type": ("v2",), "use_double_cls_token": (False,), "if_bidirectional": (False,),
        "init_layer_scale": (None,), "ssm_cfg": (None, {}), "norm_epsilon": (1e-5,),
        "flip_img_sequences_ratio": (-1.0,),
    }  # fmt: skip
    if cls_position == "none":
        understood["final_pool_type"] = ("mean", "max")
    refuse_unpublished("Vim", kwargs, understood)
    patch_size = kwargs.get("patch_size", 16)
    model = Vim(
        img_size=kwargs.get("img_size", 224),
        patch_size=patch_size,
        stride=kwargs.get("stride", patch_size),
        in_chans=kwargs.get("channels", 3),
        num_classes=kwargs.get("num_classes", 1000),
        # A class token wins over final_pool_type, which the published names set to 'mean' in vain.
        global_pool={"mean": "avg", "max": "max"}[kwargs.get("final_pool_type", "mean")]
        if cls_position == "none"
        else "token",
        embed_dim=kwargs.get("embed_dim", 192),
        depth=kwargs.get("depth", 24),
        d_state=kwargs.get("d_state", 16),
        cls_position=cls_position,
        pos_embed=kwargs.get("if_abs_pos_embed", False),
        merge="mean" if kwargs.get("if_divide_out", False) else "sum",
        rms_norm=kwargs.get("rms_norm", False),
    )
    without_effect = ("final_pool_type", "ft_seq_len", "if_rope_residual", "pt_hw_seq_len", "use_middle_cls_token")
    return OfficialModel(model, block_taps, without_effect=without_effect)


_SOURCE = "https://github.com/hustvl/Vim"
_STRIDE8 = (
    "Fine-tuned from the stride-16 weights by the official code, whose position-embedding resize takes row 0 for the "
    "class row; the stored weights are consistent as they are.",
)

# The published weights: architecture → (Hub repository, file, top-1, top-5).
_WEIGHTS = {
    "vim_tiny_patch16_224": ("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth", 76.1, 93.0),
    "vim_tiny_patch16_stride8_224": ("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth", 78.3, 94.2),
    "vim_small_patch16_224": ("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth", 80.5, 95.1),
    "vim_small_patch16_stride8_224": ("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth", 81.6, 95.4),
    "vim_base_patch16_224": ("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth", 81.9, 95.8),
}

PUBLISHED = {
    f"{name}.midcls_in1k": Published(
        source=_SOURCE, top1=top1, top5=top5, caveats=_STRIDE8 if "stride8" in name else ()
    )
    for name, (_, _, top1, top5) in _WEIGHTS.items()
}


def _cfg(**fields: Any) -> Any:
    common = {
        "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "paper_ids": "arXiv:2401.09417", "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {
        f"{name}.midcls_in1k": _cfg(hf_hub_id=repository, hf_hub_filename=file)
        for name, (repository, file, _, _) in _WEIGHTS.items()
    }
    | {"test_vim.untrained": _cfg(input_size=(3, 160, 160))}
)


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> Vim:
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model(
        Vim, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **kwargs
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti, 7.1M parameters."""
    args = dict(embed_dim=192, depth=24)
    return _create_vim("vim_tiny_patch16_224", pretrained, **dict(args, **kwargs))


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+, overlapping patches, 7.3M parameters."""
    args = dict(embed_dim=192, depth=24, stride=8)
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **dict(args, **kwargs))


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S, 25.8M parameters."""
    args = dict(embed_dim=384, depth=24)
    return _create_vim("vim_small_patch16_224", pretrained, **dict(args, **kwargs))


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+, overlapping patches, 26.0M parameters."""
    args = dict(embed_dim=384, depth=24, stride=8)
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **dict(args, **kwargs))


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B, 97.6M parameters."""
    args = dict(embed_dim=768, depth=24)
    return _create_vim("vim_base_patch16_224", pretrained, **dict(args, **kwargs))


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A micro model for tests."""
    args = dict(img_size=160, embed_dim=48, depth=4)
    return _create_vim("test_vim", pretrained, **dict(args, **kwargs))


# timm has no aliases but names of the past: hidden from lists, mapped to the name of today with a warning.
_OFFICIAL = "_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
register_model_deprecations(
    __name__, {f"{name}{_OFFICIAL}": f"{name}.midcls_in1k" for name in _WEIGHTS if not name.startswith("vim_base")}
)
