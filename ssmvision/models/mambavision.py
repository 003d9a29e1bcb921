"""MambaVision: a convolutional pyramid whose last two stages mix Mamba and attention in windows.

Paper: `MambaVision: A Hybrid Mamba-Transformer Vision Backbone` - https://arxiv.org/abs/2407.08083
Official code (NVIDIA Source Code License-NC) and weights (CC-BY-NC-SA-4.0): https://github.com/NVlabs/MambaVision
"""

import re
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    DropPath,
    LayerScale,
    LayerScale2d,
    Mlp,
    calculate_drop_path_rates,
    register_notrace_function,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from ssmvision.layers import MambaVisionMixer
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._official import OfficialModel, Tap, refuse_unpublished, rename
from ssmvision.models._pyramid import Pyramid, Stage

__all__ = ["MambaVision"]


class ConvStem(nn.Sequential):
    """Two 3 x 3 convolutions of stride 2, (b, in_chans, h, w) → (b, dim, h/4, w/4)."""

    def __init__(self, in_chans: int, hidden: int, dim: int, device: Any = None, dtype: Any = None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, hidden, 3, stride=2, padding=1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(hidden, eps=1e-4, **dd)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(dim, eps=1e-4, **dd)
        self.act2 = nn.ReLU()


class ConvBlock(nn.Module):
    """Two 3 x 3 convolutions, residual: (b, dim, h, w) → the same."""

    def __init__(
        self,
        dim: int,
        layer_scale: Optional[float] = None,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU(approximate="tanh")
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, **dd)
        self.ls = nn.Identity() if layer_scale is None else LayerScale2d(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        return x + self.drop_path(self.ls(self.norm2(self.conv2(y))))


class Block(nn.Module):
    """A mixer of tokens and an MLP, both pre-norm and residual: (b, l, dim) → the same."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        layer_scale: Optional[float] = None,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.mixer = mixer
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


@register_notrace_function
def to_windows(x: Tensor, size: int) -> Tensor:
    """Cut a map (b, c, h, w), padded with zeros at the bottom and right, into tokens (b * windows, size * size, c)."""
    B, C, H, W = x.shape
    # Nothing but multiples of rows and columns, so that export with symbolic sizes has nothing to prove.
    rows, columns = (H + size - 1) // size, (W + size - 1) // size
    x = F.pad(x, (0, columns * size - W, 0, rows * size - H))
    x = x.view(B, C, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(B * rows * columns, size * size, C)


@register_notrace_function
def from_windows(tokens: Tensor, size: int, like: Tensor) -> Tensor:
    """Put tokens (b * windows, size * size, c) back into the map (b, c, h, w) that they were cut from."""
    B, C, H, W = like.shape
    rows, columns = (H + size - 1) // size, (W + size - 1) // size
    x = tokens.view(B, rows, columns, size, size, C).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(B, rows * size, columns * size, C)
    # Cropped into a map of its own: whether a slice is contiguous would depend on the size, and so would the export.
    return F.pad(x, (0, 0, 0, W - columns * size, 0, H - rows * size)).permute(0, 3, 1, 2)


class WindowStage(Stage):
    """Downsampling, then blocks that see the tokens of one window each: (b, c, h, w) → (b, dim, h', w').

    As in the official code, tokens that pad the last windows are mixed like any other.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], window_size: int) -> None:
        super().__init__(downsample, blocks, channels_last=False)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        tokens = to_windows(x, self.window_size)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            tokens = self.blocks(tokens)
        return from_windows(tokens, self.window_size, like=x)


class MambaVision(Pyramid):
    """MambaVision; the defaults are those of the tiny model. Images of any size go in.

    The last stages, one for each entry of `window_sizes`, work in windows; those before are convolutional. In a
    window stage the first half of the blocks, rounded up, are Mamba mixers and the others attention. The windows of
    the published models span the whole map at the size they were trained at; larger images are seen window by window.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling of the head.
        dim: Channels of the first stage, doubled from stage to stage.
        stem_dim: Channels inside the stem.
        depths: Blocks of each stage.
        window_sizes: Side of the windows of the last stages.
        num_heads: Attention heads of the last stages.
        d_state: State size of the scans.
        mlp_ratio: Hidden channels of the MLPs / channels.
        qkv_bias: Bias in the projections to queries, keys and values.
        layer_scale: Initial scale of the residual branches in window stages; None for no scales.
        layer_scale_conv: The same in convolutional stages.
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
        dim: int = 80,
        stem_dim: int = 32,
        depths: Sequence[int] = (1, 3, 8, 4),
        window_sizes: Sequence[int] = (14, 7),
        num_heads: Sequence[int] = (8, 16),
        d_state: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: Optional[float] = None,
        layer_scale_conv: Optional[float] = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if not len(num_heads) == len(window_sizes) <= len(depths):
            raise ValueError(
                f"MambaVision: give every window stage one of window_sizes and num_heads, not {len(window_sizes)} and "
                f"{len(num_heads)} to {len(depths)} stages"
            )
        dd = {"device": device, "dtype": dtype}
        dims = [dim * 2**i for i in range(len(depths))]
        conv_stages = len(depths) - len(window_sizes)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        def downsample(i: int) -> nn.Module:
            return nn.Conv2d(dims[i - 1], dims[i], 3, stride=2, padding=1, bias=False, **dd) if i else nn.Identity()

        def mixer(i: int, block: int) -> nn.Module:
            if block < (depths[i] + 1) // 2:
                return MambaVisionMixer(dims[i], d_state, **dd)
            return Attention(dims[i], num_heads[i - conv_stages], qkv_bias=qkv_bias, **dd)

        stages: List[nn.Module] = [
            Stage(downsample(i), [ConvBlock(dims[i], layer_scale_conv, rate, **dd) for rate in rates[i]], False)
            for i in range(conv_stages)
        ]
        stages += [
            WindowStage(
                downsample(i),
                [Block(dims[i], mixer(i, j), mlp_ratio, layer_scale, rate, **dd) for j, rate in enumerate(rates[i])],
                window_size,
            )
            for i, window_size in enumerate(window_sizes, start=conv_stages)
        ]
        super().__init__(
            patch_embed=ConvStem(in_chans, stem_dim, dim, **dd),
            stages=stages,
            dims=dims,
            norm=nn.BatchNorm2d(dims[-1], **dd),
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize; with `needs_reset` also what layers initialize themselves (after `to_empty`)."""
        super().init_weights(needs_reset)
        for module in self.modules():
            if isinstance(module, MambaVisionMixer):
                module.reset_parameters()  # its step-size projection is not a linear layer like the others


# Official key → ours. Stages begin with their downsampling here and end with it there.
_RENAMES = (
    (r"^(model|encoder|backbone)\.", ""),  # of transformers, of pretraining, of detectors
    (r"^patch_embed\.conv_down\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.conv_down\.1\.", "patch_embed.norm1."),
    (r"^patch_embed\.conv_down\.3\.", "patch_embed.conv2."),
    (r"^patch_embed\.conv_down\.4\.", "patch_embed.norm2."),
    (r"^levels\.(\d+)\.downsample\.reduction\.0\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^levels\.", "stages."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"\.(\d+)\.gamma$", r".\1.ls.gamma"),
    (r"^head\.", "head.fc."),
)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Official keys, also those of the Hub's transformers files → ours; ours pass unchanged."""
    if any(key.startswith("stages.") for key in state_dict):
        return state_dict
    return {rename(key, _RENAMES): value for key, value in state_dict.items()}


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `MambaVision`."""
    refuse_unpublished("MambaVision", kwargs, {"qk_scale": (None,)})
    model = MambaVision(
        in_chans=kwargs.get("in_chans", 3),
        num_classes=kwargs.get("num_classes", 1000),
        dim=kwargs["dim"],
        stem_dim=kwargs["in_dim"],
        depths=kwargs["depths"],
        window_sizes=kwargs["window_size"][2:],  # the first two stages have none, whatever is said
        num_heads=kwargs["num_heads"][2:],
        mlp_ratio=kwargs["mlp_ratio"],
        qkv_bias=kwargs.get("qkv_bias", True),
        layer_scale=kwargs.get("layer_scale"),
        layer_scale_conv=kwargs.get("layer_scale_conv"),
    )
    last = len(kwargs["depths"]) - 1

    def taps(name: str) -> List[Tap]:
        stage = re.fullmatch(r"levels\.(\d+)", name)
        if stage and int(stage[1]) < last:  # an official stage ends with the downsampling that begins ours
            name += ".downsample.reduction.0"
        return [Tap(rename(f"{name}.", _RENAMES).removesuffix("."))]

    return OfficialModel(model, taps)


_SOURCE = "https://github.com/NVlabs/MambaVision"
_CAVEATS = (
    "The licences of code and weights forbid commercial use.",
    "The official code adds the bias of the step-size projection twice; the weights rely on it, so it is done here.",
    "At the size of its training images a window spans the whole map; larger images are seen window by window.",
)

# The published weights: name → (official name, Hub repository, file, top-1, top-5, FLOPs).
_WEIGHTS = {
    "mambavision_tiny.in1k":
        ("T", "MambaVision-T-1K", "mambavision_tiny_1k.pth.tar", 82.3, 96.2, "4.4G"),
    "mambavision_tiny2.in1k":
        ("T2", "MambaVision-T2-1K", "mambavision_tiny2_1k.pth.tar", 82.7, 96.3, "5.1G"),
    "mambavision_small.in1k":
        ("S", "MambaVision-S-1K", "mambavision_small_1k.pth.tar", 83.3, 96.5, "7.5G"),
    "mambavision_base.in1k":
        ("B", "MambaVision-B-1K", "mambavision_base_1k.pth.tar", 84.2, 96.9, "15.0G"),
    "mambavision_base.in21k_ft_in1k":
        ("B_21k", "MambaVision-B-21K", "mambavision_base_21k.pth.tar", 84.9, 97.5, "15.0G"),
    "mambavision_large.in1k":
        ("L", "MambaVision-L-1K", "mambavision_large_1k.pth.tar", 85.0, 97.1, "34.9G"),
    "mambavision_large.in21k_ft_in1k":
        ("L_21k", "MambaVision-L-21K", "mambavision_large_21k.pth.tar", 86.1, 97.9, "34.9G"),
    "mambavision_large2.in1k":
        ("L2", "MambaVision-L2-1K", "mambavision_large2_1k.pth.tar", 85.3, 97.2, "37.5G"),
    "mambavision_large2_512.in21k_ft_in1k":
        ("L2_512_21k", "MambaVision-L2-512-21K", "mambavision_L2_21k_240m_512.pth.tar", 87.3, 98.4, "196.3G"),
    "mambavision_large3_256.in21k_ft_in1k":
        ("L3_256_21k", "MambaVision-L3-256-21K", "mambavision_L3_21k_740m_256.pth.tar", 87.3, 98.3, "122.3G"),
    "mambavision_large3_512.in21k_ft_in1k":
        ("L3_512_21k", "MambaVision-L3-512-21K", "mambavision_L3_21k_740m_512.pth.tar", 88.1, 98.6, "489.1G"),
}  # fmt: skip

# What the preprocessing of some weights has in place of 224 pixels and the whole image.
_AT_256 = {"input_size": (3, 256, 256), "pool_size": (8, 8)}
_AT_512 = {"input_size": (3, 512, 512), "pool_size": (16, 16), "crop_pct": 0.93, "crop_mode": "squash"}
_PREPROCESSING: Dict[str, Dict[str, Any]] = {
    "mambavision_tiny2.in1k": {"crop_pct": 0.98},
    "mambavision_small.in1k": {"crop_pct": 0.93},
    "mambavision_large2_512.in21k_ft_in1k": _AT_512,
    "mambavision_large3_256.in21k_ft_in1k": _AT_256,
    "mambavision_large3_512.in21k_ft_in1k": _AT_512,
}


def _cfg(**fields: Any) -> Any:
    common = {
        "pool_size": (7, 7), "crop_pct": 1.0, "first_conv": "patch_embed.conv1", "classifier": "head.fc",
        "license": "nvidia-source-code-license-nc", "paper_ids": "arXiv:2407.08083", "origin_url": _SOURCE,
        "paper_name": "MambaVision: A Hybrid Mamba-Transformer Vision Backbone",
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {
        name: _cfg(hf_hub_id=f"nvidia/{repository}", hf_hub_filename=file, **_PREPROCESSING.get(name, {}))
        for name, (_, repository, file, _, _, _) in _WEIGHTS.items()
    }
    | {"test_mambavision.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5))}
)

PUBLISHED = {
    name: Published(
        source=_SOURCE, top1=top1, top5=top5, flops=flops, weights_license="cc-by-nc-sa-4.0", caveats=_CAVEATS,
        resolution=_PREPROCESSING.get(name, {}).get("input_size", (3, 224, 224))[-1],
    )
    for name, (_, _, _, top1, top5, flops) in _WEIGHTS.items()
}  # fmt: skip


def _create_mambavision(variant: str, pretrained: bool = False, **kwargs: Any) -> MambaVision:
    return build_model(
        MambaVision, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "list", "flatten_sequential": True}, **kwargs,
    )  # fmt: skip


@register_model
def mambavision_tiny(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T, 31.8M parameters."""
    args = dict(dim=80, stem_dim=32, depths=(1, 3, 8, 4), num_heads=(8, 16))
    return _create_mambavision("mambavision_tiny", pretrained, **dict(args, **kwargs))


@register_model
def mambavision_tiny2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T2, 35.1M parameters."""
    args = dict(dim=80, stem_dim=32, depths=(1, 3, 11, 4), num_heads=(8, 16))
    return _create_mambavision("mambavision_tiny2", pretrained, **dict(args, **kwargs))


@register_model
def mambavision_small(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-S, 50.1M parameters."""
    args = dict(dim=96, stem_dim=64, depths=(3, 3, 7, 5), num_heads=(8, 16))
    return _create_mambavision("mambavision_small", pretrained, **dict(args, **kwargs))


@register_model
def mambavision_base(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-B, 97.7M parameters."""
    args = dict(dim=128, stem_dim=64, depths=(3, 3, 10, 5), num_heads=(8, 16), layer_scale=1e-5)
    return _create_mambavision("mambavision_base", pretrained, **dict(args, **kwargs))


@register_model
def mambavision_large(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L, 228.0M parameters."""
    args = dict(dim=196, stem_dim=64, depths=(3, 3, 10, 5), num_heads=(16, 32), layer_scale=1e-5)
    return _create_mambavision("mambavision_large", pretrained, **dict(args, **kwargs))


_LARGE2 = {"dim": 196, "stem_dim": 64, "depths": (3, 3, 12, 5), "num_heads": (16, 32), "layer_scale": 1e-5}
_LARGE3 = {"dim": 256, "stem_dim": 64, "depths": (3, 3, 20, 10), "num_heads": (16, 32), "layer_scale": 1e-5}


@register_model
def mambavision_large2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2, 241.6M parameters."""
    return _create_mambavision("mambavision_large2", pretrained, **dict(_LARGE2, **kwargs))


@register_model
def mambavision_large2_512(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2 with windows for images of 512 pixels, 241.6M parameters."""
    args = dict(_LARGE2, window_sizes=(32, 16))
    return _create_mambavision("mambavision_large2_512", pretrained, **dict(args, **kwargs))


@register_model
def mambavision_large3_256(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 with windows for images of 256 pixels, 739.6M parameters."""
    args = dict(_LARGE3, window_sizes=(16, 8))
    return _create_mambavision("mambavision_large3_256", pretrained, **dict(args, **kwargs))


@register_model
def mambavision_large3_512(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3 with windows for images of 512 pixels, 739.6M parameters."""
    args = dict(_LARGE3, window_sizes=(32, 16))
    return _create_mambavision("mambavision_large3_512", pretrained, **dict(args, **kwargs))


@register_model
def test_mambavision(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """A micro model for tests."""
    args = dict(dim=16, stem_dim=8, depths=(1, 1, 3, 2), window_sizes=(7, 5), num_heads=(2, 4), layer_scale=1e-5)
    return _create_mambavision("test_mambavision", pretrained, **dict(args, **kwargs))


# timm has no aliases but names of the past: hidden from lists, mapped to the name of today with a warning.
register_model_deprecations(__name__, {f"mamba_vision_{official[0]}": name for name, official in _WEIGHTS.items()})
