"""The registry of networks that timm's cannot hold: volumes, dense outputs, prediction of video."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import timm
import torch
from torch import nn

from ssmvision.hub import NetworkCfg

__all__ = [
    "NetworkCfg",
    "create_network",
    "family_of",
    "is_network",
    "list_networks",
    "network_cfg",
    "register_network",
]

Entrypoint = Callable[..., nn.Module]

TWIN = "_nossm"


_NETWORKS: dict[str, tuple[Entrypoint, NetworkCfg]] = {}


def register_network(cfg: NetworkCfg, twin: bool = False) -> Callable[[Entrypoint], Entrypoint]:
    """Register an entrypoint under its function's name.

    Args:
        cfg: What is known of the network.
        twin: Also register `<name>_nossm`, the same recipe with `mixer="none"`: what `cfg.instead` says.
    """

    def register(entrypoint: Entrypoint) -> Entrypoint:
        name = entrypoint.__name__
        if not twin:
            return _register(name, entrypoint, cfg)

        def without_ssm(**kwargs: Any) -> nn.Module:
            return entrypoint(**{"mixer": "none", **kwargs})

        without_ssm.__module__ = entrypoint.__module__
        without_ssm.__doc__ = f"{name} without its SSM: {cfg.instead}."
        _register(f"{name}{TWIN}", without_ssm, replace(cfg, by_hand="", results=(), twin=name))
        return _register(name, entrypoint, replace(cfg, twin=f"{name}{TWIN}"))

    return register


def _register(name: str, entrypoint: Entrypoint, cfg: NetworkCfg) -> Entrypoint:
    if name in _NETWORKS or timm.is_model(name):
        raise ValueError(f"there is a model named {name!r} already")
    _NETWORKS[name] = (entrypoint, cfg)
    return entrypoint


def is_network(name: str) -> bool:
    """Whether a name is in this registry."""
    return name in _NETWORKS


def network_cfg(name: str) -> NetworkCfg:
    """What is known of a network."""
    return _NETWORKS[name][1]


def licence_of(name: str) -> str:
    """The licence of a network's official weights."""
    cfg = network_cfg(name)
    return cfg.weights_license or cfg.license


def list_networks(filters: list[str], modules: list[str], excluded: list[str]) -> list[str]:
    """Names that match any of `filters` and are of any of `modules` (all, where these are empty), sorted.

    Args:
        filters: Wildcards of names to list.
        modules: Names of families.
        excluded: Wildcards of names to leave out.
    """

    def listed(name: str) -> bool:
        family = _NETWORKS[name][0].__module__.rpartition(".")[2]
        return (
            (not filters or any(fnmatch(name, pattern) for pattern in filters))
            and (not modules or family in modules)
            and not any(fnmatch(name, pattern) for pattern in excluded)
        )

    return sorted(filter(listed, _NETWORKS))


def create_network(
    name: str,
    pretrained: bool = False,
    in_chans: int | None = None,
    num_classes: int | None = None,
    device: Any = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a network by name, under timm's argument names as well as MONAI's.

    Args:
        name: A name of this registry.
        pretrained: Refused with the place where a person gets the weights: no program can download any of them.
        in_chans: What MONAI calls `in_channels`.
        num_classes: What MONAI calls `out_channels`.
        device: Where to build it.
        dtype: Type of its parameters.
        **kwargs: Arguments of the network.

    Raises:
        RuntimeError: `pretrained=True`.
        ValueError: An argument given under both of its names.
    """
    entrypoint, cfg = _NETWORKS[name]
    if pretrained:
        where = f"get them by hand from {cfg.by_hand}" if cfg.by_hand else f"{cfg.origin_url} links none"
        raise RuntimeError(f"No program can download weights of {name}: {where}; load a file with checkpoint_path=...")
    for ours, monai, value in (("in_chans", "in_channels", in_chans), ("num_classes", "out_channels", num_classes)):
        if value is not None and kwargs.setdefault(monai, value) != value:
            raise ValueError(f"{name}: {ours}={value} and {monai}={kwargs[monai]} mean the same; give one of them")
    with nullcontext() if device is None else torch.device(device):
        model = entrypoint(**kwargs)
    return model if dtype is None else model.to(dtype)


def family_of(name: str) -> Any:
    """The module that a network comes from."""
    return sys.modules[_NETWORKS[name][0].__module__]
