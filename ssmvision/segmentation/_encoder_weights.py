"""Weights of published backbones for the encoders of segmenters, every tensor of both accounted for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import timm
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ssmvision.hub import CheckpointError, KeyReport, compare_keys, load_state_dict
from ssmvision.models._builder import announce_licence

__all__ = ["TakesBackbone", "load_encoder"]


class TakesBackbone(Protocol):
    """What a segmenter tells about its encoder, if a published backbone's weights fit it."""

    backbone: str
    """Name of the backbone to download; empty where a file must be given."""
    encoder_keys: str | tuple[str, ...]
    """What the encoder's keys begin with."""

    def from_backbone(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A backbone's weights, under official or our keys, under those of the segmenter; others stay as they are."""


def load_encoder(model: nn.Module, weights: bool | str | Path = True) -> KeyReport:
    """Begin the training of a segmenter with an encoder that was trained on pictures.

    The first convolution is adapted to the number of input channels as timm does. Where either side holds tensors that
    the other has no counterpart of, those of the model keep their values, and a warning names them. Another warning
    tells where the licence of a backbone's published weights forbids commercial use.

    Args:
        model: A segmenter of this package whose paper, or whose kind, begins with such an encoder.
        weights: A file of the backbone, official or converted; True for the published one, which is downloaded.

    Returns:
        How the weights fit the encoder: of the model `missing`, of the file `unexpected`, and `mismatched` in shape.

    Raises:
        ValueError: The segmenter has no such encoder, or none that a program can download.
        CheckpointError: The file holds nothing that fits.
    """
    name, chosen = type(model).__name__, _chosen(model)
    if weights is True and not chosen.backbone:
        raise ValueError(f"{name}: no program downloads weights of its encoder; pass encoder_weights=FILE")
    source = chosen.backbone if weights is True else str(weights)
    found = timm.create_model(source, pretrained=True).state_dict() if weights is True else load_state_dict(source)
    converted, own = chosen.from_backbone(found), model.state_dict()
    target = {key: value for key, value in own.items() if key.startswith(chosen.encoder_keys) or key in converted}
    converted = {key: _with_channels(value, target.get(key)) for key, value in converted.items()}
    report = compare_keys(converted, target)
    others = {*report.unexpected, *(key for key, _, _ in report.mismatched)}
    fitting = {key: value for key, value in converted.items() if key not in others}
    if not fitting:
        raise CheckpointError(f"{source} holds nothing that fits the encoder of {name}, {report.summary()}.")
    model.load_state_dict(fitting, strict=False)
    announce_licence(source, _licence(chosen))
    if not report.ok:
        warnings.warn(
            f"{name} takes {len(fitting)} tensors from {source}; of its encoder and the file, {report.summary()}",
            stacklevel=2,
        )
    return report


def _chosen(model: Any) -> TakesBackbone:
    if not hasattr(model, "from_backbone"):
        raise ValueError(f"{type(model).__name__} has no encoder that weights of a published backbone fit")
    return model


def _licence(chosen: TakesBackbone) -> str:
    """Of the published weights, in a file or not."""
    cfg = timm.get_pretrained_cfg(chosen.backbone) if chosen.backbone else None
    return getattr(chosen, "backbone_license", (cfg and cfg.license) or "")


def _with_channels(weight: Tensor, like: Tensor | None) -> Tensor:
    """The first convolution of colored pictures for other channels."""
    if like is None or weight.dim() != 4 or weight.shape[1] != 3 or like.shape[2:] != weight.shape[2:]:
        return weight
    return adapt_input_conv(like.shape[1], weight)
