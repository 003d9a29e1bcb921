"""`checkpoint_path=`: what fits is loaded, what does not is refused with both sides named."""

import pytest
import safetensors.torch
import torch
from hub_server import torch_bytes

import ssmvision
from ssmvision.hub import CheckpointError


@pytest.fixture
def save(tmp_path):
    def write(value, name="w.pth"):
        (tmp_path / name).write_bytes(torch_bytes(value))
        return tmp_path / name

    return write


def test_official_and_own_names_give_the_same_model(toy, save, tmp_path):
    official = toy.official_checkpoint()
    model = ssmvision.create_model("toyssm_a", checkpoint_path=save({"model": official}))
    assert torch.equal(model.stem.weight, official["patch.weight"])
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    again = ssmvision.create_model("toyssm_a", checkpoint_path=str(tmp_path / "w.safetensors"))
    assert torch.equal(again.head.weight, official["fc.weight"])


def _without(key):
    return lambda weights: {name: value for name, value in weights.items() if name != key}


MISFITS = {
    "missing": (_without("trunk.bias"), r"w\.pth does not fit toyssm_a, keys: 1 missing \(body\.bias\)\."),
    "surplus": (lambda w: dict(w, **{"fc.extra": w["fc.bias"]}), r"keys: 1 surplus \(head\.extra\)"),
    "shape": (
        lambda w: dict(w, **{"trunk.bias": torch.zeros(3)}),
        r"1 of another shape \(body\.bias \(3,\) instead of",
    ),
    "no head": (_without("fc.weight"), r"1 missing \(head\.weight\)"),
    "unknown names": (
        lambda w: {"patch.weight": w["patch.weight"], "neck.weight": w["fc.weight"]},
        r"does not fit toyssm_a, keys: 6 missing .*2 surplus \(patch\.weight, neck\.weight\)",
    ),
    "another architecture": (
        lambda w: {f"layers.{i}.weight": torch.zeros(1) for i in range(30)},
        r"6 missing \(stem\.weight, .*, \.\.\.\), 30 surplus \(layers\.0\.weight, .*\.\.\.\)",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_name_both_sides(name, toy, save):
    change, message = MISFITS[name]
    with pytest.raises(CheckpointError, match=message):
        ssmvision.create_model("toyssm_a", checkpoint_path=save(change(toy.official_checkpoint())))


def test_another_class_count_says_how_to_ask_for_a_new_head(toy, save):
    path = save(toy.official_checkpoint(classes=4))
    with pytest.raises(
        CheckpointError, match=r"has 4 classes and toyssm_a was built with 7: build it with num_classes=4"
    ):
        ssmvision.create_model("toyssm_a", checkpoint_path=path)
    overlay = {"file": str(path), "num_classes": 4}
    ssmvision.create_model("toyssm_a", pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    assert ssmvision.create_model("toyssm_a", checkpoint_path=path, num_classes=4).head.out_features == 4


def test_features_only_names_the_other_way(toy, save):
    path = save(toy.official_checkpoint())
    with pytest.raises(ValueError, match=r"pretrained=True and pretrained_cfg_overlay=dict\(file='.*w\.pth'\)"):
        ssmvision.create_model("toyssm_a", checkpoint_path=path, features_only=True)


def test_timm_models_load_strictly_too(save):
    state = ssmvision.create_model("test_vit").state_dict()
    ssmvision.create_model("test_vit", checkpoint_path=save({"state_dict": state}))
    state.pop("cls_token")
    with pytest.raises(CheckpointError, match=r"does not fit test_vit, keys: 1 missing \(cls_token\)"):
        ssmvision.create_model("test_vit", checkpoint_path=save({"state_dict": state}))
