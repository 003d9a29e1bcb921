"""`create_model`, `list_models` and `is_model`: timm's registry limited to our names, and the networks beside it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, model_entrypoint, parse_model_name
from torch import nn

import ssmvision.models as _families  # registers our models with timm
from ssmvision.models._builder import announce_licence, load_weights
from ssmvision.models._networks import create_network, is_network, licence_of, list_networks
from ssmvision.segmentation import load_encoder  # importing it registers what timm's registry cannot hold

__all__ = ["create_model", "is_model", "list_models"]

_PACKAGE = f"{_families.__name__}."


def is_model(model_name: str) -> bool:
    """Whether a name, with or without a tag, is one of our architectures."""
    if is_network(model_name):
        return True
    return timm.is_model(model_name) and model_entrypoint(model_name).__module__.startswith(_PACKAGE)


def list_models(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    name_matches_cfg: bool = False,
    include_tags: bool | None = None,
) -> list[str]:
    """List our models; the arguments are those of `timm.list_models`.

    What timm's registry cannot hold (segmenters, networks for volumes, predictors of video) is listed as well, but not
    with `pretrained` or `name_matches_cfg`, since none of it has weights that a program can download.

    Args:
        filter: wildcards of names to list.
        module: names of families (modules in `ssmvision.models` and `ssmvision.segmentation`).
        pretrained: only those that have weights.
        exclude_filters: wildcards of names to leave out.
        name_matches_cfg: only names that have a cfg of their own.
        include_tags: list `arch.tag`; by default only together with `pretrained`.
    """
    names = timm.list_models(filter, module, pretrained, exclude_filters, name_matches_cfg, include_tags)
    names = [name for name in names if is_model(name)]
    if pretrained or name_matches_cfg:
        return names
    return names + list_networks(_several(filter), _several(module), _several(exclude_filters))


def _several(names: str | Iterable[str]) -> list[str]:
    return [name for name in ([names] if isinstance(names, str) else names) if name]


def create_model(
    model_name: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    scriptable: bool | None = None,
    exportable: bool | None = None,
    no_jit: bool | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a model by name; names that are timm's alone are passed on to it.

    Networks that timm's registry cannot hold take `in_chans` and `num_classes` as well, for what MONAI calls
    `in_channels` and `out_channels`; of the other arguments below only `checkpoint_path` concerns them.

    Args:
        model_name: `arch`, `arch.tag`, `hf-hub:owner/name` or `local-dir:/path`.
        pretrained: load the weights of the tag.
        pretrained_cfg: tag or cfg to use instead of the default one.
        pretrained_cfg_overlay: fields that replace those of the cfg.
        checkpoint_path: official or converted checkpoint to load into the model, every key accounted for.
        cache_dir: where downloads go.
        scriptable: timm's layer setting for TorchScript.
        exportable: timm's layer setting for export.
        no_jit: timm's layer setting against scripted layers.
        **kwargs: arguments of the model, such as `num_classes`, `in_chans`, `features_only`, `device`. For a segmenter
            also `encoder_weights`: a file of its backbone's weights or True for the published ones; what does not fit
            is named by a warning, see `ssmvision.segmentation.load_encoder`.
    """
    encoder_weights = kwargs.pop("encoder_weights", False)
    if is_network(model_name):
        network = create_network(model_name, pretrained, **kwargs)
        if encoder_weights:
            load_encoder(network, encoder_weights)
        if checkpoint_path:
            load_weights(network, checkpoint_path)
            announce_licence(model_name, licence_of(model_name))
        return network
    if encoder_weights:
        raise ValueError(
            f"encoder_weights are for segmenters, not for {model_name}; pass pretrained or checkpoint_path"
        )
    source, name = parse_model_name(model_name)
    if source is None:
        _check_name(name)
    if checkpoint_path and kwargs.get("features_only"):
        raise ValueError(
            "checkpoint_path loads whole models; for features_only pass pretrained=True and "
            f"pretrained_cfg_overlay=dict(file={str(checkpoint_path)!r})."
        )
    try:
        model = timm.create_model(
            model_name,
            pretrained=pretrained,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=pretrained_cfg_overlay,
            cache_dir=cache_dir,
            scriptable=scriptable,
            exportable=exportable,
            no_jit=no_jit,
            **kwargs,
        )
    except RuntimeError as error:
        unknown = str(error).removeprefix("Unknown model (").removesuffix(")")
        if unknown == str(error):
            raise
        raise RuntimeError(f"{model_name} holds weights of an unknown architecture. {_advice(unknown)}") from error
    if checkpoint_path:
        load_weights(model, checkpoint_path)
    return model


def _check_name(name: str) -> None:
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        raise RuntimeError(_advice(name))
    tagged = get_arch_pretrained_cfgs(arch)
    if tag and tagged and name not in tagged:
        raise RuntimeError(f"{arch} has no weights tagged {tag!r}; its names are: {', '.join(tagged)}.")


def _advice(name: str) -> str:
    """One sentence that says a name is unknown and which right ones are near, ours before timm's."""
    arch = name.partition(".")[0]
    near = difflib.get_close_matches(name, list_models(include_tags=True), n=3, cutoff=0.6)
    near += difflib.get_close_matches(arch, list_models(), n=3, cutoff=0.6)
    near = list(dict.fromkeys(near)) or difflib.get_close_matches(arch, timm.list_models(), n=3, cutoff=0.75)
    hint = f"did you mean {', '.join(near)}?" if near else "ssmvision.list_models() lists the names."
    return f"There is no model named {name!r}; {hint}"
