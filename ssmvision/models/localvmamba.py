"""LocalVMamba: VMamba that scans windows, each block in the directions that a search found for it.

Paper: `LocalMamba: Visual State Space Model with Windowed Selective Scan` - https://arxiv.org/abs/2403.09338
Official code and weights (Apache-2.0): https://github.com/hunto/LocalMamba
"""

from functools import partial
from typing import Any, Dict, Optional, Sequence, Union

from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ssmvision.layers import LocalSS2D
from ssmvision.layers.vss_block import VSSBlock
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._official import OfficialModel, as_is, nhwc, pyramid_taps, refuse_unpublished
from ssmvision.models._vss_pyramid import VSSPyramid, convert_keys, stage_dims

__all__ = ["LocalVMamba"]


class LocalVMamba(VSSPyramid):
    """LocalVMamba.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling of the head.
        dims: Channels of each stage, or of the first (doubled from stage to stage).
        depths: Blocks of each stage.
        directions: Scan orders of each block, over all stages, such as ("h", "v_flip", "w2", "w7_flip"): rows,
            columns or windows, and the same way back; or the same orders for every block. See
            `ssmvision.ops.routes.local`.
        d_state: State size of the scans.
        ssm_ratio: Inner channels of the scans / channels.
        dt_rank: Rank of the step sizes; None for ceil(channels / 16).
        d_conv: Kernel of the depthwise convolution of the scans.
        conv_bias: Bias in the depthwise convolution of the scans.
        mlp_ratio: Hidden channels of the MLPs / channels; 0 for none.
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
        depths: Sequence[int] = (2, 2, 9, 2),
        directions: Union[Sequence[str], Sequence[Sequence[str]]] = ("h", "v", "w7", "w7_flip"),
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
        dims = stage_dims("LocalVMamba", dims, depths)
        of_blocks: Any = [directions] * sum(depths) if isinstance(directions[0], str) else directions
        if len(of_blocks) != sum(depths):
            raise ValueError(f"LocalVMamba: directions of {len(of_blocks)} blocks for {sum(depths)} blocks")
        mixer = partial(
            LocalSS2D, d_state=d_state, ssm_ratio=ssm_ratio, dt_rank=dt_rank, d_conv=d_conv, conv_bias=conv_bias,
            gate=True,
        )  # fmt: skip
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        remaining = iter(of_blocks)
        blocks = [
            [
                VSSBlock(dim, partial(mixer, directions=next(remaining)), mlp_ratio, drop_path=rate, **dd)
                for rate in of_stage
            ]
            for dim, of_stage in zip(dims, rates, strict=True)
        ]
        super().__init__(
            blocks=blocks,
            dims=dims,
            in_chans=in_chans,
            channels_last=[True] * len(dims),
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged."""
    return convert_keys(state_dict, {r"\.op\.multi_scan\.attn\.": ".op.attn."})


# Official arguments and the values that are understood here; others change the computation in ways nobody published.
_UNDERSTOOD = {"patch_size": (4,), "patch_norm": (True,), "downsample_version": ("v1",), "patchembed_version": ("v1",)}


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `VSSM` of LocalMamba."""
    refuse_unpublished("LocalVMamba", kwargs, _UNDERSTOOD)
    if kwargs.get("directions") is None:
        raise ValueError("LocalVMamba with directions=None is the network that the search trains, not built here")
    depths = kwargs.get("depths", (2, 2, 9, 2))
    model = LocalVMamba(
        in_chans=kwargs.get("in_chans", 3),
        num_classes=kwargs.get("num_classes", 1000),
        dims=kwargs.get("dims", 96),
        depths=depths,
        directions=kwargs["directions"],
        d_state=kwargs.get("ssm_d_state", 16),
        ssm_ratio=kwargs.get("ssm_ratio", 2.0),
        dt_rank=None if kwargs.get("ssm_dt_rank", "auto") == "auto" else kwargs["ssm_dt_rank"],
        d_conv=kwargs.get("ssm_conv", 3),
        conv_bias=kwargs.get("ssm_conv_bias", True),
        mlp_ratio=kwargs.get("mlp_ratio", 0.0),
    )
    return OfficialModel(model, pyramid_taps("LocalVMamba", len(depths), nhwc, as_is))


# What the search found for the blocks of the published models.
_TINY = (
    "h h_flip w7 w7_flip", "h_flip v_flip w2 w2_flip", "h_flip v_flip w2_flip w7", "h_flip v v_flip w2",
    "h h_flip v_flip w2_flip", "h_flip v_flip w2 w2_flip", "h w2_flip w7 w7_flip", "h h_flip v v_flip",
    "h v_flip w7 w7_flip", "h_flip v w2 w7_flip", "v v_flip w2 w7_flip", "h h_flip v_flip w2_flip",
    "v_flip w2_flip w7 w7_flip", "h_flip v_flip w2_flip w7_flip", "h_flip v w7 w7_flip",
)  # fmt: skip
_SMALL = (
    "h v v_flip w7_flip", "h h_flip v w7", "h_flip v v_flip w7", "h_flip v w2_flip w7", "h_flip v w2_flip w7",
    "h_flip v_flip w2 w7_flip", "h_flip v v_flip w7", "h v v_flip w7", "h v v_flip w7", "h v v_flip w7_flip",
    "h h_flip v v_flip", "h v v_flip w2", "v v_flip w2_flip w7", "h h_flip v w2", "h_flip v v_flip w7_flip",
    "h h_flip v v_flip", "h v v_flip w7_flip", "h v v_flip w7_flip", "h h_flip v_flip w7",
    "h_flip v_flip w2_flip w7", "h_flip v v_flip w7_flip", "v v_flip w7 w7_flip", "h v v_flip w7_flip",
    "h_flip v v_flip w2", "h v v_flip w2_flip", "h h_flip v w7", "h h_flip w7 w7_flip", "h v_flip w2 w2_flip",
    "h v_flip w2 w7", "h v v_flip w7_flip", "h_flip v w2_flip w7", "h_flip v_flip w7 w7_flip", "h v w7 w7_flip",
)  # fmt: skip

_SOURCE = "https://github.com/hunto/LocalMamba"
_COLUMNS = (
    "On maps that are not square the official code puts the results of column scans back in wrong places; here they "
    "return to their own, which changes nothing on square images."
)

PUBLISHED = {"localvmamba_small.in1k": Published(source=_SOURCE, top1=83.7, flops="11.4G", caveats=(_COLUMNS,))}


def _cfg(**fields: Any) -> Any:
    common = {
        "pool_size": (7, 7), "first_conv": "patch_embed.conv1", "classifier": "head.fc", "license": "apache-2.0",
        "paper_name": "LocalMamba: Visual State Space Model with Windowed Selective Scan",
        "paper_ids": "arXiv:2403.09338", "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {
        "localvmamba_tiny.untrained": _cfg(),  # its weights were never released
        "localvmamba_small.in1k": _cfg(url=f"{_SOURCE}/releases/download/v1.0.0/local_vssm_small.ckpt"),
        "test_localvmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5)),
    }
)


def _create_localvmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    return build_model(
        LocalVMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True}, **kwargs,
    )  # fmt: skip


@register_model
def localvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-T, 25.5M parameters."""
    args = dict(dims=96, depths=(2, 2, 9, 2), directions=[block.split() for block in _TINY])
    return _create_localvmamba("localvmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def localvmamba_small(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """LocalVMamba-S, 49.7M parameters."""
    args = dict(dims=96, depths=(2, 2, 27, 2), directions=[block.split() for block in _SMALL])
    return _create_localvmamba("localvmamba_small", pretrained, **dict(args, **kwargs))


@register_model
def test_localvmamba(pretrained: bool = False, **kwargs: Any) -> LocalVMamba:
    """A micro model for tests."""
    args = dict(dims=16, depths=(1, 1, 2, 1), d_state=4, directions=("h", "v_flip", "w2", "w7_flip"))
    return _create_localvmamba("test_localvmamba", pretrained, **dict(args, **kwargs))
