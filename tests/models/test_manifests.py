"""Every published checkpoint, by its key → shape manifest: names, shapes and parameter counts of our models."""

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import ssmvision

MANIFESTS = Path(__file__).parents[1] / "manifests"


def _content(manifest: str) -> dict[str, Any]:
    return json.loads((MANIFESTS / f"{manifest}.json").read_text())


def _official(manifest: str) -> tuple[dict[str, torch.Tensor], int]:
    content = _content(manifest)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in content["state_dict"].items()}
    return tensors, content["params_total"]


def _names(manifest: str) -> list[str]:
    """Our names (`arch.tag`) of the weights that a manifest describes: those whose file it places where we do."""
    where = _content(manifest)["hub_or_release"]
    if isinstance(where, str):  # files without names: one for each data set
        return [name for name in CFGS if name.startswith(manifest)]
    place = set(re.split(r"[\s'(),]+(?:f/)?", " ".join(where.values())))
    names = [name for name, cfg in CFGS.items() if _file(name) in place - {""} and cfg.hf_hub_id in {None, *place}]
    # A manifest may also name the file of another model, which a wrong link leads to.
    exact = [name for name in names if _file(name).partition(".")[0] == manifest]
    return exact or names


def _file(name: str) -> str:
    """The file of a weight, or the identifier of the shared file where no program can download it."""
    cfg, page = CFGS[name], _published(name).by_hand
    if page:
        shared = re.search("/(?:d|f|folders)/([^/]+)", page)
        return shared[1] if shared else ""
    return cfg.hf_hub_filename or cfg.url.rpartition("/")[2]


def _published(name: str) -> Any:
    return sys.modules[timm.models.model_entrypoint(name).__module__].PUBLISHED.get(name)


NAMES = [name for name in ssmvision.list_models(include_tags=True) if timm.is_model(name)]
CFGS = {name: timm.get_pretrained_cfg(name) for name in NAMES if _published(name)}
MANIFEST_NAMES = sorted(path.stem for path in MANIFESTS.glob("*.json"))
WEIGHTS = [(name, manifest) for manifest in MANIFEST_NAMES for name in _names(manifest)]


@pytest.mark.parametrize("manifest", MANIFEST_NAMES)
def test_checkpoint_fits_strictly(manifest: str) -> None:
    state_dict, parameters = _official(manifest)
    model = ssmvision.create_model(_names(manifest)[0], device="meta")
    family = importlib.import_module(type(model).__module__)
    converted = family.checkpoint_filter_fn(state_dict, model)
    ours = model.state_dict()
    assert converted.keys() == ours.keys()
    assert {key: tuple(v.shape) for key, v in converted.items()} == {key: tuple(v.shape) for key, v in ours.items()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert family.checkpoint_filter_fn(ours, model) == ours, "our own keys must pass unchanged"


# Weights that the official table names but whose keys nobody listed: they are those of another tag of the model.
UNLISTED = ["videomamba_middle_patch16_pretrain.ssv2_mask_pt_f8"]


def test_every_published_weight_has_one_manifest() -> None:
    assert sorted([*UNLISTED, *(name for name, _ in WEIGHTS)]) == sorted(CFGS)


@pytest.mark.parametrize(("name", "manifest"), WEIGHTS)
def test_cfg_says_what_was_published(name: str, manifest: str) -> None:
    content, cfg = _content(manifest), CFGS[name]
    stated = json.dumps({key: value for key, value in content.items() if key != "state_dict"})
    if cfg.url:
        release = content["hub_or_release"]["release"]
        path = re.search(r"path ([^)]+)", release)
        version = re.search(r" (v[\d.]+) ", release)
        assert cfg.url.endswith(path[1] if path else f"/releases/download/{version[1]}/{_file(name)}")
    assert cfg.license
    assert cfg.input_size[-1] == content["published"]["res"]
    for field, value in content.get("default_cfg", {}).items():
        assert getattr(cfg, field) == (tuple(value) if isinstance(value, list) else value), field
    published = _published(name)
    assert published.resolution == cfg.input_size[-1]
    assert all(str(value) in stated for value in published.accuracies.values())
    assert (published.flops or "") in stated
