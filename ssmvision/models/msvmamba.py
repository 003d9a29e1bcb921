"""MSVMamba: of VMamba's four scans, three go over a map of half the resolution.

Paper: `Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model` - https://arxiv.org/abs/2405.14174
Official code and weights (no licence stated): https://github.com/YuHengsss/MSVMamba
"""

import re
from functools import partial
from typing import Any, Dict, Optional, Sequence, Union

from timm.layers import Mlp, calculate_drop_path_rates, get_act_layer
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ssmvision.layers import MultiScaleSS2D
from ssmvision.layers.conv_mlp import ConvMlp
from ssmvision.layers.vss_block import VSSBlock
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._official import OfficialModel, as_is, nhwc, pyramid_taps, refuse_unpublished
from ssmvision.models._vss_pyramid import VSSPyramid, convert_keys, stage_dims

__all__ = ["MSVMamba"]


class MSVMamba(VSSPyramid):
    """MSVMamba.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling of the head.
        dims: Channels of each stage, or of the first (doubled from stage to stage).
        depths: Blocks of each stage.
        d_state: State size of the scans.
        ssm_ratio: Inner channels of the scans / channels.
        dt_rank: Rank of the step sizes; None for ceil(channels / 16).
        d_conv: Kernel of the depthwise convolution at full resolution; that to half resolution has 7 x 7.
        conv_bias: Bias in these convolutions.
        ssm_act: Activation after them and of the gate.
        squeeze_excite: Weigh the channels of what was scanned by their means.
        mlp_ratio: Hidden channels of the MLPs / channels; 0 for none.
        conv_mlp: Give the MLPs a depthwise convolution.
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
        depths: Sequence[int] = (1, 2, 9, 2),
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: Optional[int] = None,
        d_conv: int = 3,
        conv_bias: bool = True,
        ssm_act: str = "silu",
        squeeze_excite: bool = True,
        mlp_ratio: float = 2.0,
        conv_mlp: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dims = stage_dims("MSVMamba", dims, depths)
        mixer = partial(
            MultiScaleSS2D, d_state=d_state, ssm_ratio=ssm_ratio, dt_rank=dt_rank, d_conv=d_conv, conv_bias=conv_bias,
            act_layer=get_act_layer(ssm_act), squeeze_excite=squeeze_excite,
        )  # fmt: skip
        mlp: Any = partial(ConvMlp, residual=True) if conv_mlp else Mlp
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        super().__init__(
            blocks=[
                [VSSBlock(dim, mixer, mlp_ratio, drop_path=rate, mlp=mlp, **dd) for rate in of_stage]
                for dim, of_stage in zip(dims, rates, strict=True)
            ],
            dims=dims,
            in_chans=in_chans,
            channels_last=[True] * len(dims),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


# Official key → ours, beyond the frame.
_RENAMES = {
    r"\.convFFN\.linear(\d)\.": r".mlp.fc\1.",
    r"\.convFFN\.dwc\.": ".mlp.dwconv.",
    r"\.se\.fc\.0\.": ".se.fc1.",
    r"\.se\.fc\.2\.": ".se.fc2.",
}


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged. What is a 1 x 1 convolution there may be linear here, or reversed."""
    return {key: _reshaped(key, x) for key, x in convert_keys(state_dict, _RENAMES).items()}


def _reshaped(key: str, x: Tensor) -> Tensor:
    if re.search(r"\.mlp\.fc\d\.weight$", key) and x.ndim == 4:
        return x.flatten(1)
    if re.search(r"\.se\.fc\d\.weight$", key) and x.ndim == 2:
        return x[:, :, None, None]
    return x


# Official arguments and the values that are understood here; others change the computation in ways nobody published.
_UNDERSTOOD = {
    "patch_size": (4,), "patch_norm": (True,), "norm_layer": ("ln",), "downsample_version": ("v1",),
    "patchembed_version": ("v1",), "forward_type": ("v2",), "sscore_type": ("multiscale_4scan_12",),
    "add_conv": (True,), "ms_split": ([1, 3], (1, 3)), "ms_fusion": (None,), "upsample": ("interpolate",),
    "sep_norm": (False,), "lpu": (False,),
}  # fmt: skip


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `VSSM` of MSVMamba."""
    depths, conv_mlp, ssm_ratio = kwargs["depths"], kwargs.get("convFFN", True), kwargs.get("ssm_ratio", 2.0)
    refuse_unpublished("MSVMamba", kwargs, _UNDERSTOOD | ({"mlp_ratio": (0.0,)} if conv_mlp else {}))
    if 0 < kwargs.get("ssm_rank_ratio", 2.0) < ssm_ratio:
        refuse_unpublished("MSVMamba", kwargs, {"ssm_rank_ratio": (ssm_ratio,)})
    if not set(range(len(depths))) <= set(kwargs.get("ms_stage", range(len(depths)))):
        raise ValueError(f"MSVMamba with ms_stage={kwargs['ms_stage']}, not all stages, was never published")
    model = MSVMamba(
        in_chans=kwargs.get("in_chans", 3),
        num_classes=kwargs.get("num_classes", 1000),
        dims=kwargs.get("dims", 96),
        depths=depths,
        d_state=kwargs.get("ssm_d_state", 1),
        ssm_ratio=ssm_ratio,
        dt_rank=None if kwargs.get("ssm_dt_rank", "auto") == "auto" else kwargs["ssm_dt_rank"],
        d_conv=kwargs.get("ssm_conv", 3),
        conv_bias=kwargs.get("ssm_conv_bias", True),
        ssm_act=kwargs.get("ssm_act_layer", "silu"),
        squeeze_excite=kwargs.get("add_se", True),
        mlp_ratio=2.0 if conv_mlp else kwargs.get("mlp_ratio", 0.0),
        conv_mlp=conv_mlp,
    )
    taps = pyramid_taps("MSVMamba", len(depths), nhwc, as_is)
    return OfficialModel(model, taps, without_effect=("ffn_dropout",))


_SOURCE = "https://github.com/YuHengsss/MSVMamba"
_CAVEATS = ("The repository states no licence, neither for the code nor for the weights.",)

# The published weights: architecture → (Google Drive folder, top-1, FLOPs).
_WEIGHTS = {
    "msvmamba_nano": ("1J41w3ApitQhp2O3wHmJoOs4U032uqebK", 77.3, "0.9G"),
    "msvmamba_micro": ("1jfl2GmuKcUB8sPwRlyHK_wT0MjqgljYk", 79.8, "1.5G"),
    "msvmamba_tiny": ("1ddNWk89ohcxxMuVEaJ2Y5A6xeBKgA7lU", 82.8, "4.6G"),
}

PUBLISHED = {
    f"{name}.in1k": Published(
        source=_SOURCE, top1=top1, flops=flops, caveats=_CAVEATS,
        by_hand=f"https://drive.google.com/drive/folders/{folder}",
    )
    for name, (folder, top1, flops) in _WEIGHTS.items()
}  # fmt: skip


def _cfg(**fields: Any) -> Any:
    common = {
        "pool_size": (7, 7), "first_conv": "patch_embed.conv1", "classifier": "head.fc", "license": "none stated",
        "paper_name": "Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model",
        "paper_ids": "arXiv:2405.14174", "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _cfg() for name in _WEIGHTS}
    | {"test_msvmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5))}
)


def _create_msvmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    return build_model(
        MSVMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True}, **kwargs,
    )  # fmt: skip


@register_model
def msvmamba_nano(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-N, 6.9M parameters."""
    args = dict(dims=48, depths=(1, 2, 5, 2))
    return _create_msvmamba("msvmamba_nano", pretrained, **dict(args, **kwargs))


@register_model
def msvmamba_micro(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-M, 11.9M parameters."""
    args = dict(dims=64, depths=(1, 2, 5, 2))
    return _create_msvmamba("msvmamba_micro", pretrained, **dict(args, **kwargs))


@register_model
def msvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """MSVMamba-T, 33.0M parameters."""
    args = dict(dims=96, depths=(1, 2, 9, 2))
    return _create_msvmamba("msvmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def test_msvmamba(pretrained: bool = False, **kwargs: Any) -> MSVMamba:
    """A micro model for tests."""
    args = dict(dims=16, depths=(1, 1, 1, 1))
    return _create_msvmamba("test_msvmamba", pretrained, **dict(args, **kwargs))
