"""What segmenters made of VMamba v0 blocks share: layers, upsampling, and official key names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ssmvision.layers.vss_block import VSSBlock
from ssmvision.models import vmamba
from ssmvision.models._official import rename
from ssmvision.segmentation._mixers import MakeMixer

__all__ = ["VSS_RENAMES", "PatchExpand", "VSSLayer", "from_vmamba", "make_layer"]

# Official key → ours, of blocks, and of the stem where it is VMamba's.
VSS_RENAMES = (
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"\bpatch_embed\.proj\.", "patch_embed.conv1."),
    (r"\bpatch_embed\.norm\.", "patch_embed.norm1."),
)


def from_vmamba(
    weights: Mapping[str, Tensor], model: nn.Module, places: Iterable[tuple[str, Any]]
) -> dict[str, Tensor]:
    """Weights of VMamba, official or ours, under the keys of a segmenter.

    Args:
        weights: Those of any generation; only v0 has blocks that fit.
        model: The segmenter.
        places: (pattern, replacement) from our keys of VMamba, such as `stages.1.downsample.norm.weight`.
    """
    ours = vmamba.checkpoint_filter_fn(dict(weights), model)
    return {rename(key, places): value for key, value in ours.items()}


class VSSLayer(nn.Module):
    """Blocks of one resolution between an upsampling and a downsampling, either of which may be absent.

    Args:
        blocks: Over maps (b, h, w, dim).
        upsample: Before the blocks, over maps (b, c, h, w).
        downsample: After the blocks, over maps (b, c, h, w).
    """

    def __init__(
        self, blocks: Sequence[nn.Module], upsample: nn.Module | None = None, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.upsample = upsample or nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → (b, c', h', w')."""
        x = self.blocks(self.upsample(x).permute(0, 2, 3, 1))
        return self.downsample(x.permute(0, 3, 1, 2))


def make_layer(
    dim: int,
    rates: Sequence[float],
    make: MakeMixer,
    upsample: nn.Module | None = None,
    downsample: nn.Module | None = None,
) -> VSSLayer:
    """A layer of one block per stochastic depth rate, each of `dim` channels and without an MLP (v0)."""
    return VSSLayer([VSSBlock(dim, make, 0.0, drop_path=rate) for rate in rates], upsample, downsample)


class PatchExpand(nn.Module):
    """A linear map of every pixel to `scale` x `scale` normalised ones: (b, dim, h, w) → (b, out_dim, h s, w s)."""

    def __init__(self, dim: int, out_dim: int, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, out_dim * scale**2, bias=False)
        self.norm = nn.LayerNorm(out_dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, h, w) → (b, out_dim, h * scale, w * scale)."""
        B, _, H, W = x.shape
        s = self.scale
        x = self.expand(x.permute(0, 2, 3, 1)).view(B, H, W, s, s, -1)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(B, H * s, W * s, -1)
        return self.norm(x).permute(0, 3, 1, 2)
