"""What MLLA, VSSD and Spatial-Mamba share beyond `Pyramid`: the frame around their mixers, and its official keys."""

from collections.abc import Callable, Mapping
from typing import Any, Dict, Sequence, Union

from timm.layers import LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from ssmvision.layers.cpe_block import CPEBlock, InvertedDownsample, ResidualStem
from ssmvision.models._official import OfficialModel, as_is, nhwc, pyramid_taps, rename, stage_key
from ssmvision.models._pyramid import Pyramid, Stage


class CPEPyramid(Pyramid):
    """A pyramid of `CPEBlock`s behind a convolutional stem.

    Args:
        mixers: For each stage what makes the mixer of a block, (b, h, w, dim) → the same.
        depths: Blocks of each stage.
        dims: Channels of each stage, or of the first (doubled from stage to stage).
        mlp_ratio: Hidden channels of the MLPs / channels.
        in_chans: Input channels.
        drop_path_rate: Largest stochastic depth rate, reached in the last block.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: Arguments of `Pyramid`.
    """

    def __init__(
        self,
        mixers: Sequence[Callable[..., nn.Module]],
        depths: Sequence[int],
        dims: Union[int, Sequence[int]],
        mlp_ratio: float,
        in_chans: int,
        drop_path_rate: float,
        device: Any,
        dtype: Any,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        dims = [dims * 2**i for i in range(len(depths))] if isinstance(dims, int) else list(dims)
        if not len(mixers) == len(depths) == len(dims):
            raise ValueError(
                f"{type(self).__name__}: {len(depths)} depths, {len(dims)} dims and the mixers of {len(mixers)} stages"
            )
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = [
            Stage(
                InvertedDownsample(dims[i - 1], dim, **dd) if i else nn.Identity(),
                [CPEBlock(dim, mixer, mlp_ratio, rate, **dd) for rate in rates[i]],
            )
            for i, (dim, mixer) in enumerate(zip(dims, mixers, strict=True))
        ]
        super().__init__(
            patch_embed=ResidualStem(in_chans, dims[0], **dd),
            stages=stages,
            dims=dims,
            norm=LayerNorm2d(dims[-1], eps=1e-5, **dd),
            in_chans=in_chans,
            **kwargs,
            **dd,
        )
        self.init_weights(needs_reset=False)


# Official key → ours.
_RENAMES = {
    r"^(patch_embed\..*)\.norm\.": r"\1.bn.",
    r"\.downsample\.conv\.0\.conv\.": ".downsample.expand.",
    r"\.downsample\.conv\.1\.conv\.": ".downsample.depthwise.",
    r"\.downsample\.conv\.2\.conv\.": ".downsample.project.",
    r"\.downsample\.conv\.2\.norm\.": ".downsample.norm.",
    r"^head\.(?!fc)": "head.fc.",
}


def convert_keys(state_dict: Mapping[str, Tensor], renames: Mapping[str, str]) -> Dict[str, Tensor]:
    """Official keys → ours; ours pass unchanged.

    Args:
        state_dict: Weights under either names.
        renames: What the family renames beyond the frame, pattern → replacement.
    """
    if any(key.startswith("stages.") for key in state_dict):
        return dict(state_dict)
    every = [*_RENAMES.items(), *renames.items()]
    return {stage_key(rename(key, every)): value for key, value in state_dict.items()}


def official_model(model: nn.Module, stages: int, as_tokens: bool) -> OfficialModel:
    """A model with the places of the official modules in it.

    Args:
        model: Ours.
        stages: Number of stages.
        as_tokens: The official modules give (b, l, c) rather than (b, h, w, c).
    """
    family = type(model).__name__
    if not as_tokens:
        return OfficialModel(model, pyramid_taps(family, stages, nhwc, as_is))
    return OfficialModel(model, pyramid_taps(family, stages, _tokens_of_map, _tokens_of_block))


def _tokens_of_map(inputs: Any, output: Tensor) -> Tensor:
    return output.flatten(2).transpose(1, 2)


def _tokens_of_block(inputs: Any, output: Tensor) -> Tensor:
    return output.flatten(1, 2)
