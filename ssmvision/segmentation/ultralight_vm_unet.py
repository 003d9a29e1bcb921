"""UltraLight VM-UNet: a U-Net for pictures of 50 thousand parameters, whose channel groups share one Mamba.

Paper: `UltraLight VM-UNet: Parallel Vision Mamba Significantly Reduces Parameters for Skin Lesion Segmentation` -
    https://arxiv.org/abs/2403.20035
Official code (MIT): https://github.com/wurenkai/UltraLight-VM-UNet
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.models._official import OfficialModel, rename
from ssmvision.segmentation._mixers import MakeMixer, mamba_or_twin
from ssmvision.segmentation._shapes import check_spatial_dims
from ssmvision.segmentation._six_stages import STAGE_RENAMES, SixStages, check_dims, stage_taps

__all__ = ["UltraLightVMUNet"]

_CHUNKS = 4


class PVMLayer(nn.Module):
    """Norm, one mixer for each of four groups of channels with a scaled shortcut, the same norm again, projection.

    The mixer is the same for all groups: (b, in_channels, h, w) → (b, out_channels, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, make: MakeMixer) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.mamba = make(in_channels // _CHUNKS)
        self.proj = nn.Linear(in_channels, out_channels)
        self.skip_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) → (b, out_channels, h, w)."""
        B, _, H, W = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        chunks = torch.cat(tokens.chunk(_CHUNKS, dim=-1))  # groups of channels as samples: one call for all
        mixed = torch.cat((self.mamba(chunks) + self.skip_scale * chunks).chunk(_CHUNKS), dim=-1)
        return self.proj(self.norm(mixed)).transpose(1, 2).reshape(B, -1, H, W)


class UltraLightVMUNet(SixStages):
    """UltraLight VM-UNet: (b, in_channels, h, w) → logits (b, out_channels, h, w), for sides that are multiples of 32.

    Args:
        spatial_dims: 2.
        in_channels: Input channels.
        out_channels: Classes.
        dims: Channels of the six stages, multiples of 4.
        split_att: How the bridge weighs channels, by a "fc" or "conv" layer per level.
        bridge: Weigh the skips by attention.
        d_state: Size of the state of the scans.
        mixer: "mamba", or "none" for gated convolutions instead.
        sigmoid: Give probabilities, as the official network does for any number of classes.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        dims: Sequence[int] = (8, 16, 24, 32, 48, 64),
        split_att: str = "fc",
        bridge: bool = True,
        d_state: int = 16,
        mixer: str = "mamba",
        sigmoid: bool = False,
    ) -> None:
        check_spatial_dims("UltraLight VM-UNet", spatial_dims, 2)
        check_dims("UltraLight VM-UNet", dims)
        make = mamba_or_twin("UltraLight VM-UNet", mixer, d_state)

        def stage(before: int, after: int, depth: int) -> nn.Module:
            return PVMLayer(before, after, make) if depth > 2 else nn.Conv2d(before, after, 3, padding=1)

        down = [stage(*widths, depth) for depth, widths in enumerate(zip([in_channels, *dims], dims, strict=False))]
        up = [stage(dims[depth], dims[depth - 1], depth) for depth in range(5, 0, -1)]
        super().__init__("UltraLight VM-UNet", in_channels, out_channels, dims, down, up, split_att, bridge, sigmoid)


# Official key → ours; every stage is in a container of one.
_RENAMES = (*STAGE_RENAMES, (r"^((?:en|de)coders\.\d)\.0\.", r"\1."))


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged."""
    return {rename(key, _RENAMES): value for key, value in state_dict.items()}


def from_official(official_class: str, kwargs: Mapping[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `UltraLight_VM_UNet`."""
    model = UltraLightVMUNet(
        in_channels=kwargs.get("input_channels", 3),
        out_channels=kwargs.get("num_classes", 1),
        dims=kwargs.get("c_list", (8, 16, 24, 32, 48, 64)),
        split_att=kwargs.get("split_att", "fc"),
        bridge=kwargs.get("bridge", True),
        sigmoid=True,
    )
    return OfficialModel(model, stage_taps)


def _cfg(**fields: Any) -> NetworkCfg:
    common = {
        "paper_name": "UltraLight VM-UNet: Parallel Vision Mamba Significantly Reduces Parameters for Skin Lesion "
        "Segmentation",
        "paper_ids": "arXiv:2403.20035", "origin_url": "https://github.com/wurenkai/UltraLight-VM-UNet",
        "license": "MIT", "input_size": (3, 256, 256),
        "results_source": "https://github.com/wurenkai/UltraLight-VM-UNet",
        "caveats": (
            "DSC is global over all pixels of the test set, not a mean over images.",
            "Users who train it themselves report about 87 % instead of the published 90.9 % on ISIC2017.",
        ),
    }  # fmt: skip
    return NetworkCfg(**(common | fields))


@register_network(
    _cfg(
        results=(("ISIC2017 DSC", "0.9091"),),
        by_hand="the link in issue 38 of https://github.com/wurenkai/UltraLight-VM-UNet",
    ),
    twin=True,
)
def ultralight_vm_unet(**kwargs: Any) -> UltraLightVMUNet:
    """UltraLight VM-UNet, 49 thousand parameters."""
    return UltraLightVMUNet(**kwargs)


@register_network(_cfg(input_size=(3, 64, 64)), twin=True)
def test_ultralight_vm_unet(**kwargs: Any) -> UltraLightVMUNet:
    """A micro network for tests."""
    args: dict[str, Any] = {"dims": (4, 8, 8, 16, 16, 16), "d_state": 4}
    return UltraLightVMUNet(**(args | kwargs))
