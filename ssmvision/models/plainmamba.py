"""PlainMamba: a plain stack of blocks whose four scans wind over the map without a jump.

Paper: `PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition` - https://arxiv.org/abs/2403.17695
Official code (Apache-2.0) and weights (no licence stated): https://github.com/ChenhongyiYang/PlainMamba
"""

from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ssmvision.layers.plain_mamba import PlainMambaMixer
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._official import OfficialModel, Tap, refuse_unpublished, rename
from ssmvision.models._tokens import TokenBlock, TokenModel, fit_pos_embed

__all__ = ["PlainMamba"]

STEM_DIM = 64


class ConvPatchEmbed(nn.Module):
    """Patches of a map of convolutions at half resolution; what the last patches lack is zero.

    (b, in_chans, h, w) → (b, dim, ceil(h / patch), ceil(w / patch)).
    """

    def __init__(
        self, patch_size: int, in_chans: int, dim: int, num_convs: int, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if patch_size % 2:
            raise ValueError(f"PlainMamba: patch_size must be even, not {patch_size}")
        self.side = patch_size // 2
        self.stem = nn.Sequential(*_conv(in_chans, 7, 2, dd))
        self.convs = nn.Sequential(*(layer for _ in range(num_convs) for layer in _conv(STEM_DIM, 3, 1, dd)))
        self.proj = nn.Conv2d(STEM_DIM, dim, self.side, stride=self.side, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) → (b, dim, h', w')."""
        x = self.convs(self.stem(x))
        return self.proj(F.pad(x, [0, -x.shape[3] % self.side, 0, -x.shape[2] % self.side]))


def _conv(in_chans: int, kernel: int, stride: int, dd: Dict[str, Any]) -> List[nn.Module]:
    conv = nn.Conv2d(in_chans, STEM_DIM, kernel, stride=stride, padding=kernel // 2, bias=False, **dd)
    return [conv, nn.BatchNorm2d(STEM_DIM, **dd), nn.ReLU()]


class PlainMambaBlock(TokenBlock):
    """A token block that may end with a depthwise convolution, which has no residual."""

    def __init__(self, dim: int, mixer: nn.Module, norm: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__(dim, mixer, norm, drop_path)
        self.dw: Optional[nn.Module] = None

    def forward(self, x: Tensor, grid: List[int]) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm(x), grid))
        if self.dw is not None:
            x = self.dw(x.transpose(1, 2).unflatten(2, [grid[0], grid[1]])).flatten(2).transpose(1, 2)
        return x


class PlainMamba(TokenModel):
    """PlainMamba. Images of any size go in: the position embedding is resampled where the grid differs.

    Args:
        patch_size: Side of a patch, even.
        in_chans: Input channels.
        embed_dim: Channels.
        depth: Blocks.
        stem_convs: 3 x 3 convolutions between the first one and the patches.
        dw_layers: Blocks that end with a depthwise convolution.
        d_state: State size of the scans.
        d_conv: Kernel of the depthwise convolution before the scans.
        expand: Inner channels of the scans / channels.
        dt_rank: Rank of the step sizes; None for ceil(channels / 16).
        bias: Give the projections around the scans a bias.
        conv_bias: Give the convolution before the scans a bias.
        global_pool: "avg" or "max" over patches, "" for all tokens.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: `img_size`, `num_classes`, `rms_norm` and rates of `TokenModel`.
    """

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        depth: int = 24,
        stem_convs: int = 1,
        dw_layers: Sequence[int] = (),
        d_state: int = 16,
        d_conv: int = 7,
        expand: int = 2,
        dt_rank: Optional[int] = None,
        bias: bool = True,
        conv_bias: bool = True,
        global_pool: str = "avg",
        rms_norm: bool = False,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            ConvPatchEmbed(patch_size, in_chans, embed_dim, stem_convs, **dd),
            partial(
                PlainMambaMixer, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=dt_rank, bias=bias,
                conv_bias=conv_bias,
            ),
            patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth, cls_position="none",
            global_pool=global_pool, rms_norm=rms_norm, block=PlainMambaBlock, **dd, **kwargs,
        )  # fmt: skip
        self.antialias = False
        self.norm_f = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        for i in dw_layers:
            conv = nn.Conv2d(embed_dim, embed_dim, 3, padding=1, groups=embed_dim, bias=False, **dd)
            self.layers[i].dw = nn.Sequential(conv, nn.BatchNorm2d(embed_dim, **dd), nn.GELU())
        self.init_weights(needs_reset=False)

    def _grid(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        h, w = (-(-side // self.patch_size) for side in img_size)
        return h, w


# Official key → ours.
_RENAMES = (
    (r"^backbone\.", ""),
    (r"^ln1\.", "norm_f."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"\.mamba(\.|$)", r".mixer\1"),
    (r"^head\.fc\.", "head."),
)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: Any) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged. The position embedding may need another grid."""
    return fit_pos_embed({rename(key, _RENAMES): value for key, value in state_dict.items()}, model)


# Official `arch`: the arguments it stands for.
_ARCHITECTURES: Dict[str, Dict[str, Any]] = {
    "L1": dict(embed_dim=192, depth=24, stem_convs=1, dw_layers=(0,)),
    "L2": dict(embed_dim=384, depth=24, stem_convs=2),
    "L3": dict(embed_dim=448, depth=36, stem_convs=2),
}
_ARGUMENTS = {
    "embed_dims": "embed_dim", "num_layers": "depth", "num_convs_patch_embed": "stem_convs", "patch_size": "patch_size",
    "layers_with_dwconv": "dw_layers", "img_size": "img_size", "num_classes": "num_classes", "in_channels": "in_chans",
}  # fmt: skip
_OF_MIXER = {
    "d_state": "d_state", "expand": "expand", "conv_size": "d_conv", "conv_bias": "conv_bias", "bias": "bias",
    "dt_rank": "dt_rank",
}  # fmt: skip


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `PlainMamba` backbone and its classifier."""
    refuse_unpublished("PlainMamba", kwargs, {"final_norm": (True,), "arch": (None, *_ARCHITECTURES)})
    layers = kwargs.get("layer_cfgs") or {}
    mixer = {"bias": False, **(layers.get("mamba_cfg") or {})}
    if mixer.get("dt_rank") == "auto":
        mixer["dt_rank"] = None
    args = {ours: kwargs[name] for name, ours in _ARGUMENTS.items() if kwargs.get(name) is not None}
    args |= {ours: mixer[name] for name, ours in _OF_MIXER.items() if name in mixer}
    if kwargs.get("arch"):
        args |= {"bias": True, **_ARCHITECTURES[kwargs["arch"]]}
    model = PlainMamba(rms_norm=layers.get("use_rms_norm", False), **args)

    def taps(name: str) -> List[Tap]:
        if name.endswith("patch_embed"):
            return [Tap("patch_embed", lambda inputs, output: output.flatten(2).transpose(1, 2))]
        return [Tap(rename(name, _RENAMES))]

    return OfficialModel(model, taps)


_SOURCE = "https://github.com/ChenhongyiYang/PlainMamba"
_CAVEATS = (
    "The repository does not state a licence for the weights; its code is Apache-2.0.",
    "The weights rely on two quirks of the official code, which are kept: step sizes get their bias twice, and step "
    "sizes, B and C do not follow the scan order of the tokens.",
)

# The published weights: architecture → (file, top-1, top-5, FLOPs).
_WEIGHTS = {
    "plainmamba_l1": ("l1.pth", 77.9, 94.0, "3.0G"),
    "plainmamba_l2": ("l2.pth", 81.6, 95.6, "8.1G"),
    "plainmamba_l3": ("l3.pth", 82.3, 95.9, "14.4G"),
}

PUBLISHED = {
    f"{name}.in1k": Published(
        source=_SOURCE, top1=top1, top5=top5, flops=flops, weights_license="none stated", caveats=_CAVEATS
    )
    for name, (_, top1, top5, flops) in _WEIGHTS.items()
}


def _cfg(**fields: Any) -> Any:
    common = {
        "first_conv": "patch_embed.stem.0", "classifier": "head", "license": "apache-2.0",
        "paper_name": "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition",
        "paper_ids": "arXiv:2403.17695", "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": _cfg(hf_hub_id="ChenhongyiYang/PlainMamba", hf_hub_filename=file)
        for name, (file, _, _, _) in _WEIGHTS.items()
    }
    | {"test_plainmamba.untrained": _cfg(input_size=(3, 160, 160))}
)


def _create_plainmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model(
        PlainMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **kwargs
    )


@register_model
def plainmamba_l1(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L1, 7.6M parameters."""
    return _create_plainmamba("plainmamba_l1", pretrained, **dict(_ARCHITECTURES["L1"], **kwargs))


@register_model
def plainmamba_l2(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L2, 26.1M parameters."""
    return _create_plainmamba("plainmamba_l2", pretrained, **dict(_ARCHITECTURES["L2"], **kwargs))


@register_model
def plainmamba_l3(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L3, 51.0M parameters."""
    return _create_plainmamba("plainmamba_l3", pretrained, **dict(_ARCHITECTURES["L3"], **kwargs))


@register_model
def test_plainmamba(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """A micro model for tests."""
    args = dict(img_size=160, embed_dim=48, depth=4, dw_layers=(0,))
    return _create_plainmamba("test_plainmamba", pretrained, **dict(args, **kwargs))
