"""MedMamba: half of the channels through convolutions, half through a 2-D selective scan, for medical images.

Paper: `MedMamba: Vision Mamba for Medical Image Classification` - https://arxiv.org/abs/2403.03849
Official code and weights (no licence stated): https://github.com/YubiaoYue/MedMamba
"""

from functools import partial
from typing import Any, Dict, Sequence, Union

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ssmvision.layers import SS2D
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._official import OfficialModel, Tap, as_is, nhwc, pyramid_taps
from ssmvision.models._vss_pyramid import VSSPyramid, convert_keys, stage_dims

__all__ = ["MedMamba"]


class SSConvSSM(nn.Module):
    """The first half of the channels convolved, the second scanned, then shuffled: (b, h, w, dim) → the same."""

    def __init__(
        self, dim: int, d_state: int = 16, drop_path: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"MedMamba: dims must be even, not {dim}")
        dd = {"device": device, "dtype": dtype}
        half = dim // 2
        self.conv = nn.Sequential(
            nn.BatchNorm2d(half, **dd),
            nn.Conv2d(half, half, 3, padding=1, **dd),
            nn.BatchNorm2d(half, **dd),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, **dd),
            nn.BatchNorm2d(half, **dd),
            nn.ReLU(),
            nn.Conv2d(half, half, 1, **dd),
            nn.ReLU(),
        )
        self.norm = nn.LayerNorm(half, eps=1e-5, **dd)
        self.op = SS2D(half, d_state=d_state, conv_bias=True, gate=True, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        convolved, scanned = x.chunk(2, dim=3)
        convolved = self.conv(convolved.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        scanned = self.drop_path(self.op(self.norm(scanned)))
        return x + torch.stack([convolved, scanned], dim=-1).flatten(3)


class MedMamba(VSSPyramid):
    """MedMamba.

    Args:
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling of the head.
        dims: Channels of each stage, or of the first (doubled from stage to stage); even.
        depths: Blocks of each stage.
        d_state: State size of the scans.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Largest stochastic depth rate of the scans, reached in the last block.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Union[int, Sequence[int]] = 96,
        depths: Sequence[int] = (2, 2, 4, 2),
        d_state: int = 16,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dims = stage_dims("MedMamba", dims, depths)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        block: Any = partial(SSConvSSM, d_state=d_state, **dd)
        super().__init__(
            blocks=[[block(dim, drop_path=rate) for rate in stage] for dim, stage in zip(dims, rates, strict=True)],
            dims=dims,
            in_chans=in_chans,
            channels_last=[True] * len(dims),
            pad=False,
            norm=False,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


# Official key → ours, beyond the frame.
_RENAMES = {
    r"^patch_embed\.proj\.": "patch_embed.conv1.",
    r"^patch_embed\.norm\.": "patch_embed.norm1.",
    r"\.conv33conv33conv11(\.|$)": r".conv\1",
    r"\.self_attention(\.|$)": r".op\1",
    r"\.ln_1\.": ".norm.",
    r"^head\.(?!fc)": "head.fc.",
}


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged."""
    return convert_keys(state_dict, _RENAMES)


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `VSSM`; its `dims_decoder` and `depths_decoder` have no effect."""
    if kwargs.get("patch_size", 4) != 4 or not kwargs.get("patch_norm", True):
        raise ValueError("MedMamba with other patches than normalised ones of 4 x 4 pixels is not built here")
    depths = kwargs.get("depths", (2, 2, 4, 2))
    model = MedMamba(
        in_chans=kwargs.get("in_chans", 3),
        num_classes=kwargs.get("num_classes", 1000),
        dims=kwargs.get("dims", (96, 192, 384, 768)),
        depths=depths,
        d_state=kwargs.get("d_state", 16),
    )
    frame = pyramid_taps("MedMamba", len(depths), nhwc, as_is)

    def taps(name: str) -> list[Tap]:
        block, _, part = name.partition(".conv33conv33conv11")
        block, of_scan, _ = block.partition(".self_attention")
        (tap,) = frame(block)
        if of_scan:
            return [Tap(f"{tap.module}.op")]
        return [Tap(f"{tap.module}.conv{part}")] if name.count("conv33") else [tap]

    return OfficialModel(model, taps, without_effect=("depths_decoder", "dims_decoder"))


_SOURCE = "https://github.com/YubiaoYue/MedMamba"
_CAVEATS = (
    "The repository states no licence, neither for the code nor for the weights.",
    "There is one weight file for each of 16 data sets, on Baidu alone (password 2024); build the model with its number"
    " of classes. The authors report accuracies without naming the size of the model: PathMNIST 95.3, DermaMNIST 77.9, "
    "OCTMNIST 91.8, PneumoniaMNIST 89.9, RetinaMNIST 54.3, BreastMNIST 85.3, BloodMNIST 97.8, OrganAMNIST 94.6, "
    "OrganCMNIST 92.7, OrganSMNIST 81.9, Kvasir 78.8, CPN X-ray 97.1, Fetal-Planes 94.0, PAD-UFES-20 58.8.",
    "The paper's parameter counts are smaller than those measured here on the same architecture.",
)

PUBLISHED = {
    f"medmamba_{size}.medical": Published(
        source=_SOURCE, dataset="16 medical data sets", by_hand=_SOURCE, caveats=_CAVEATS
    )
    for size in ("tiny", "small", "base")
}


def _cfg(**fields: Any) -> Any:
    common = {
        "pool_size": (7, 7), "first_conv": "patch_embed.conv1", "classifier": "head.fc", "license": "none stated",
        "num_classes": 6, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bilinear",
        "crop_pct": 1.0, "crop_mode": "squash", "paper_ids": "arXiv:2403.03849", "origin_url": _SOURCE,
        "paper_name": "MedMamba: Vision Mamba for Medical Image Classification",
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {name: _cfg() for name in PUBLISHED} | {"test_medmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5))}
)


def _create_medmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> MedMamba:
    return build_model(
        MedMamba, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True}, **kwargs,
    )  # fmt: skip


@register_model
def medmamba_tiny(pretrained: bool = False, **kwargs: Any) -> MedMamba:
    """MedMamba-T, 14.5M parameters."""
    args = dict(dims=96, depths=(2, 2, 4, 2))
    return _create_medmamba("medmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def medmamba_small(pretrained: bool = False, **kwargs: Any) -> MedMamba:
    """MedMamba-S, 18.6M parameters."""
    args = dict(dims=96, depths=(2, 2, 8, 2))
    return _create_medmamba("medmamba_small", pretrained, **dict(args, **kwargs))


@register_model
def medmamba_base(pretrained: bool = False, **kwargs: Any) -> MedMamba:
    """MedMamba-B, 39.9M parameters."""
    args = dict(dims=128, depths=(2, 2, 12, 2))
    return _create_medmamba("medmamba_base", pretrained, **dict(args, **kwargs))


@register_model
def test_medmamba(pretrained: bool = False, **kwargs: Any) -> MedMamba:
    """A micro model for tests."""
    args = dict(dims=16, depths=(1, 1, 2, 1), d_state=4)
    return _create_medmamba("test_medmamba", pretrained, **dict(args, **kwargs))
