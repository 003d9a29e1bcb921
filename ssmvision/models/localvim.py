"""LocalVim: Vim that scans windows, each block in the directions that a search found for it.

Paper: `LocalMamba: Visual State Space Model with Windowed Selective Scan` - https://arxiv.org/abs/2403.09338
Official code and weights (Apache-2.0): https://github.com/hunto/LocalMamba
"""

import math
import re
from functools import partial
from typing import Any, Dict, List, Sequence, Tuple, Union

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor

from ssmvision.layers import LocalMamba
from ssmvision.layers.patch_embed import PaddedPatchEmbed
from ssmvision.layers.pos_embed import rotary_table, rotate_tokens
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._official import OfficialModel, block_taps, refuse_unpublished
from ssmvision.models._tokens import TokenBlock, TokenModel, fit_pos_embed

__all__ = ["LocalVim"]


class LocalBlock(TokenBlock):
    """A token block whose mixer knows the grid.

    Args:
        *args: Of `TokenBlock`.
        rope_span: First rotate the tokens by their positions, counted from 0 to here on every grid; 0 for no rotation.
    """

    def __init__(self, *args: Any, rope_span: int = 0) -> None:
        super().__init__(*args)
        self.rope_span = rope_span

    def forward(self, x: Tensor, grid: List[int]) -> Tensor:
        """Tokens (b, l, dim) of a grid [height, width] → (b, l, dim)."""
        if self.rope_span:
            x = rotate_tokens(x, grid, self.rope_span)
        return x + self.drop_path(self.mixer(self.norm(x), grid))


class LocalVim(TokenModel):
    """LocalVim. Images of any size go in: the position embedding is resampled where the grid differs.

    Images whose sides are no multiples of the patch are padded with zeros at the bottom and right.

    Args:
        img_size: Image size that the position embedding is stored for.
        patch_size: Side of a patch.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: "token" (the class token), "avg" or "max" over patches, "" for all tokens.
        embed_dim: Channels.
        depth: Blocks.
        directions: Scan orders of each block, such as ("h", "v_flip", "w2", "w7_flip"): rows, columns or windows, and
            the same way back; or the same orders for every block. See `ssmvision.ops.routes.local`.
        d_state: State size of the scans.
        cls_position: Where the class token stands: "middle" or "none".
        pos_embed: Add a position embedding.
        rope: Rotate the tokens by their positions before every block; only without a class token.
        rope_span: The patches that every grid counts as high and wide when it is rotated.
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
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 20,
        directions: Union[Sequence[str], Sequence[Sequence[str]]] = ("h", "h_flip", "w2", "w2_flip"),
        d_state: int = 16,
        cls_position: str = "none",
        pos_embed: bool = True,
        rope: bool = True,
        rope_span: int = 14,
        rms_norm: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if cls_position not in ("middle", "none"):
            raise ValueError(f"LocalVim: cls_position must be 'middle' or 'none', not {cls_position!r}")
        if rope and (cls_position != "none" or embed_dim % 4):
            raise ValueError("LocalVim: rope needs tokens without a class token and embed_dim a multiple of 4")
        of_blocks: Any = [directions] * depth if isinstance(directions[0], str) else directions
        if len(of_blocks) != depth:
            raise ValueError(f"LocalVim: directions of {len(of_blocks)} blocks for {depth} blocks")
        mixer = partial(LocalMamba, d_state=d_state, cls_in_middle=cls_position == "middle")
        super().__init__(
            PaddedPatchEmbed(patch_size, in_chans, embed_dim, device, dtype),
            [partial(mixer, directions=orders) for orders in of_blocks],
            img_size=img_size,
            patch_size=patch_size,
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
            block=partial(LocalBlock, rope_span=rope_span if rope else 0),
            device=device,
            dtype=dtype,
        )
        self.init_weights(needs_reset=False)

    def _grid(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        h, w = (math.ceil(side / self.patch_size) for side in img_size)
        return h, w


# What has a number for each direction in the official code is stacked here.
_STACKED = {
    "conv1d_{}.weight": "conv_weight", "conv1d_{}.bias": "conv_bias", "x_proj_{}.weight": "x_proj_weight",
    "dt_proj_{}.weight": "dt_projs_weight", "dt_proj_{}.bias": "dt_projs_bias", "A_log_{}": "A_logs", "D_{}": "Ds",
}  # fmt: skip


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: Any) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged. The position embedding may need another grid.

    Official weights hold the table of rotations at the training size. It is computed here, for any size; a table with
    other contents stays, so that loading reports it as a surplus key.
    """
    span = getattr(model.layers[0], "rope_span", 0)
    converted = {key: x for key, x in state_dict.items() if not (span and _is_rotary_table(key, x, span))}
    for key in [key for key in converted if re.search(r"\.mixer\.A_log_0$", key)]:
        mixer = key.removesuffix("A_log_0")
        branches = sum(name.startswith(f"{mixer}A_log_") for name in converted)
        for official, ours in _STACKED.items():
            weights = [converted.pop(mixer + official.format(i)) for i in range(branches)]
            stacked = torch.stack(weights)
            converted[mixer + ours] = stacked.squeeze(2) if ours == "conv_weight" else stacked
    return fit_pos_embed(converted, model)


def _is_rotary_table(key: str, x: Tensor, span: int) -> bool:
    """Whether x (h * w, c), of a square grid, is what `rotate_tokens` computes; the values of no weights (NaN) pass."""
    part = {"rope.freqs_sin": 0, "rope.freqs_cos": 1}.get(key)
    if part is None or x.is_meta:
        return part is not None
    side = math.isqrt(x.shape[0])
    table = rotary_table(torch.empty(1, side, side, x.shape[1]), span)[part].flatten(0, 2)
    return table.shape == x.shape and not bool(((table - x).abs() > 1e-2).any())


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `VisionMamba` of LocalMamba."""
    understood: Dict[str, Tuple[Any, ...]] = {
        "mamba_cls": ("MultiMamba",), "bimamba_type": ("v2",), "if_bidirectional": (False,),
        "use_double_cls_token": (False,), "init_layer_scale": (None,), "ssm_cfg": (None, {}), "norm_epsilon": (1e-5,),
        "flip_img_sequences_ratio": (-1.0,),
    }  # fmt: skip
    rope, cls = kwargs.get("if_rope", False), kwargs.get("if_cls_token", False)
    if not cls:
        understood["final_pool_type"] = ("mean", "max")
    refuse_unpublished("LocalVim", kwargs, understood)
    for name, needed in (("if_rope_residual", rope), ("use_middle_cls_token", cls)):
        if needed and not kwargs.get(name, False):
            raise ValueError(f"LocalVim with {name}=False was never published and is not built here")
    if kwargs.get("directions") is None:
        raise ValueError("LocalVim with directions=None is the network that the search trains, not built here")
    model = LocalVim(
        img_size=kwargs.get("img_size", 224),
        patch_size=kwargs.get("patch_size", 16),
        in_chans=kwargs.get("channels", 3),
        num_classes=kwargs.get("num_classes", 1000),
        # A class token wins over final_pool_type, which the published names set to 'mean' in vain.
        global_pool="token" if cls else {"mean": "avg", "max": "max"}[kwargs.get("final_pool_type", "mean")],
        embed_dim=kwargs.get("embed_dim", 192),
        depth=kwargs.get("depth", len(kwargs["directions"])),
        directions=kwargs["directions"],
        d_state=kwargs.get("d_state", 16),
        cls_position="middle" if cls else "none",
        pos_embed=kwargs.get("if_abs_pos_embed", False),
        rope=rope,
        rope_span=kwargs.get("pt_hw_seq_len", 14),
        rms_norm=kwargs.get("rms_norm", False),
    )
    without_effect = ("final_pool_type", "ft_seq_len", "if_rope_residual", "use_middle_cls_token")
    return OfficialModel(model, block_taps, without_effect=without_effect)


# What the search found for the blocks of the tiny model.
_SEARCHED = (
    "h v_flip w7 w7_flip", "h_flip w2_flip w7 w7_flip", "h h_flip v w7", "h h_flip v v_flip", "h h_flip v v_flip",
    "h h_flip v v_flip", "h_flip v v_flip w7", "h_flip v v_flip w2_flip", "h h_flip v v_flip", "h h_flip v v_flip",
    "h v v_flip w2", "h v v_flip w2_flip", "h h_flip v_flip w7", "h_flip v v_flip w2", "h h_flip v v_flip",
    "h v w2 w2_flip", "v v_flip w2 w7", "h h_flip v w2", "h h_flip w2_flip w7", "v v_flip w2 w2_flip",
)  # fmt: skip

_SOURCE = "https://github.com/hunto/LocalMamba"
_COLUMNS = (
    "On maps that are not square the official code puts the results of column scans back in wrong places; here they "
    "return to their own, which changes nothing on square images."
)
_SMALL = (
    "The official table links the file of LocalVMamba-S in place of this one; the name of this file is inferred from "
    "the others and was not verified.",
    "The official code defines this model twice, with different directions; the later definition counts, also here.",
)

# The published weights: name → (file, top-1, FLOPs, caveats).
_WEIGHTS = {
    "localvim_tiny.in1k": ("local_vim_tiny.ckpt", 76.2, "1.5G", ()),
    "localvim_tiny_midcls.in1k": ("local_vim_tiny_middle_cls_token.ckpt", 77.8, "1.5G", ()),
    "localvim_small.in1k": ("local_vim_small.ckpt", 81.1, "4.8G", _SMALL),
}

PUBLISHED = {
    name: Published(source=_SOURCE, top1=top1, flops=flops, caveats=(_COLUMNS, *caveats))
    for name, (_, top1, flops, caveats) in _WEIGHTS.items()
}


def _cfg(**fields: Any) -> Any:
    common = {
        "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
        "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
        "paper_ids": "arXiv:2403.09338", "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {name: _cfg(url=f"{_SOURCE}/releases/download/v1.0.0/{file}") for name, (file, *_) in _WEIGHTS.items()}
    | {"test_localvim.untrained": _cfg(input_size=(3, 160, 160))}
)


def _create_localvim(variant: str, pretrained: bool = False, **kwargs: Any) -> LocalVim:
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model(
        LocalVim, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **kwargs
    )


@register_model
def localvim_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T, 8.0M parameters."""
    args = dict(embed_dim=192, directions=[block.split() for block in _SEARCHED])
    return _create_localvim("localvim_tiny", pretrained, **dict(args, **kwargs))


@register_model
def localvim_tiny_midcls(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-T with a class token in the middle, and without rotations, 8.0M parameters."""
    args = dict(
        embed_dim=192, directions=[block.split() for block in _SEARCHED], cls_position="middle", global_pool="token",
        rope=False,
    )  # fmt: skip
    return _create_localvim("localvim_tiny_midcls", pretrained, **dict(args, **kwargs))


@register_model
def localvim_small(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """LocalVim-S, 27.8M parameters."""
    args = dict(embed_dim=384, directions=("h", "h_flip", "w2", "w2_flip"))
    return _create_localvim("localvim_small", pretrained, **dict(args, **kwargs))


@register_model
def test_localvim(pretrained: bool = False, **kwargs: Any) -> LocalVim:
    """A micro model for tests."""
    args = dict(img_size=160, embed_dim=48, depth=4, directions=("h", "v_flip", "w2", "w7_flip"))
    return _create_localvim("test_localvim", pretrained, **dict(args, **kwargs))
