"""VM-UNet and VM-UNetV2: U-Nets of VMamba v0 blocks for pictures.

Papers: `VM-UNet: Vision Mamba UNet for Medical Image Segmentation` - https://arxiv.org/abs/2402.02491
    `VM-UNet-V2: Rethinking Vision Mamba UNet for Medical Image Segmentation` - https://arxiv.org/abs/2403.09157
Official code (Apache-2.0): https://github.com/JCruan519/VM-UNet and https://github.com/nobodyplayer1/VM-UNetV2
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import named_apply
from torch import Tensor, nn

from ssmvision.layers.vss_block import PatchMerging, PatchStem
from ssmvision.models._init import init_linear
from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.models._official import OfficialModel, Tap, nhwc, rename
from ssmvision.segmentation._blocks import drop_path_rates
from ssmvision.segmentation._mixers import MakeMixer, ss2d_or_twin
from ssmvision.segmentation._shapes import check_input, check_spatial_dims
from ssmvision.segmentation._vss import VSS_RENAMES, PatchExpand, VSSLayer, from_vmamba, make_layer

__all__ = ["VMUNet", "VMUNetV2"]


def _encoder_layers(
    dims: Sequence[int], depths: Sequence[int], make: MakeMixer, drop_path_rate: float
) -> list[VSSLayer]:
    if len(dims) != len(depths):
        raise ValueError(f"dims and depths must have one entry per stage, not {dims} and {depths}")
    after = [PatchMerging(dim, wider) for dim, wider in pairwise(dims)]
    rates = drop_path_rates(drop_path_rate, depths)
    return [
        make_layer(dim, rate, make, downsample=merging)
        for dim, rate, merging in zip(dims, rates, [*after, None], strict=True)
    ]


def _right_channels(in_channels: int) -> tuple[int, ...]:
    """Pictures of one channel pass for colored ones."""
    return (1, 3) if in_channels == 3 else (in_channels,)


# Key of VMamba → ours: stages begin with their downsampling there and end with it here.
_PLACES = (
    (r"^stages\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample"),
    (r"^stages", "layers"),
)


class VMUNet(nn.Module):
    """VM-UNet: (b, in_channels, h, w) → logits (b, out_channels, h, w), for sides that are multiples of 32.

    A skip is added before the upsampling that follows it, so the first stage's own input never serves as one.
    `load_encoder` starts it as the authors do: every stage of the encoder with the first blocks of VMamba-S, and its
    mirror in the decoder with the same.

    Args:
        spatial_dims: 2.
        in_channels: Input channels; where they are 3, pictures of one channel are repeated to 3 as officially.
        out_channels: Classes.
        dims: Channels of each stage, doubling.
        depths: Blocks of each stage of the encoder.
        decoder_depths: Blocks of each stage of the decoder, coarsest first.
        d_state: Size of the state of the scans.
        drop_path_rate: Largest stochastic depth rate.
        mixer: "ss2d", or "none" for gated convolutions instead of the scans.
        sigmoid: Give probabilities, as the official network of one class does.
    """

    backbone, encoder_keys = "vmamba_v0_small", ("patch_embed.", "layers.")

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        d_state: int = 16,
        drop_path_rate: float = 0.0,
        mixer: str = "ss2d",
        sigmoid: bool = False,
    ) -> None:
        check_spatial_dims("VM-UNet", spatial_dims, 2)
        super().__init__()
        self.in_channels, self.sigmoid = in_channels, sigmoid
        self.patch_embed = PatchStem(in_channels, dims[0])
        make = ss2d_or_twin("VM-UNet", mixer, d_state)
        self.layers = nn.ModuleList(_encoder_layers(dims, depths, make, drop_path_rate))
        self.layers_up = nn.ModuleList()
        rates = [layer[::-1] for layer in drop_path_rates(drop_path_rate, decoder_depths[::-1])[::-1]]
        below = [None, *dims[:0:-1]]
        for dim, coarser, rate in zip(dims[::-1], below, rates, strict=True):
            expand = None if coarser is None else PatchExpand(coarser, dim)
            self.layers_up.append(make_layer(dim, rate, make, upsample=expand))
        self.final_up = PatchExpand(dims[0], dims[0] // 4, 4)
        self.final_conv = nn.Conv2d(dims[0] // 4, out_channels, 1)
        named_apply(init_linear, self)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) → (b, out_channels, h, w)."""
        divisor = 4 * 2 ** (len(self.layers) - 1)
        check_input("VM-UNet", x, _right_channels(self.in_channels), (divisor, divisor))
        x = self.patch_embed(x.expand(-1, self.in_channels, -1, -1))
        skips = []
        for layer in self.layers:
            skips.append(x)
            x = layer(x)
        for index, layer in enumerate(self.layers_up):
            x = layer(x + skips[-index] if index else x)
        x = self.final_conv(self.final_up(x))
        return x.sigmoid() if self.sigmoid else x

    def from_backbone(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of VMamba v0 under our keys, those of blocks also under the keys of the mirrored decoder."""
        found, own = from_vmamba(weights, self, _PLACES), self.state_dict()
        mirrors = {re.sub(r"^layers\.(\d)", self._mirror, key): value for key, value in found.items()}
        return {key: value for key, value in mirrors.items() if key in own} | found

    def _mirror(self, match: re.Match[str]) -> str:
        return f"layers_up.{len(self.layers) - 1 - int(match[1])}"


class ChannelAttention(nn.Module):
    """Channels weighted by an MLP of their means and maxima (CBAM, arXiv:1807.06521)."""

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, dim // reduction)
        self.fc1 = nn.Conv2d(dim, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, h, w) → the same."""
        mean, largest = (self.fc2(F.relu(self.fc1(pooled))) for pooled in (x.mean((2, 3), True), x.amax((2, 3), True)))
        return x * (mean + largest).sigmoid()


class SpatialAttention(nn.Module):
    """Pixels weighted by a convolution of their mean and largest channel (CBAM, arXiv:1807.06521)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → the same."""
        return x * self.conv1(torch.cat([x.mean(1, True), x.amax(1, True)], dim=1)).sigmoid()


class Level(nn.Module):
    """One map of the pyramid, weighted by both attentions and projected: (b, dim, h, w) → (b, out_dim, h, w)."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.ca = ChannelAttention(dim)
        self.sa = SpatialAttention()
        self.conv = nn.Conv2d(dim, out_dim, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, h, w) → (b, out_dim, h, w)."""
        return self.bn(self.conv(self.sa(self.ca(x))))


class ProductFusion(nn.Module):
    """The product of all levels, each resized to one of them and convolved (SDI of U-Net v2, arXiv:2311.17791)."""

    def __init__(self, dim: int, levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(levels))

    def forward(self, levels: Sequence[Tensor], anchor: Tensor) -> Tensor:
        """Maps (b, dim, ·, ·) and one of them, (b, dim, h, w) → (b, dim, h, w)."""
        fused = torch.ones_like(anchor)
        for conv, level in zip(self.convs, levels, strict=True):
            fused = fused * conv(_resize(level, anchor.shape[2:]))
        return fused


def _resize(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[2] > size[0]:
        return F.adaptive_avg_pool2d(x, (size[0], size[1]))
    if x.shape[2] < size[0]:
        return F.interpolate(x, size, mode="bilinear", align_corners=True)
    return x


class VMUNetV2(nn.Module):
    """VM-UNetV2: (b, in_channels, h, w) → logits (b, out_channels, h, w), for sides that are multiples of 32.

    The pyramid is made of the four stages' inputs, so the fourth stage is never run; it, two heads and a deconvolution
    exist because official checkpoints hold them, and take no gradients. Officially maps are resized to squares, so
    only square inputs work; here each is resized to the sides of its anchor, which for squares is the same.
    `load_encoder` gives the encoder the weights of VMamba-T, whose depths are these.

    Args:
        spatial_dims: 2.
        in_channels: Input channels; where they are 3, pictures of one channel are repeated to 3 as officially.
        out_channels: Classes.
        mid_channel: Channels of the decoder; the stages have 2, 4, 8 and 16 times as many.
        depths: Blocks of each stage of the encoder.
        dims: Channels of each stage, where they are not those multiples.
        half_head: Add a head at half resolution, upsampled by a learned filter that all classes share, to the output
            (what the official code calls deep supervision).
        d_state: Size of the state of the scans.
        drop_path_rate: Largest stochastic depth rate.
        mixer: "ss2d", or "none" for gated convolutions instead of the scans.
        sigmoid: Give probabilities, as the official network does.
    """

    backbone, encoder_keys = "vmamba_v0_tiny", ("patch_embed.", "layers.")

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 3,
        out_channels: int = 1,
        mid_channel: int = 48,
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: Sequence[int] | None = None,
        half_head: bool = True,
        d_state: int = 16,
        drop_path_rate: float = 0.0,
        mixer: str = "ss2d",
        sigmoid: bool = False,
    ) -> None:
        check_spatial_dims("VM-UNetV2", spatial_dims, 2)
        super().__init__()
        self.in_channels, self.half_head, self.sigmoid = in_channels, half_head, sigmoid
        dims = [mid_channel * 2 ** (i + 1) for i in range(4)] if dims is None else dims
        self.patch_embed = PatchStem(in_channels, dims[0])
        make = ss2d_or_twin("VM-UNetV2", mixer, d_state)
        self.layers = nn.ModuleList(_encoder_layers(dims, depths, make, drop_path_rate))
        named_apply(init_linear, self)
        self.levels = nn.ModuleList(Level(dim, mid_channel) for dim in dims)
        self.sdi = nn.ModuleList(ProductFusion(mid_channel, len(dims)) for _ in dims)
        self.deconvs = nn.ModuleList(
            nn.ConvTranspose2d(mid_channel, mid_channel, 4, stride=2, padding=1, bias=False) for _ in dims
        )
        self.seg_outs = nn.ModuleList(nn.Conv2d(mid_channel, out_channels, 1) for _ in dims)
        self.half_up = nn.ConvTranspose2d(1, 1, 3, stride=2, padding=1, output_padding=1)
        unused = [self.layers[-1], self.deconvs[-1], *self.seg_outs[:2]]
        for module in unused if half_head else [*unused, self.seg_outs[2], self.half_up]:
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) → (b, out_channels, h, w)."""
        check_input("VM-UNetV2", x, _right_channels(self.in_channels), (32, 32))
        pyramid = [self.patch_embed(x.expand(-1, self.in_channels, -1, -1))]
        for layer in self.layers[:-1]:
            pyramid.append(layer(pyramid[-1]))
        levels = [level(features) for level, features in zip(self.levels, pyramid, strict=True)]
        fused = [sdi(levels, anchor) for sdi, anchor in zip(self.sdi, levels, strict=True)]
        decoded = [fused[-1]]
        for deconv, finer in zip(self.deconvs, fused[-2::-1], strict=False):
            decoded.append(deconv(decoded[-1]) + finer)
        logits = self._head(decoded, 3)
        if self.half_head:
            half = self._head(decoded, 2)
            logits = logits + self.half_up(half.flatten(0, 1).unsqueeze(1)).view_as(logits)
        return logits.sigmoid() if self.sigmoid else logits

    def from_backbone(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of VMamba v0 under our keys."""
        return from_vmamba(weights, self, _PLACES)

    def _head(self, decoded: Sequence[Tensor], index: int) -> Tensor:
        return F.interpolate(self.seg_outs[index](decoded[index]), scale_factor=4.0, mode="bilinear")


def _level(match: Any) -> str:
    part = {"ca": "levels.{}.ca", "sa": "levels.{}.sa", "Translayer": "levels.{}", "sdi": "sdi.{}"}[match[1]]
    return part.format(int(match[2]) - 1)


# Official key → ours.
_RENAMES = (
    (r"^vmunet\.", ""),
    *VSS_RENAMES,
    (r"^(ca|sa|Translayer|sdi)_(\d)", _level),
    (r"^deconv6", "half_up"),
    (r"^deconv(\d)", lambda match: f"deconvs.{int(match[1]) - 2}"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged.

    The encoder that VM-UNetV2 wraps may hold the head of a VM-UNet that it never uses; it is left out.
    """
    converted = {rename(key, _RENAMES): value for key, value in state_dict.items()}
    if isinstance(model, VMUNetV2):
        converted = {key: value for key, value in converted.items() if not key.startswith("final_")}
    return converted


def from_official(official_class: str, kwargs: Mapping[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `VMUNet` or `VMUNetV2`."""
    shared = {
        "in_channels": kwargs.get("input_channels", 3),
        "out_channels": kwargs.get("num_classes", 1),
        "depths": kwargs.get("depths", (2, 2, 9, 2)),
        "drop_path_rate": kwargs.get("drop_path_rate", 0.2),
    }
    one_class = shared["out_channels"] == 1
    if official_class.startswith("VMUNetV2"):
        half = kwargs.get("deep_supervision", True)
        v2 = VMUNetV2(
            mid_channel=kwargs.get("mid_channel", 48), dims=kwargs.get("dims"), half_head=half,
            sigmoid=half or one_class, **shared,
        )  # fmt: skip
        return OfficialModel(v2, lambda name: [_tap_v2(v2, name)], without_effect=("depths_decoder",))
    dims = kwargs.get("dims", (96, 192, 384, 768))
    if list(kwargs.get("dims_decoder", dims[::-1])) != list(dims[::-1]):
        raise ValueError(f"dims_decoder must mirror dims, {list(dims[::-1])}, not be {kwargs['dims_decoder']}")
    decoder_depths = kwargs.get("depths_decoder", (2, 9, 2, 2))
    model = VMUNet(dims=dims, decoder_depths=decoder_depths, sigmoid=one_class, **shared)
    return OfficialModel(model, lambda name: [_tap(name)])


def _tap(name: str) -> Tap:
    ours = rename(name, _RENAMES)
    return Tap(ours) if ours == "final_conv" or "blocks" in ours else Tap(ours, nhwc)


def _tap_v2(model: VMUNetV2, name: str) -> Tap:
    if name == "vmunet.layers.3":  # the dead stage, of which cases know the output
        return Tap("layers.2", lambda inputs, output: nhwc(inputs, model.layers[3](output)))
    return _tap(name) if name.startswith("vmunet.") else Tap(rename(name, _RENAMES))


_METRIC = "mIoU and DSC of the ISIC sets are global over all pixels of the test set, not a mean over images."


def _cfg(**fields: Any) -> NetworkCfg:
    common = {
        "paper_name": "VM-UNet: Vision Mamba UNet for Medical Image Segmentation", "paper_ids": "arXiv:2402.02491",
        "origin_url": "https://github.com/JCruan519/VM-UNet", "license": "Apache-2.0", "input_size": (3, 256, 256),
        "results_source": "https://arxiv.org/abs/2402.02491",
        "caveats": (_METRIC,),
    }  # fmt: skip
    return NetworkCfg(**(common | fields))


_ISIC = (
    ("ISIC17 mIoU", "80.23*"), ("ISIC17 DSC", "89.03*"), ("ISIC18 mIoU", "80.35*"), ("ISIC18 DSC", "89.71*"),
)  # fmt: skip


@register_network(_cfg(results=_ISIC, by_hand="the Baidu links in https://github.com/JCruan519/VM-UNet"), twin=True)
def vm_unet(**kwargs: Any) -> VMUNet:
    """VM-UNet as its repository configures it, 2-2-2-2 blocks down and 2-2-2-1 up, 27.4M parameters."""
    return VMUNet(**kwargs)


@register_network(
    _cfg(
        results=(("Synapse DSC", "81.08*"), ("Synapse HD95", "19.21*")),
        by_hand="the Baidu links in https://github.com/JCruan519/VM-UNet",
        input_size=(3, 224, 224),
    ),
    twin=True,
)
def vm_unet_d2292(**kwargs: Any) -> VMUNet:
    """VM-UNet with the official class's own defaults, 2-2-9-2 blocks down and 2-9-2-2 up, 44.3M parameters."""
    args: dict[str, Any] = {"depths": (2, 2, 9, 2), "decoder_depths": (2, 9, 2, 2)}
    return VMUNet(**(args | kwargs))


@register_network(
    _cfg(
        paper_name="VM-UNet-V2: Rethinking Vision Mamba UNet for Medical Image Segmentation",
        paper_ids="arXiv:2403.09157",
        origin_url="https://github.com/nobodyplayer1/VM-UNetV2",
        results=(
            ("ISIC17 mIoU", "82.34*"), ("ISIC17 DSC", "90.31*"), ("ISIC18 mIoU", "81.37*"), ("ISIC18 DSC", "89.73*"),
        ),
        results_source="https://arxiv.org/abs/2403.09157",
        caveats=(
            _METRIC,
            "Published checkpoints hold a fourth stage, two heads and a deconvolution that nothing reads; they count "
            "as parameters but take no gradients.",
        ),
    ),
    twin=True,
)  # fmt: skip
def vm_unet_v2(**kwargs: Any) -> VMUNetV2:
    """VM-UNetV2, 22.8M parameters, a third of them in the unused fourth stage."""
    return VMUNetV2(**kwargs)


@register_network(_cfg(input_size=(3, 64, 64)), twin=True)
def test_vm_unet(**kwargs: Any) -> VMUNet:
    """A micro network for tests."""
    args: dict[str, Any] = {
        "dims": (8, 16, 32, 64),
        "depths": (1, 1, 1, 1),
        "decoder_depths": (1, 1, 1, 1),
        "d_state": 4,
    }
    return VMUNet(**(args | kwargs))


@register_network(_cfg(input_size=(3, 64, 64)), twin=True)
def test_vm_unet_v2(**kwargs: Any) -> VMUNetV2:
    """A micro network for tests."""
    args: dict[str, Any] = {"mid_channel": 8, "depths": (1, 1, 1, 1), "d_state": 4}
    return VMUNetV2(**(args | kwargs))
