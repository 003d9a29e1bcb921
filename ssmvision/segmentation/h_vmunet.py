"""H-vmunet: a U-Net for pictures whose blocks gate recursively, with an SS2D at every order.

Paper: `H-vmunet: High-order Vision Mamba UNet for Medical Image Segmentation` - https://arxiv.org/abs/2403.13642
Official code (no licence stated): https://github.com/wurenkai/H-vmunet
The recursion is that of HorNet (arXiv:2207.14284, equation 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp
from torch import Tensor, nn

from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.models._official import OfficialModel, rename
from ssmvision.segmentation._blocks import drop_path_rates
from ssmvision.segmentation._mixers import MakeMixer, ss2d_or_twin
from ssmvision.segmentation._shapes import check_spatial_dims
from ssmvision.segmentation._six_stages import STAGE_RENAMES, SixStages, check_dims, stage_taps

__all__ = ["HVMUNet"]

_SCALE = 1 / 3
_LAYER_SCALE = 1e-6


class OverMap(nn.Module):
    """A mixer of (b, h, w, dim) over (b, dim, h, w)."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.op = mixer

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, h, w) → the same."""
        return self.op(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LocalSS2D(nn.Module):
    """Half of the channels convolved and half scanned, interleaved, between two norms: (b, dim, h, w) → the same.

    Args:
        dim: Channels, an even number.
        make: Builds the scan of half of them.
        spectrum: Height and width of a filter that official checkpoints hold and nothing reads.
    """

    def __init__(self, dim: int, make: MakeMixer, spectrum: tuple[int, int]) -> None:
        super().__init__()
        half = dim // 2
        self.pre_norm = LayerNorm2d(dim, eps=1e-6)
        self.dw = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.ss2d = OverMap(make(half))
        self.post_norm = LayerNorm2d(dim, eps=1e-6)
        self.complex_weight = nn.Parameter(torch.randn(half, *spectrum, 2) * 0.02, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, h, w) → the same."""
        convolved, scanned = self.pre_norm(x).chunk(2, dim=1)
        both = torch.stack([self.dw(convolved), self.ss2d(scanned)], dim=2)
        return self.post_norm(both.flatten(1, 2))


class HighOrderSS2D(nn.Module):
    """Recursive gating with a scan at every order, over ever more channels: (b, dim, h, w) → the same.

    Args:
        dim: Channels, a multiple of 2^(order - 1).
        order: Of the recursion.
        make: Builds the scans.
        spectrum: See `LocalSS2D`.
    """

    def __init__(self, dim: int, order: int, make: MakeMixer, spectrum: tuple[int, int]) -> None:
        super().__init__()
        self.dims = [dim // 2**i for i in reversed(range(order))]
        if sum(self.dims) % 2:
            raise ValueError(f"H-vmunet: of {dim} channels, order {order} gates {self.dims}, whose sum must be even")
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        self.gates = LocalSS2D(sum(self.dims), make, spectrum)
        self.ss2d = nn.ModuleList(OverMap(make(width)) for width in self.dims)
        self.pws = nn.ModuleList(nn.Conv2d(width, 2 * width, 1) for width in self.dims[:-1])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, h, w) → the same."""
        x, gates = self.proj_in(x).split([self.dims[0], sum(self.dims)], dim=1)
        gates = (self.gates(gates) * _SCALE).split(self.dims, dim=1)
        x = self.ss2d[0](x * gates[0])
        for widen, gate, ss2d in zip(self.pws, gates[1:], self.ss2d[1:], strict=True):
            x = ss2d(widen(x) * gate)
        return self.proj_out(x)


class Block(nn.Module):
    """High-order SS2D and MLP, both pre-norm, residual and scaled by channel: (b, dim, h, w) → the same."""

    def __init__(self, dim: int, order: int, make: MakeMixer, spectrum: tuple[int, int], drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, eps=1e-6)
        self.mix = HighOrderSS2D(dim, order, make, spectrum)
        self.gamma1 = nn.Parameter(torch.full((dim,), _LAYER_SCALE))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma2 = nn.Parameter(torch.full((dim,), _LAYER_SCALE))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, h, w) → the same."""
        x = x + self.drop_path(self.gamma1.view(-1, 1, 1) * self.mix(self.norm1(x)))
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


# Height and width of the unused filters at orders 2 to 5, as every official checkpoint has them.
_SPECTRA = ((14, 8), (14, 8), (24, 13), (12, 7))
_FIRST = 2  # stages before it only convolve


class HVMUNet(SixStages):
    """H-vmunet: (b, in_channels, h, w) → logits (b, out_channels, h, w), for sides that are multiples of 32.

    The last four stages down and their mirrors up recurse at orders 2, 3, 4 and 5. Every block holds a filter that
    nothing reads (`complex_weight`), because official checkpoints do; it takes no gradients.

    Args:
        spatial_dims: 2.
        in_channels: Input channels.
        out_channels: Classes.
        dims: Channels of the six stages, multiples of 4; those of stage i > 1 also of 2^(i - 1).
        depths: Blocks of each of the last four stages, down and up.
        split_att: How the bridge weighs channels, by a "fc" or "conv" layer per level.
        bridge: Weigh the skips by attention.
        d_state: Size of the state of the scans.
        drop_path_rate: Largest stochastic depth rate.
        mixer: "ss2d", or "none" for gated convolutions instead of the scans.
        sigmoid: Give probabilities, as the official network does for any number of classes.
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        dims: Sequence[int] = (8, 16, 32, 64, 128, 256),
        depths: Sequence[int] = (2, 2, 2, 2),
        split_att: str = "fc",
        bridge: bool = True,
        d_state: int = 16,
        drop_path_rate: float = 0.0,
        mixer: str = "ss2d",
        sigmoid: bool = False,
    ) -> None:
        check_spatial_dims("H-vmunet", spatial_dims, 2)
        check_dims("H-vmunet", dims)
        make = ss2d_or_twin("H-vmunet", mixer, d_state)
        rates = drop_path_rates(drop_path_rate, depths)

        def stage(before: int, after: int, depth: int) -> nn.Module:
            level = depth - _FIRST
            blocks = [
                Block(before, level + 2, make, _SPECTRA[level], rate) for rate in (rates[level] if level >= 0 else ())
            ]
            return nn.Sequential(*blocks, nn.Conv2d(before, after, 3, padding=1))

        down = [stage(*widths, depth) for depth, widths in enumerate(zip([in_channels, *dims], dims, strict=False))]
        up = [stage(dims[depth], dims[depth - 1], depth) for depth in range(5, 0, -1)]
        super().__init__("H-vmunet", in_channels, out_channels, dims, down, up, split_att, bridge, sigmoid)


# Official key → ours.
_RENAMES = (
    *STAGE_RENAMES,
    (r"\.H_SS2D\.", ".mix."),
    (r"\.mix\.dwconv\.", ".mix.gates."),
    (r"\.gates\.SS2D\.", ".gates.ss2d.op."),
    (r"\.mix\.ss2d_in\.", ".mix.ss2d.0.op."),
    (r"\.mix\.ss2d_(\d)\.", r".mix.ss2d.\1.op."),
    (r"\.pwconv(\d)\.", r".mlp.fc\1."),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged."""
    return {rename(key, _RENAMES): value for key, value in state_dict.items()}


def from_official(official_class: str, kwargs: Mapping[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `H_vmunet`."""
    model = HVMUNet(
        in_channels=kwargs.get("input_channels", 3),
        out_channels=kwargs.get("num_classes", 1),
        dims=kwargs.get("c_list", (8, 16, 32, 64, 128, 256)),
        depths=kwargs.get("depths", (2, 2, 2, 2)),
        split_att=kwargs.get("split_att", "fc"),
        bridge=kwargs.get("bridge", True),
        drop_path_rate=kwargs.get("drop_path_rate", 0.0),
        sigmoid=True,
    )
    return OfficialModel(model, stage_taps)


def _cfg(**fields: Any) -> NetworkCfg:
    common = {
        "paper_name": "H-vmunet: High-order Vision Mamba UNet for Medical Image Segmentation",
        "paper_ids": "arXiv:2403.13642", "origin_url": "https://github.com/wurenkai/H-vmunet",
        "license": "none stated", "input_size": (3, 256, 256), "results_source": "https://arxiv.org/abs/2403.13642",
        "caveats": (
            "DSC is global over all pixels of the test set, not a mean over images.",
            "The official code and weights come without a licence; this code was written from the paper.",
            "Every block of a checkpoint holds a filter that nothing reads; it counts as parameters.",
        ),
    }  # fmt: skip
    return NetworkCfg(**(common | fields))


@register_network(
    _cfg(
        results=(("ISIC2017 DSC", "0.9172*"), ("Spleen DSC", "0.9496*"), ("CVC-ClinicDB DSC", "0.9133*")),
        by_hand="the Google Drive links in https://github.com/wurenkai/H-vmunet",
    ),
    twin=True,
)
def h_vmunet(**kwargs: Any) -> HVMUNet:
    """H-vmunet, 9.0M parameters."""
    return HVMUNet(**kwargs)


@register_network(_cfg(input_size=(3, 64, 64)), twin=True)
def test_h_vmunet(**kwargs: Any) -> HVMUNet:
    """A micro network for tests."""
    args: dict[str, Any] = {"dims": (4, 4, 8, 16, 32, 32), "depths": (1, 1, 1, 1), "d_state": 4}
    return HVMUNet(**(args | kwargs))
