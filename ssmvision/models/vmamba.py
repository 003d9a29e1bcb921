"""VMamba: a hierarchical backbone of 2-D selective scans.

Paper: `VMamba: Visual State Space Model` - https://arxiv.org/abs/2401.10166
Official code and weights (MIT): https://github.com/MzeroMiko/VMamba
"""

from functools import partial
from typing import Any, Dict, Optional, Sequence, Union

from timm.layers import LayerNorm2d, calculate_drop_path_rates, get_act_layer
from timm.models import generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from ssmvision.layers import SS2D, ScalarSS2D
from ssmvision.layers.vss_block import PatchMerging, PatchStem, VSSBlock
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._official import (
    OfficialModel,
    as_is,
    nchw,
    nhwc,
    pyramid_taps,
    refuse_unpublished,
    rename,
    stage_key,
)
from ssmvision.models._pyramid import Pyramid, Stage

__all__ = ["VMamba"]


class ConvStem(nn.Sequential):
    """v05: two overlapping 3 x 3 convolutions of stride 2, (b, in_chans, h, w) → (b, dim, h/4, w/4)."""

    def __init__(self, in_chans: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = LayerNorm2d(dim // 2, eps=1e-5, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = LayerNorm2d(dim, eps=1e-5, **dd)


class ConvDownsample(nn.Sequential):
    """v05: a convolution of stride 2, 3 x 3 and overlapping or 2 x 2, and a norm."""

    def __init__(self, dim: int, out_dim: int, kernel: int = 3, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, kernel, stride=2, padding=kernel // 3, **dd)
        self.norm = LayerNorm2d(out_dim, eps=1e-5, **dd)


class VMamba(Pyramid):
    """VMamba of any published generation; the defaults are those of v05 ("s1").

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling of the head.
        dims: Channels of each stage, or of the first (doubled from stage to stage).
        depths: Blocks of each stage.
        d_state: State size of the scans.
        ssm_ratio: Inner channels of the scans / channels.
        dt_rank: Rank of the step sizes; None for ceil(channels / 16).
        d_conv: Kernel of the depthwise convolution of the scans.
        conv_bias: Bias in the depthwise convolution of the scans.
        gate: Gate the scans (v0).
        ssm_act: Activation after that convolution.
        scalar_decay: One decay per head, the Mamba-2 form ("m0").
        mlp_ratio: Hidden channels of the MLPs / channels; 0 for none (v0).
        mlp_act: Activation of the MLPs.
        stem: "conv" (v05) or "patch" (v0).
        downsample: "conv" (v05), "conv2x2" or "merge" (v0).
        out_norms: Pyramid backbone for detection and segmentation: a norm on every stage's output instead of a
            classifier. With `features_only=True` the normalised maps are returned.
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
        dims: Union[int, Sequence[int]] = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: Optional[int] = None,
        d_conv: int = 3,
        conv_bias: bool = False,
        gate: bool = False,
        ssm_act: str = "silu",
        scalar_decay: bool = False,
        mlp_ratio: float = 4.0,
        mlp_act: str = "gelu",
        stem: str = "conv",
        downsample: str = "conv",
        out_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)

        def mixer(dim: int, **dd: Any) -> nn.Module:
            layer = ScalarSS2D if scalar_decay else SS2D
            return layer(dim, d_state, ssm_ratio, dt_rank, d_conv, conv_bias, gate, get_act_layer(ssm_act), **dd)

        make_downsample: Any = {
            "conv": ConvDownsample, "conv2x2": partial(ConvDownsample, kernel=2), "merge": PatchMerging
        }[downsample]  # fmt: skip
        act = get_act_layer(mlp_act)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                make_downsample(dims[i - 1], dim, **dd) if i else nn.Identity(),
                [VSSBlock(dim, mixer, mlp_ratio, act, rate, **dd) for rate in rates[i]],
            )
            for i, dim in enumerate(dims)
        ]
        super().__init__(
            patch_embed={"conv": ConvStem, "patch": PatchStem}[stem](in_chans, dims[0], **dd),
            stages=stages,
            dims=dims,
            norm=nn.Identity() if out_norms else LayerNorm2d(dims[-1], eps=1e-5, **dd),
            in_chans=in_chans,
            num_classes=0 if out_norms else num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            out_norms=[LayerNorm2d(dim, eps=1e-5, **dd) for dim in dims] if out_norms else [],
            **dd,
        )
        self.init_weights(needs_reset=False)


# Official key → ours.
_RENAMES = (
    (r"^patch_embed\.(0|proj)\.", "patch_embed.conv1."),
    (r"^patch_embed\.(2|norm)\.", "patch_embed.norm1."),
    (r"^patch_embed\.5\.", "patch_embed.conv2."),
    (r"^patch_embed\.7\.", "patch_embed.norm2."),
    (r"\.ln_1\.", ".norm."),  # v0 checkpoints
    (r"\.self_attention\.", ".op."),
    (r"\.op\.conv2d\.1\.", ".op.conv2d."),  # m0
    (r"^(classifier\.)?norm\.", "norm."),
    (r"^(classifier\.)?head\.(?!fc)", "head.fc."),
    (r"^outnorm(\d)\.", r"out_norms.\1."),
    (r"\.downsample\.1\.", ".downsample.conv."),
    (r"\.downsample\.3\.", ".downsample.norm."),
)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Official keys of every generation (v0, v05, m0; classifier or backbone) → ours; ours pass unchanged."""
    if any(key.startswith("stages.") for key in state_dict):
        return state_dict
    converted = {}
    target = model.state_dict()
    for key, value in state_dict.items():
        key = key.removeprefix("backbone.")
        key = stage_key(rename(key, _RENAMES))
        if value.ndim == 4 and key in target and target[key].ndim == 2:  # linear layers stored as 1 x 1 convolutions
            value = value.flatten(1)
        converted[key] = value
    return converted


# Official arguments and the values that are understood here; others change the computation in ways nobody published.
_UNDERSTOOD = {
    "patch_size": (4,),
    "forward_type": ("v0", "v05", "v05_noz", "m0", "m0_noz"),
    "gmlp": (False,),
    "patch_norm": (True,),
    "norm_layer": ("ln", "ln2d"),
    "downsample_version": ("v1", "v2", "v3"),
    "patchembed_version": ("v1", "v2"),
    "posembed": (False,),
}


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `VSSM` or `Backbone_VSSM`."""
    forward_type = kwargs.get("forward_type", "v0")
    backbone = official_class.endswith("Backbone_VSSM")
    refuse_unpublished("VMamba", kwargs, _UNDERSTOOD)
    model: nn.Module = VMamba(
        in_chans=kwargs.get("in_chans", 3),
        num_classes=kwargs.get("num_classes", 1000),
        dims=kwargs.get("dims", 96),
        depths=kwargs["depths"],
        d_state=kwargs.get("ssm_d_state", 16),
        ssm_ratio=kwargs.get("ssm_ratio", 2.0),
        dt_rank=None if kwargs.get("ssm_dt_rank", "auto") == "auto" else kwargs["ssm_dt_rank"],
        d_conv=kwargs.get("ssm_conv", 3),
        ssm_act=kwargs.get("ssm_act_layer", "silu"),
        mlp_act=kwargs.get("mlp_act_layer", "gelu"),
        conv_bias=kwargs.get("ssm_conv_bias", True),
        gate=not forward_type.endswith("noz"),
        scalar_decay=forward_type.startswith("m0"),
        mlp_ratio=kwargs.get("mlp_ratio", 4.0),
        stem={"v1": "patch", "v2": "conv"}[kwargs.get("patchembed_version", "v1")],
        downsample={"v1": "merge", "v2": "conv2x2", "v3": "conv"}[kwargs.get("downsample_version", "v2")],
        out_norms=backbone,
    )
    channels_first = kwargs.get("norm_layer") == "ln2d"
    prefix = ""
    if backbone:
        model, prefix = FeatureGetterNet(model, out_indices=kwargs.get("out_indices", (0, 1, 2, 3))), "model."
    read_map, read_block = (as_is, nchw) if channels_first else (nhwc, as_is)
    return OfficialModel(model, pyramid_taps("VMamba", len(kwargs["depths"]), read_map, read_block, prefix))


_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download"
_SOURCE = "https://github.com/MzeroMiko/VMamba"

# The published weights: architecture → (release, file, top-1, FLOPs).
_WEIGHTS = {
    "vmamba_v0_tiny": ("v0cls", "vssmtiny_dp01_ckpt_epoch_292.pth", 82.2, "5.6G"),
    "vmamba_v0_small": ("v0cls", "vssmsmall_dp03_ckpt_epoch_238.pth", 83.5, "11.2G"),
    "vmamba_v0_base": ("v0cls", "vssmbase_dp06_ckpt_epoch_241.pth", 83.7, "18.0G"),
    "vmamba_tiny_s2l5": ("v2cls", "vssm_tiny_0230_ckpt_epoch_262.pth", 82.5, "4.9G"),
    "vmamba_small_s2l15": ("v2cls", "vssm_small_0229_ckpt_epoch_222.pth", 83.6, "8.7G"),
    "vmamba_base_s2l15": ("v2cls", "vssm_base_0229_ckpt_epoch_237.pth", 83.9, "15.4G"),
    "vmamba_tiny_s1l8": ("v2cls", "vssm1_tiny_0230s_ckpt_epoch_264.pth", 82.6, "4.9G"),
    "vmamba_small_s1l20": ("v2cls", "vssm1_small_0229s_ckpt_epoch_240.pth", 83.3, "8.6G"),
    "vmamba_base_s1l20": ("v2cls", "vssm1_base_0229s_ckpt_epoch_225.pth", 83.8, "15.2G"),
}

PUBLISHED = {
    f"{name}.in1k": Published(source=_SOURCE, top1=top1, flops=flops) for name, (_, _, top1, flops) in _WEIGHTS.items()
}


def _cfg(**fields: Any) -> Any:
    common = {
        "pool_size": (7, 7), "first_conv": "patch_embed.conv1", "classifier": "head.fc", "license": "mit",
        "paper_name": "VMamba: Visual State Space Model", "paper_ids": "arXiv:2401.10166", "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {
        # The '#' of the release tags must be escaped.
        f"{name}.in1k": _cfg(url=f"{_RELEASES}/%23{tag}/{file}")
        for name, (tag, file, _, _) in _WEIGHTS.items()
    }
    | {"test_vmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5))}
)


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    # Only the getter applies the norms of a pyramid backbone.
    feature_cls = "getter" if kwargs.get("out_norms") else "list"
    return build_model(
        VMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": feature_cls, "flatten_sequential": True}, **kwargs,
    )  # fmt: skip


_V0 = {
    "d_state": 16, "ssm_ratio": 2.0, "conv_bias": True, "gate": True, "mlp_ratio": 0.0,
    "stem": "patch", "downsample": "merge",
}  # fmt: skip


@register_model
def vmamba_v0_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T of the first preprint, 22.9M parameters."""
    args = dict(_V0, dims=96, depths=(2, 2, 9, 2))
    return _create_vmamba("vmamba_v0_tiny", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_v0_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S of the first preprint, 44.4M parameters."""
    args = dict(_V0, dims=96, depths=(2, 2, 27, 2))
    return _create_vmamba("vmamba_v0_small", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_v0_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B of the first preprint, 76.3M parameters."""
    args = dict(_V0, dims=128, depths=(2, 2, 27, 2))
    return _create_vmamba("vmamba_v0_base", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, SSM ratio 2 and 5 blocks in stage 3, 30.7M parameters."""
    args = dict(dims=96, depths=(2, 2, 5, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, SSM ratio 2 and 15 blocks in stage 3, 50.1M parameters."""
    args = dict(dims=96, depths=(2, 2, 15, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_small_s2l15", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, SSM ratio 2 and 15 blocks in stage 3, 88.6M parameters."""
    args = dict(dims=128, depths=(2, 2, 15, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_base_s2l15", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T, SSM ratio 1 and 8 blocks in stage 3, 30.2M parameters."""
    args = dict(dims=96, depths=(2, 2, 8, 2))
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S, SSM ratio 1 and 20 blocks in stage 3, 49.0M parameters."""
    args = dict(dims=96, depths=(2, 2, 20, 2))
    return _create_vmamba("vmamba_small_s1l20", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B, SSM ratio 1 and 20 blocks in stage 3, 86.6M parameters."""
    args = dict(dims=128, depths=(2, 2, 20, 2))
    return _create_vmamba("vmamba_base_s1l20", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The VMamba-T that its authors measure fastest, `vmamba_tiny_s1l8`."""
    return vmamba_tiny_s1l8(pretrained, **kwargs)


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The VMamba-S that its authors measure fastest, `vmamba_small_s1l20`."""
    return vmamba_small_s1l20(pretrained, **kwargs)


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The VMamba-B that its authors measure fastest, `vmamba_base_s1l20`."""
    return vmamba_base_s1l20(pretrained, **kwargs)


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A micro model for tests and the quickstart."""
    args = dict(dims=16, depths=(1, 1, 2, 1))
    return _create_vmamba("test_vmamba", pretrained, **dict(args, **kwargs))
