"""VSSD: Mamba-2 without its causal order, and softmax attention in the last stage.

Paper: `VSSD: Vision Mamba with Non-Causal State Space Duality` - https://arxiv.org/abs/2407.18559
Official code and weights (no licence stated): https://github.com/YuHengsss/VSSD
"""

from dataclasses import replace
from functools import partial
from typing import Any, Dict, Sequence, Union

from timm.layers import Attention
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ssmvision.layers import NonCausalSSD
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._cpe_pyramid import CPEPyramid, convert_keys, official_model
from ssmvision.models._official import OfficialModel, refuse_unpublished

__all__ = ["VSSD"]


class MapAttention(nn.Module):
    """Softmax attention over all pixels: (b, h, w, dim) → the same."""

    def __init__(self, dim: int, num_heads: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 2)).reshape(x.shape)


class VSSD(CPEPyramid):
    """VSSD.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling of the head.
        dims: Channels of each stage, or of the first (doubled from stage to stage).
        depths: Blocks of each stage.
        num_heads: Heads of the mixers in each stage.
        mixers: "ssd" or "attention" for each stage.
        d_state: State size of the non-causal SSD.
        expand: Inner channels of the non-causal SSD / channels.
        mlp_ratio: Hidden channels of the MLPs / channels.
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
        mixers: Sequence[str] = ("ssd", "ssd", "ssd", "attention"),
        d_state: int = 64,
        expand: int = 2,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        make: Any = {"ssd": partial(NonCausalSSD, d_state=d_state, expand=expand), "attention": MapAttention}
        if unknown := set(mixers) - set(make):
            raise ValueError(f"VSSD: mixers must be 'ssd' or 'attention', not {sorted(unknown)}")
        super().__init__(
            mixers=[partial(make[kind], num_heads=heads) for kind, heads in zip(mixers, num_heads, strict=True)],
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
    r"\.attn\.to_qkv\.": ".mixer.attn.qkv.",
    r"\.attn\.to_out\.": ".mixer.attn.proj.",
    r"(\.blocks\.\d+)\.attn\.": r"\1.mixer.",
}


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged."""
    return convert_keys(state_dict, _RENAMES)


# Official arguments and the values that are understood here; others change the computation in ways nobody published.
_UNDERSTOOD = {
    "patch_size": (4,),
    "ape": (False,),
    "simple_downsample": (False,),
    "simple_patch_embed": (False,),
    "linear_attn_duality": (True,),
    "ssd_positve_dA": (True,),
    "ssd_ngroups": (1,),
    "bidirection": (False,),
}


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `VMAMBA2`."""
    refuse_unpublished("VSSD", kwargs, _UNDERSTOOD)
    depths = kwargs.get("depths", (2, 4, 8, 4))
    kinds = {"mamba2": "ssd", "standard": "attention"}
    model = VSSD(
        in_chans=kwargs.get("in_chans", 3),
        num_classes=kwargs.get("num_classes", 1000),
        dims=kwargs.get("embed_dim", 64),
        depths=depths,
        num_heads=kwargs.get("num_heads", (2, 4, 8, 16)),
        mixers=[kinds[kind] for kind in kwargs["attn_types"]],
        d_state=kwargs.get("d_state", 64),
        expand=kwargs.get("ssd_expansion", 2),
        mlp_ratio=kwargs.get("mlp_ratio", 4.0),
    )
    return replace(official_model(model, len(depths), as_tokens=True), without_effect=("ssd_chunk_size",))


_SOURCE = "https://github.com/YuHengsss/VSSD"
_NO_LICENCE = "The repository states no licence, neither for the code nor for the weights."
_MESA = "Trained with MESA, a regularization by the model's own moving average."

# The published weights: name → (file, top-1, FLOPs).
_WEIGHTS = {
    "vssd_micro.in1k": ("vssd_micro_best.pth", 82.5, "2.3G"),
    "vssd_tiny.in1k": ("vssd_tiny_best_ema.pth", 83.6, "4.5G"),
    "vssd_tiny.mesa_in1k": ("vssd_tiny_e300_with_mesa.pth", 84.1, "4.5G"),
    "vssd_small.in1k": ("vssd_small_best_ema.pth", 84.1, "7.4G"),
    "vssd_small.mesa_in1k": ("vssd_small_e300_with_mesa.pth", 84.5, "7.4G"),
    "vssd_base.in1k": ("vssd_base_best_ema.pth", 84.7, "16.1G"),
    "vssd_base.mesa_in1k": ("vssd_base_e300_with_mesa.pth", 85.4, "16.1G"),
}

PUBLISHED = {
    name: Published(
        source=_SOURCE, top1=top1, flops=flops, caveats=(_NO_LICENCE, _MESA) if "mesa" in name else (_NO_LICENCE,)
    )
    for name, (_, top1, flops) in _WEIGHTS.items()
}


def _cfg(**fields: Any) -> Any:
    common = {
        "pool_size": (7, 7), "first_conv": "patch_embed.conv1.conv", "classifier": "head.fc",
        "license": "none stated", "paper_name": "VSSD: Vision Mamba with Non-Causal State Space Duality",
        "paper_ids": "arXiv:2407.18559", "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {name: _cfg(hf_hub_id="YuhengSSS/VSSD", hf_hub_filename=file) for name, (file, _, _) in _WEIGHTS.items()}
    | {"test_vssd.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5))}
)


def _create_vssd(variant: str, pretrained: bool = False, **kwargs: Any) -> VSSD:
    return build_model(
        VSSD, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True}, **kwargs,
    )  # fmt: skip


@register_model
def vssd_micro(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-M, 13.5M parameters."""
    args = dict(dims=48, depths=(2, 2, 8, 4), num_heads=(2, 4, 8, 16), d_state=48)
    return _create_vssd("vssd_micro", pretrained, **dict(args, **kwargs))


@register_model
def vssd_tiny(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-T, 24.3M parameters."""
    args = dict(dims=64, depths=(2, 4, 8, 4), num_heads=(2, 4, 8, 16))
    return _create_vssd("vssd_tiny", pretrained, **dict(args, **kwargs))


@register_model
def vssd_small(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-S, 40.1M parameters."""
    args = dict(dims=64, depths=(3, 4, 21, 5), num_heads=(2, 4, 8, 16))
    return _create_vssd("vssd_small", pretrained, **dict(args, **kwargs))


@register_model
def vssd_base(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-B, 88.8M parameters."""
    args = dict(dims=96, depths=(3, 4, 21, 5), num_heads=(3, 6, 12, 24))
    return _create_vssd("vssd_base", pretrained, **dict(args, **kwargs))


@register_model
def test_vssd(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """A micro model for tests."""
    args = dict(dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), d_state=16)
    return _create_vssd("test_vssd", pretrained, **dict(args, **kwargs))
