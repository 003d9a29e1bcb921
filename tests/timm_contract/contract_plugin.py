"""Pytest plugin that aims timm's own model tests at another package's models.

`test_contract.py` copies this file next to timm's `test_models.py` and loads it with `-p`, so that it runs before those
tests build their parameter lists from `timm.list_models`.
"""

import importlib
import os
from fnmatch import fnmatch
from unittest import mock

import pytest
import timm
from timm.models import _registry

# Taken before the package under test is imported: what belongs to timm must still belong to it afterwards.
_TIMM_OWNS = dict(_registry._model_entrypoints)
importlib.import_module(os.environ.get("TIMM_CONTRACT_PACKAGE", "ssmvision"))

# timm's marker for token models, which it exempts from checks that need a spatial feature pyramid.
_TOKEN_MODELS = "vit_*"
_NEEDS_HUB = ("test_model_load_pretrained", "test_model_features_pretrained")


def _package_models() -> list[str]:
    names = set(_registry._model_entrypoints) - set(_TIMM_OWNS)
    stolen = [name for name, owner in _TIMM_OWNS.items() if _registry._model_entrypoints.get(name) is not owner]
    if stolen:
        raise pytest.UsageError(f"the package under test took over names of timm: {stolen}")
    if not names:
        raise pytest.UsageError("the package under test registered no model")
    return sorted(names)


def _is_isotropic(name: str) -> bool:
    model = timm.create_model(name, device="meta")
    return len({info["reduction"] for info in model.feature_info}) == 1


PATTERNS = os.environ.get("TIMM_CONTRACT_MODELS", "*").split(",")
MODELS = [name for name in _package_models() if any(fnmatch(name, pattern) for pattern in PATTERNS)]
if not MODELS:
    raise pytest.UsageError(f"no model matches {PATTERNS}")
ISOTROPIC = [name for name in MODELS if _is_isotropic(name)]


def _list_models(filter="", module="", pretrained=False, exclude_filters="", name_matches_cfg=False, include_tags=None):
    """timm's `list_models` limited to our models; of timm's exclusions only the one of token models has a meaning."""
    if filter and _TOKEN_MODELS not in filter:
        return _registry.list_models(filter, module, pretrained, exclude_filters, name_matches_cfg, include_tags)
    wanted = set(ISOTROPIC) if filter else set(MODELS)
    if _TOKEN_MODELS in exclude_filters:
        wanted -= set(ISOTROPIC)
    names = _registry.list_models("", "", pretrained, "", name_matches_cfg, include_tags)
    return [name for name in names if _registry.get_arch_name(name) in wanted]


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    # Only while collecting: the package under test may rely on the real function at run time.
    with (
        mock.patch.object(timm, "list_models", _list_models),
        mock.patch.object(timm.models, "list_models", _list_models),
    ):
        return (yield)


def _is_ours(item) -> bool:
    callspec = getattr(item, "callspec", None)
    name = callspec.params.get("model_name") if callspec else None
    if not isinstance(name, str) or _registry.get_arch_name(name) not in MODELS:
        return False
    return item.originalname not in _NEEDS_HUB or "HF_ENDPOINT" in os.environ


def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=[item for item in items if not _is_ours(item)])
    items[:] = [item for item in items if _is_ours(item)]
