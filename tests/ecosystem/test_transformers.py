"""transformers finds our models through timm's registry, and reads what we export."""

import pytest
import torch
from micro_models import NAMES
from timm.data import resolve_model_data_config

import ssmvision
from ssmvision.engine import export_folder

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")

CLASSES = ["cat", "dog", "eel"]


def images() -> torch.Tensor:
    return torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_backbones_give_our_feature_maps(name):
    indices = [0, 1, 2, 3]
    config = transformers.TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, out_indices=indices)
    backbone = transformers.TimmBackbone(config).eval()
    ours = ssmvision.create_model(name, features_only=True, out_indices=indices).eval()
    ours.load_state_dict(backbone._backbone.state_dict())
    with torch.no_grad():
        found, wanted = backbone(images()).feature_maps, ours(images())
    assert len(found) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_exported_folders_load_everywhere(name, tmp_path):
    torch.manual_seed(0)
    model = ssmvision.create_model(name, num_classes=len(CLASSES), in_chans=3).eval()
    folder = export_folder(model, tmp_path / "export", resolve_model_data_config(model), CLASSES)
    again = ssmvision.create_model(f"local-dir:{folder}", pretrained=True).eval()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    weights = theirs.timm_model.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        logits = model(images())
        assert torch.equal(again(images()), logits)
        # In memory of its own: read from a mapped file, weights are aligned otherwise, and sums round otherwise.
        theirs.timm_model.load_state_dict({key: value.clone() for key, value in weights.items()}, assign=True)
        assert torch.equal(theirs(images()).logits, logits)
