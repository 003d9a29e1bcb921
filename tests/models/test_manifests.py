"""Every published checkpoint, by its key → shape manifest: names, shapes and parameter counts of our models."""

import importlib
import json
from pathlib import Path

import pytest
import timm
import torch

import ssmvision

MANIFESTS = Path(__file__).parents[1] / "manifests"


def _architecture(manifest: str) -> str:
    return manifest.removesuffix("_midcls")


def _official(manifest: str) -> tuple[dict[str, torch.Tensor], int]:
    content = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, shape in content["state_dict"].items()}
    return tensors, content["params_total"]


@pytest.mark.parametrize("manifest", sorted(path.stem for path in MANIFESTS.glob("*.json")))
def test_checkpoint_fits_strictly(manifest: str) -> None:
    state_dict, parameters = _official(manifest)
    model = ssmvision.create_model(_architecture(manifest), device="meta")
    family = importlib.import_module(type(model).__module__)
    converted = family.checkpoint_filter_fn(state_dict, model)
    ours = model.state_dict()
    assert converted.keys() == ours.keys()
    assert {key: tuple(v.shape) for key, v in converted.items()} == {key: tuple(v.shape) for key, v in ours.items()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert family.checkpoint_filter_fn(ours, model) == ours, "our own keys must pass unchanged"


def test_every_published_weight_has_a_manifest() -> None:
    manifests = {_architecture(path.stem) for path in MANIFESTS.glob("*.json")}
    published = {name.partition(".")[0] for name in ssmvision.list_models(pretrained=True)}
    assert published == manifests


@pytest.mark.parametrize("name", ssmvision.list_models(pretrained=True))
def test_cfg_names_where_the_weights_are(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    manifest = next(MANIFESTS.glob(f"{name.partition('.')[0]}*.json"))
    place = json.loads(manifest.read_text())["hub_or_release"]
    if "hub" in place:
        assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (place["hub"], place["file"])
    else:
        assert cfg.url.endswith(place["release"].split("path ")[1].rstrip(")"))
    assert cfg.license
    assert cfg.input_size == (3, 224, 224)
