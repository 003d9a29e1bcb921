"""EfficientVMamba: scans that skip pixels beside convolutions, and convolutions alone in the later stages.

Paper: `EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba` - https://arxiv.org/abs/2403.09977
Official code and weights (no licence stated): https://github.com/TerryPei/EfficientVMamba
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Union

from timm.layers import DropPath, SqueezeExcite, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ssmvision.layers import AtrousSS2D, ChannelAttention
from ssmvision.layers.vss_block import VSSBlock
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._official import OfficialModel, as_is, nhwc, pyramid_taps, refuse_unpublished
from ssmvision.models._vss_pyramid import VSSPyramid, convert_keys, stage_dims

__all__ = ["EfficientVMamba"]


class EfficientBlock(VSSBlock):
    """Scans and, beside them, a convolution, both weighed by one channel attention: (b, h, w, dim) → the same."""

    def __init__(
        self,
        dim: int,
        mixer: Callable[..., nn.Module],
        mlp_ratio: float = 0.0,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, mixer, mlp_ratio, drop_path=drop_path, **dd)
        self.conv_branch = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1, **dd),
        )
        self.se = ChannelAttention(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        local = self.conv_branch(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        both = self._weighed(self.op(h)) + self._weighed(local)
        x = x + self.drop_path(both)
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x

    def _weighed(self, x: Tensor) -> Tensor:
        return self.se(x.flatten(1, 2)).view(x.shape)


class InvertedResidual(nn.Module):
    """MobileNetV2's block with squeeze-and-excitation: (b, dim, h, w) → the same.

    Args:
        dim: Channels of input and output.
        expand: Hidden channels / dim.
        drop_path: Stochastic depth rate.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self, dim: int, expand: int = 4, drop_path: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = expand * dim
        self.conv_pw = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False, **dd), nn.BatchNorm2d(hidden, **dd), nn.ReLU()
        )
        self.conv_dw = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False, **dd),
            nn.BatchNorm2d(hidden, **dd),
            nn.ReLU(),
        )
        self.se = SqueezeExcite(hidden, rd_channels=hidden // 8, **dd)
        self.conv_pw2 = nn.Sequential(nn.Conv2d(hidden, dim, 1, bias=False, **dd), nn.BatchNorm2d(dim, **dd))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.conv_pw2(self.se(self.conv_dw(self.conv_pw(x)))))


class EfficientVMamba(VSSPyramid):
    """EfficientVMamba.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling of the head.
        dims: Channels of each stage, or of the first (doubled from stage to stage).
        depths: Blocks of each stage.
        ssm_stages: Stages that scan; those after them are convolutional.
        d_state: State size of the scans.
        ssm_ratio: Inner channels of the scans / channels.
        dt_rank: Rank of the step sizes; None for ceil(channels / 16).
        d_conv: Kernel of the depthwise convolution of the scans.
        conv_bias: Bias in the depthwise convolution of the scans.
        mlp_ratio: Hidden channels of the MLPs in the stages that scan / channels; 0 for none.
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
        dims: Union[int, Sequence[int]] = 48,
        depths: Sequence[int] = (2, 2, 4, 2),
        ssm_stages: int = 2,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: Optional[int] = None,
        d_conv: int = 3,
        conv_bias: bool = True,
        mlp_ratio: float = 0.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dims = stage_dims("EfficientVMamba", dims, depths)
        mixer = partial(
            AtrousSS2D, d_state=d_state, ssm_ratio=ssm_ratio, dt_rank=dt_rank, d_conv=d_conv, conv_bias=conv_bias,
            gate=True,
        )  # fmt: skip

        def block(stage: int, rate: float) -> nn.Module:
            if stage < ssm_stages:
                return EfficientBlock(dims[stage], mixer, mlp_ratio, rate, **dd)
            return InvertedResidual(dims[stage], drop_path=rate, **dd)

        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        blocks: List[List[nn.Module]] = [[block(i, rate) for rate in of_stage] for i, of_stage in enumerate(rates)]
        super().__init__(
            blocks=blocks,
            dims=dims,
            in_chans=in_chans,
            channels_last=[i < ssm_stages for i in range(len(dims))],
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


# Official key → ours, beyond the frame. An official stage of convolutions is a list: a permutation of axes, blocks, a
# permutation, and the downsampling.
_RENAMES = {
    r"\.se\.conv_reduce\.": ".se.fc1.",
    r"\.se\.conv_expand\.": ".se.fc2.",
    r"^layers\.(\d+)\.\d+\.(reduction|norm)\.": r"layers.\1.downsample.\2.",
    r"^layers\.(\d+)\.(\d+)\.": lambda match: f"layers.{match[1]}.blocks.{int(match[2]) - 1}.",
}


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged."""
    return convert_keys(state_dict, _RENAMES)


# Official arguments and the values that are understood here; others change the computation in ways nobody published.
_UNDERSTOOD = {
    "patch_size": (4,),
    "patch_norm": (True,),
    "downsample_version": ("v1",),
    "patchembed_version": ("v1",),
    "step_size": (2,),
}


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `EfficientVSSM`."""
    refuse_unpublished("EfficientVMamba", kwargs, _UNDERSTOOD)
    depths = kwargs.get("depths", (2, 2, 9, 2))
    model = EfficientVMamba(
        in_chans=kwargs.get("in_chans", 3),
        num_classes=kwargs.get("num_classes", 1000),
        dims=kwargs.get("dims", 96),
        depths=depths,
        d_state=kwargs.get("ssm_d_state", 16),
        ssm_ratio=kwargs.get("ssm_ratio", 2.0),
        dt_rank=None if kwargs.get("ssm_dt_rank", "auto") == "auto" else kwargs["ssm_dt_rank"],
        d_conv=kwargs.get("ssm_conv", 3),
        conv_bias=kwargs.get("ssm_conv_bias", True),
        mlp_ratio=kwargs.get("mlp_ratio", 4.0),
    )
    return OfficialModel(model, pyramid_taps("EfficientVMamba", len(depths), nhwc, as_is))


_SOURCE = "https://github.com/TerryPei/EfficientVMamba"
_NO_LICENCE = "The repository states no licence, neither for the code nor for the weights."
_FILE = "The name of the file on the Hub is known from a user's report and was not verified."
_WIDTH = (
    "The official configuration says 96 channels, which makes 24.8M parameters; the published 11M are those of 64 "
    "channels, as built here. The file was not seen."
)

# The published weights: architecture → (size, top-1, FLOPs, caveats).
_WEIGHTS = {
    "efficientvmamba_tiny": ("tiny", 76.5, "0.8G", ()),
    "efficientvmamba_small": ("small", 78.7, "1.3G", (_WIDTH,)),
    "efficientvmamba_base": ("base", 81.8, "4.0G", ()),
}

PUBLISHED = {
    f"{name}.in1k": Published(source=_SOURCE, top1=top1, flops=flops, caveats=(_NO_LICENCE, _FILE, *caveats))
    for name, (_, top1, flops, caveats) in _WEIGHTS.items()
}


def _cfg(**fields: Any) -> Any:
    common = {
        "pool_size": (7, 7), "first_conv": "patch_embed.conv1", "classifier": "head.fc", "license": "none stated",
        "paper_name": "EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba",
        "paper_ids": "arXiv:2403.09977", "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": _cfg(
            hf_hub_id=f"TerryPei/EfficientVMamba-{size.title()}", hf_hub_filename=f"efficient_vmamba_{size}.ckpt"
        )
        for name, (size, *_) in _WEIGHTS.items()
    }
    | {"test_efficientvmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5))}
)


def _create_efficientvmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    return build_model(
        EfficientVMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True}, **kwargs,
    )  # fmt: skip


@register_model
def efficientvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-T, 6.5M parameters."""
    args = dict(dims=48, depths=(2, 2, 4, 2))
    return _create_efficientvmamba("efficientvmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def efficientvmamba_small(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-S, 11.3M parameters."""
    args = dict(dims=64, depths=(2, 2, 4, 2))
    return _create_efficientvmamba("efficientvmamba_small", pretrained, **dict(args, **kwargs))


@register_model
def efficientvmamba_base(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """EfficientVMamba-B, 33.7M parameters."""
    args = dict(dims=96, depths=(2, 2, 9, 2))
    return _create_efficientvmamba("efficientvmamba_base", pretrained, **dict(args, **kwargs))


@register_model
def test_efficientvmamba(pretrained: bool = False, **kwargs: Any) -> EfficientVMamba:
    """A micro model for tests."""
    args = dict(dims=16, depths=(1, 1, 1, 1), d_state=4)
    return _create_efficientvmamba("test_efficientvmamba", pretrained, **dict(args, **kwargs))
