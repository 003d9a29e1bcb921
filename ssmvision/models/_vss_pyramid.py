"""What several families took over from VMamba v0: patches, merging and the names of their weights."""

from collections.abc import Mapping
from typing import Any, Dict, Sequence, Union

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ssmvision.layers.vss_block import PatchMerging, PatchStem
from ssmvision.models._official import rename, stage_key
from ssmvision.models._pyramid import Pyramid, Stage


class VSSPyramid(Pyramid):
    """A pyramid with non-overlapping patches, and a merging of 2 x 2 neighbours between its stages.

    Args:
        blocks: Of each stage.
        dims: Channels of each stage.
        in_chans: Input channels.
        channels_last: Whether the blocks of a stage see (b, h, w, dim), for each stage.
        pad: Merging pads odd sides; otherwise it drops their last row or column.
        norm: Normalise the last map.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: Arguments of `Pyramid`.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[nn.Module]],
        dims: Sequence[int],
        in_chans: int,
        channels_last: Sequence[bool],
        device: Any,
        dtype: Any,
        pad: bool = True,
        norm: bool = True,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        stages = [
            Stage(PatchMerging(dims[i - 1], dims[i], pad, **dd) if i else nn.Identity(), blocks[i], channels_last[i])
            for i in range(len(dims))
        ]
        super().__init__(
            patch_embed=PatchStem(in_chans, dims[0], **dd),
            stages=stages,
            dims=dims,
            norm=LayerNorm2d(dims[-1], eps=1e-5, **dd) if norm else nn.Identity(),
            in_chans=in_chans,
            **kwargs,
            **dd,
        )
        self.init_weights(needs_reset=False)


def stage_dims(family: str, dims: Union[int, Sequence[int]], depths: Sequence[int]) -> Sequence[int]:
    """Channels of each stage, doubled from stage to stage where only those of the first are given."""
    dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
    if len(dims) != len(depths):
        raise ValueError(f"{family}: {len(dims)} dims and {len(depths)} depths")
    return dims


# Official key → ours.
_RENAMES = {
    r"^patch_embed\.0\.": "patch_embed.conv1.",
    r"^patch_embed\.2\.": "patch_embed.norm1.",
    r"^classifier\.norm\.": "norm.",
    r"^classifier\.head\.": "head.fc.",
}


def convert_keys(state_dict: Mapping[str, Tensor], renames: Mapping[Any, Any]) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged.

    Args:
        state_dict: Weights under either names.
        renames: What the family renames beyond the frame, pattern → replacement.
    """
    if any(key.startswith("stages.") for key in state_dict):
        return dict(state_dict)
    every = [*_RENAMES.items(), *renames.items()]
    return {stage_key(rename(key, every)): value for key, value in state_dict.items()}
