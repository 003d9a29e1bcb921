"""MLLA (Mamba-like linear attention, MILA in its second version): what makes Mamba work, without its recurrence.

Paper: `Demystify Mamba in Vision: A Linear Attention Perspective` - https://arxiv.org/abs/2405.16605
Official code (MIT) and weights: https://github.com/LeapLabTHU/MLLA
"""

from functools import partial
from typing import Any, Dict, Sequence, Union

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ssmvision.layers import MambaLikeLinearAttention
from ssmvision.layers.linear_attention import rotary_table
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._cpe_pyramid import CPEPyramid, convert_keys, official_model
from ssmvision.models._official import OfficialModel, refuse_unpublished

__all__ = ["MLLA"]


class MLLA(CPEPyramid):
    """MLLA. Images of any size go in: positions are counted, not stored.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling of the head.
        dims: Channels of each stage, or of the first (doubled from stage to stage).
        depths: Blocks of each stage.
        num_heads: Heads of the linear attention in each stage.
        mlp_ratio: Hidden channels of the MLPs / channels.
        qk_bias: Bias in the projections to queries and keys.
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
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 4.0,
        qk_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            mixers=[partial(MambaLikeLinearAttention, num_heads=heads, qk_bias=qk_bias) for heads in num_heads],
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


# Official key → ours, beyond the frame: there the mixer's gate and convolution belong to the block.
_RENAMES = {
    r"(\.blocks\.\d+)\.(in_proj|act_proj|dwc|out_proj)\.": r"\1.mixer.\2.",
    r"(\.blocks\.\d+)\.attn\.": r"\1.mixer.",
}


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged.

    Official weights hold the table of rotations at the training size. It is computed here, for any size; a table with
    other contents stays, so that loading reports it as a surplus key.
    """
    converted = convert_keys(state_dict, _RENAMES)
    return {key: x for key, x in converted.items() if not (key.endswith("rope.rotations") and _is_rotary_table(x))}


def _is_rotary_table(x: Tensor) -> bool:
    """Whether x (h, w, c / 2, cosine and sine) is what the layer computes; the values of no weights (NaN) pass."""
    if x.is_meta:
        return True
    H, W, pairs, _ = x.shape
    sin, cos = rotary_table(torch.empty(1, H, W, 2 * pairs))[..., 0, ::2].unbind(0)
    return not bool(((torch.stack([cos, sin], dim=3) - x).abs() > 1e-2).any())  # in bfloat16 they are 4e-3 apart


# Official arguments and the values that are understood here; others change the computation in ways nobody published.
_UNDERSTOOD = {"patch_size": (4,), "ape": (False,)}


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `MLLA`."""
    refuse_unpublished("MLLA", kwargs, _UNDERSTOOD)
    depths = kwargs.get("depths", (2, 4, 8, 4))
    model = MLLA(
        in_chans=kwargs.get("in_chans", 3),
        num_classes=kwargs.get("num_classes", 1000),
        dims=kwargs.get("embed_dim", 64),
        depths=depths,
        num_heads=kwargs.get("num_heads", (2, 4, 8, 16)),
        mlp_ratio=kwargs.get("mlp_ratio", 4.0),
        qk_bias=kwargs.get("qkv_bias", True),
    )
    return official_model(model, len(depths), as_tokens=True)


_SOURCE = "https://github.com/LeapLabTHU/MLLA"

# The published weights: architecture → (share in the Tsinghua cloud, top-1, FLOPs).
_WEIGHTS = {
    "mlla_tiny": ("7a19712877cb4242889c", 83.5, "4.2G"),
    "mlla_small": ("0e5d0b1409d540aaa80c", 84.4, "7.3G"),
    "mlla_base": ("91c85c5a1061496d8796", 85.3, "16.2G"),
}

PUBLISHED = {
    f"{name}.in1k": Published(
        source=_SOURCE, top1=top1, flops=flops, weights_license="none stated",
        by_hand=f"https://cloud.tsinghua.edu.cn/f/{share}/",
        caveats=("The official code takes square images of the training size; here positions continue beyond it.",),
    )
    for name, (share, top1, flops) in _WEIGHTS.items()
}  # fmt: skip


def _cfg(**fields: Any) -> Any:
    common = {
        "pool_size": (7, 7), "first_conv": "patch_embed.conv1.conv", "classifier": "head.fc", "license": "mit",
        "paper_name": "Demystify Mamba in Vision: A Linear Attention Perspective", "paper_ids": "arXiv:2405.16605",
        "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _cfg() for name in _WEIGHTS}
    | {"test_mlla.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5))}
)


def _create_mlla(variant: str, pretrained: bool = False, **kwargs: Any) -> MLLA:
    return build_model(
        MLLA, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True}, **kwargs,
    )  # fmt: skip


@register_model
def mlla_tiny(pretrained: bool = False, **kwargs: Any) -> MLLA:
    """MLLA-T, 24.4M parameters."""
    args = dict(dims=64, depths=(2, 4, 8, 4), num_heads=(2, 4, 8, 16))
    return _create_mlla("mlla_tiny", pretrained, **dict(args, **kwargs))


@register_model
def mlla_small(pretrained: bool = False, **kwargs: Any) -> MLLA:
    """MLLA-S, 43.0M parameters."""
    args = dict(dims=64, depths=(3, 6, 21, 6), num_heads=(2, 4, 8, 16))
    return _create_mlla("mlla_small", pretrained, **dict(args, **kwargs))


@register_model
def mlla_base(pretrained: bool = False, **kwargs: Any) -> MLLA:
    """MLLA-B, 96.0M parameters."""
    args = dict(dims=96, depths=(3, 6, 21, 6), num_heads=(3, 6, 12, 24))
    return _create_mlla("mlla_base", pretrained, **dict(args, **kwargs))


@register_model
def test_mlla(pretrained: bool = False, **kwargs: Any) -> MLLA:
    """A micro model for tests."""
    args = dict(dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
    return _create_mlla("test_mlla", pretrained, **dict(args, **kwargs))
