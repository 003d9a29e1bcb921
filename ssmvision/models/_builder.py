"""The one door from our families to timm's builder and to pretrained weights."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import is_exportable
from timm.models import PretrainedCfg, adapt_input_conv, build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn

from ssmvision.hub import CheckpointError, KeyReport, Published, compare_keys, fetch_from_hub, fetch_url
from ssmvision.hub import load_state_dict as read_state_dict
from ssmvision.ops import lowered_for_export

__all__ = ["Published", "build_model", "convert_state_dict", "fitting_state_dict", "load_weights", "weights_cfg"]

FilterFn = Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]


def weights_cfg(**fields: Any) -> dict[str, Any]:
    """A timm pretrained cfg with what all our image models share; `fields` add to it and override it."""
    common = {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": 1000,
    }
    return common | fields


def build_model(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    *,
    checkpoint_filter_fn: FilterFn,
    feature_cfg: dict[str, Any] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """Build a model through timm's builder, reading official weight files through our own safe door.

    timm adapts the head and the first convolution as ever; only where the bytes come from, and that every key of
    them is accounted for, is ours.

    Args:
        model_cls: class to build.
        variant: architecture name in timm's registry.
        pretrained: load the weights that the cfg names.
        checkpoint_filter_fn: turns official key names into ours and leaves ours alone.
        feature_cfg: timm's defaults for `features_only=True`.
        pretrained_cfg: tag, dict or cfg to use instead of the default one.
        pretrained_cfg_overlay: fields that replace those of the cfg; a `url` alone also replaces its Hub source.
        cache_dir: where downloads go.
        **kwargs: timm's builder arguments and the model's own.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if overlay.get("url") and not overlay.get("hf_hub_id"):
        overlay |= {"hf_hub_id": None, "hf_hub_filename": None}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    file = _fetch(cfg, variant, model_cls, cache_dir) if pretrained else None
    # No weights but a stand-in, since timm copies what it finds here, twice for features: our filter reads the file.
    stand_in = {"state_dict": {"read_by_filter": True}} if file else None
    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=cast(Any, cfg),
        pretrained_cfg_overlay=stand_in,
        pretrained_filter_fn=_strict_filter(checkpoint_filter_fn, cfg, file, kwargs),
        feature_cfg=dict(feature_cfg or {}),
        cache_dir=cache_dir,
        **kwargs,
    )
    for module in model.modules():
        if isinstance(kept := getattr(module, "pretrained_cfg", None), dict):
            kept.pop("state_dict", None)
    if is_exportable():
        model.register_forward_pre_hook(_lower_operators)
        model.register_forward_hook(_restore_operators, always_call=True)
    if pretrained:
        published = _published(model_cls, cfg, variant)
        announce_licence(f"{variant}{_dot(cfg.tag)}", (published and published.weights_license) or cfg.license or "")
    return model


# Functions of the module, since a model is copied and pickled together with its hooks.
def _lower_operators(model: nn.Module, args: Any) -> None:
    lowered_for_export().__enter__()


def _restore_operators(model: nn.Module, args: Any, output: Any) -> None:
    lowered_for_export().__exit__()


def _fetch(cfg: PretrainedCfg, variant: str, model_cls: Any, cache_dir: str | Path | None) -> Path | None:
    """The official file that a cfg names, or None where timm reads the weights itself."""
    if cfg.source in ("hf-hub", "local-dir") or cfg.state_dict or cfg.custom_load:
        return None
    published = _published(model_cls, cfg, variant)
    if not cfg.has_weights:
        if published and published.by_hand:
            raise RuntimeError(
                f"No program can download the weights {variant}{_dot(cfg.tag)}: get them by hand from "
                f"{published.by_hand} and pass pretrained_cfg_overlay=dict(file=...)."
            )
        known = ", ".join(timm.list_models(f"{variant}.*", pretrained=True))
        advice = f"these exist: {known}" if known else "use pretrained=False for random weights"
        raise RuntimeError(f"No pretrained weights are registered for {variant}{_dot(cfg.tag)}; {advice}.")
    if cfg.file:
        return Path(cfg.file)
    sha256 = published.sha256 if published else None
    if cfg.hf_hub_id and cfg.hf_hub_filename:
        return fetch_from_hub(cfg.hf_hub_id, cfg.hf_hub_filename, sha256=sha256, cache_dir=cache_dir)
    if cfg.hf_hub_id or not isinstance(cfg.url, str):
        return None
    return fetch_url(cfg.url, sha256=sha256, cache_dir=cache_dir)


def _published(model_cls: Any, cfg: PretrainedCfg, variant: str) -> Published | None:
    """What was published about the weights of a cfg, unless the caller put others in their place."""
    name = f"{variant}{_dot(cfg.tag)}"
    published = getattr(sys.modules[model_cls.__module__], "PUBLISHED", {}).get(name)
    return published if published and _source(cfg) == _source(timm.get_pretrained_cfg(name)) else None


def _source(cfg: PretrainedCfg | None) -> tuple[Any, ...] | None:
    return (cfg.file, cfg.url, cfg.hf_hub_id, cfg.hf_hub_filename) if cfg else None


def _dot(tag: str | None) -> str:
    return f".{tag}" if tag else ""


def _strict_filter(
    filter_fn: FilterFn, cfg: PretrainedCfg, file: Path | None, kwargs: dict[str, Any]
) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """Wrap a family's filter: timm loads with strict=False around a new head, we account for every other key."""

    def convert(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        source = str(file or cfg.file or cfg.hf_hub_id or cfg.url or "the given state dict")
        state_dict = read_state_dict(file) if file else dict(state_dict)
        weights = convert_state_dict(model, state_dict, filter_fn, source)
        report = compare_keys(weights, model.state_dict())
        classes = 0 if kwargs.get("features_only") else model.num_classes
        if classes != cfg.num_classes:
            report = report.without(*_names(cfg.classifier))
        if kwargs.get("in_chans", cfg.input_size[0]) != cfg.input_size[0]:
            stems = {f"{name}.weight" for name in _names(cfg.first_conv)}
            others = tuple(entry for entry in report.mismatched if entry[0] not in stems)
            for key, _, want in set(report.mismatched) - set(others):
                weights[key] = _with_channels(weights[key], want[1])
            report = replace(report, mismatched=others)
        if not report.ok and kwargs.get("pretrained_strict", True):
            raise CheckpointError(_misfit(source, model, report))
        return weights

    return convert


def _with_channels(weight: Tensor, in_chans: int) -> Tensor:
    """The first convolution of clips (o, i, t, h, w) for other channels; timm does those of images (o, i, h, w)."""
    if weight.ndim != 5:
        return weight
    adapted = adapt_input_conv(in_chans, weight.flatten(2, 3), base_chans=weight.shape[1])
    return adapted.unflatten(2, weight.shape[2:4])


def _names(names: str | Iterable[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())


def convert_state_dict(
    model: nn.Module, state_dict: dict[str, Tensor], filter_fn: FilterFn | None = None, source: str = "the checkpoint"
) -> dict[str, Tensor]:
    """Bring official weights under a model's key names; weights that have them already pass unchanged.

    Args:
        model: one of our models.
        state_dict: weights under official or our own names.
        filter_fn: conversion to apply, by default the `checkpoint_filter_fn` of the model's family.
        source: what to call the weights in errors.
    """
    module = type(model).__module__
    if filter_fn is None and module.startswith("ssmvision."):
        filter_fn = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    if filter_fn is None:
        return state_dict
    try:
        return filter_fn(state_dict, model)
    # Filters rely on the layout they know; on weights of another architecture they may stumble in any way.
    except Exception as error:
        report = compare_keys(state_dict, model.state_dict())
        raise CheckpointError(_misfit(source, model, report)) from error


def fitting_state_dict(model: nn.Module, path: str | Path, *, use: str | None = None) -> dict[str, Tensor]:
    """Read an official or converted checkpoint file into weights that fit a model key by key.

    Args:
        model: model to fit; it may be on the meta device.
        path: safetensors, torch or flax file.
        use: `"model"` or `"model_ema"`, where a training checkpoint holds both; by default the latter.
    """
    weights = convert_state_dict(model, read_state_dict(path, use), source=str(path))
    report = compare_keys(weights, model.state_dict())
    if not report.ok:
        raise CheckpointError(_misfit(str(path), model, report))
    return weights


def load_weights(model: nn.Module, path: str | Path, *, use: str | None = None) -> None:
    """Load an official or converted checkpoint file into a model, strictly; see `fitting_state_dict`."""
    model.load_state_dict(fitting_state_dict(model, path, use=use))


def _misfit(source: str, model: nn.Module, report: KeyReport) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") or type(model).__name__
    heads = _names(cfg.get("classifier"))
    sizes = [(have[0], want[0]) for key, have, want in report.mismatched if key.startswith(heads) and have and want]
    if heads and sizes and report.without(*heads).ok:
        have, want = sizes[0]
        return (
            f"{source} has {have} classes and {name} was built with {want}: build it with num_classes={have} (and then "
            f"call reset_classifier({want}) for a new head), or load it with pretrained=True, num_classes={want} and "
            f"pretrained_cfg_overlay=dict(file=..., num_classes={have})."
        )
    return f"{source} does not fit {name}, {report.summary()}."


def forbids_commercial_use(licence: str) -> bool:
    """Whether the words of a licence say so."""
    words = re.split(r"[^a-z]+", licence.lower().replace("non-commercial", "noncommercial"))
    return bool({"nc", "noncommercial", "research"} & set(words))


@cache
def announce_licence(name: str, licence: str) -> None:
    """Warn, once in a process, if a licence of weights forbids commercial use."""
    if forbids_commercial_use(licence):
        warnings.warn(f"The weights {name} come under {licence}, which forbids commercial use.", stacklevel=4)
