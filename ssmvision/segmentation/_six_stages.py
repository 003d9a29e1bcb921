"""The frame of UltraLight VM-UNet and H-vmunet: six stages and attention over skips (MALUNet, arXiv:2211.01784)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.models._official import Tap, rename
from ssmvision.segmentation._shapes import check_input

__all__ = ["STAGE_RENAMES", "SixStages", "check_dims", "stage_taps"]

# Official key → ours.
STAGE_RENAMES = (
    (r"^encoder(\d)", lambda match: f"encoders.{int(match[1]) - 1}"),
    (r"^decoder(\d)", lambda match: f"decoders.{int(match[1]) - 1}"),
    (r"^ebn(\d)", lambda match: f"encoder_norms.{int(match[1]) - 1}"),
    (r"^dbn(\d)", lambda match: f"decoder_norms.{int(match[1]) - 1}"),
    (r"\.catt\.att(\d)", lambda match: f".catt.att.{int(match[1]) - 1}"),
)


class SpatialAttention(nn.Module):
    """How much every pixel counts, from its mean and largest channel: (b, c, h, w) → (b, 1, h, w)."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_conv2d = nn.Sequential(nn.Conv2d(2, 1, 7, padding=9, dilation=3), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, 1, h, w)."""
        return self.shared_conv2d(torch.cat([x.mean(1, True), x.amax(1, True)], dim=1))


class ChannelAttention(nn.Module):
    """How much every channel of every level counts, from the means of all channels of all levels.

    Args:
        dims: Channels of each level.
        split_att: "fc", a linear map for each level, or "conv", a convolution of width 1.
    """

    def __init__(self, dims: Sequence[int], split_att: str = "fc") -> None:
        super().__init__()
        if split_att not in ("fc", "conv"):
            raise ValueError(f"split_att must be 'fc' or 'conv', not {split_att!r}")
        self.get_all_att = nn.Conv1d(1, 1, 3, padding=1, bias=False)
        self.split_att = split_att
        total = sum(dims)
        self.att = nn.ModuleList(
            nn.Linear(total, dim) if split_att == "fc" else nn.Conv1d(total, dim, 1) for dim in dims
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps (b, c_i, h_i, w_i) → (b, c_i, 1, 1) each."""
        means = torch.cat([level.mean((2, 3)) for level in levels], dim=1)
        means = self.get_all_att(means.unsqueeze(1)).squeeze(1)
        if self.split_att == "conv":
            return [att(means.unsqueeze(-1)).sigmoid().unsqueeze(-1) for att in self.att]
        return [att(means).sigmoid()[..., None, None] for att in self.att]


class Bridge(nn.Module):
    """Skips weighted by pixel plus themselves, weighted by channel, plus what was weighted by pixel alone.

    Args:
        dims: Channels of each level.
        split_att: See `ChannelAttention`.
    """

    def __init__(self, dims: Sequence[int], split_att: str = "fc") -> None:
        super().__init__()
        self.satt = SpatialAttention()
        self.catt = ChannelAttention(dims, split_att)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Maps (b, c_i, h_i, w_i) → the same shapes."""
        by_pixel = [self.satt(level) * level for level in levels]
        levels = [level + weighted for level, weighted in zip(levels, by_pixel, strict=True)]
        by_channel = [weight * level for level, weight in zip(levels, self.catt(levels), strict=True)]
        return [weighted + shortcut for weighted, shortcut in zip(by_channel, by_pixel, strict=True)]


class SixStages(nn.Module):
    """Five poolings, a sixth stage, and back up over weighted skips; for sides that are multiples of 32.

    Args:
        name: Name for errors.
        in_channels: Input channels.
        out_channels: Classes.
        dims: Channels of the six stages, multiples of 4.
        encoders: The stages down, (b, dims[i - 1], h, w) → (b, dims[i], h, w).
        decoders: Those back up, (b, dims[i], h, w) → (b, dims[i - 1], h, w), deepest first.
        split_att: How the bridge weighs channels, see `ChannelAttention`.
        bridge: Weigh the skips by attention.
        sigmoid: Give probabilities.
    """

    def __init__(
        self,
        name: str,
        in_channels: int,
        out_channels: int,
        dims: Sequence[int],
        encoders: Sequence[nn.Module],
        decoders: Sequence[nn.Module],
        split_att: str,
        bridge: bool,
        sigmoid: bool,
    ) -> None:
        super().__init__()
        self.name, self.in_channels, self.sigmoid = name, in_channels, sigmoid
        self.encoders = nn.ModuleList(encoders)
        self.encoder_norms = nn.ModuleList(nn.GroupNorm(4, dim) for dim in dims[:-1])
        self.scab = Bridge(dims[:-1], split_att) if bridge else None
        self.decoders = nn.ModuleList(decoders)
        self.decoder_norms = nn.ModuleList(nn.GroupNorm(4, dim) for dim in dims[-2::-1])
        self.final = nn.Conv2d(dims[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) → (b, out_channels, h, w)."""
        check_input(self.name, x, self.in_channels, (32, 32))
        skips: list[Tensor] = []
        for encoder, norm in zip(self.encoders, self.encoder_norms, strict=False):
            x = F.gelu(F.max_pool2d(norm(encoder(x)), 2))
            skips.append(x)
        x = F.gelu(self.encoders[-1](x))
        if self.scab is not None:
            skips = self.scab(skips)
        for index, (decoder, norm) in enumerate(zip(self.decoders, self.decoder_norms, strict=True)):
            x = norm(decoder(x))
            x = F.gelu(_double(x) if index else x) + skips[-1 - index]
        x = _double(self.final(x))
        return x.sigmoid() if self.sigmoid else x


def check_dims(name: str, dims: Sequence[int]) -> None:
    """Raise a ValueError for channels that six stages cannot have."""
    if len(dims) != 6 or any(dim % 4 for dim in dims):
        raise ValueError(f"{name} has six dims, multiples of 4, not {tuple(dims)}")


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


def stage_taps(name: str) -> list[Tap]:
    """Of an official stage, or of the bridge, which returns one tensor per level."""
    if name != "scab":
        return [Tap(rename(name, STAGE_RENAMES))]
    return [Tap("scab", lambda inputs, output, level=level: output[level]) for level in range(5)]  # type: ignore[misc]
