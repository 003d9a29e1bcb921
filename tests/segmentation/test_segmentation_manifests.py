"""Every published configuration by its key → shape manifest: names, shapes and parameter counts of our networks."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ssmvision

MANIFESTS = Path(__file__).parents[1] / "manifests" / "segmentation"

# Manifest → our name. Those that the authors trained first, or only, have the short names.
NAMES = {
    "h_vmunet": "h_vmunet",
    "lightm_unet_lits_3d": "lightm_unet_3d",
    "lightm_unet_xray_2d": "lightm_unet_2d",
    "lkm_unet_abdomenct_3d": "lkm_unet_3d",
    "lkm_unet_abdomenmr_2d": "lkm_unet_2d",
    "nnmamba_cls": "nnmamba_cls",
    "nnmamba_seg": "nnmamba_seg",
    "segmamba_brats2023": "segmamba",
    "swin_umamba_abdomenmr": "swin_umamba",
    "swin_umamba_d_abdomenmr": "swin_umamba_d",
    "swin_umamba_d_endoscopy": "swin_umamba_d_endoscopy",
    "swin_umamba_d_microscopy": "swin_umamba_d_microscopy",
    "swin_umamba_endoscopy": "swin_umamba_endoscopy",
    "swin_umamba_microscopy": "swin_umamba_microscopy",
    "ultralight_vm_unet": "ultralight_vm_unet",
    "umamba_bot_abdomenct_3d": "umamba_bot_3d",
    "umamba_bot_abdomenmr_2d": "umamba_bot_2d",
    "umamba_bot_abdomenmr_3d": "umamba_bot_3d_abdomenmr",
    "umamba_bot_endoscopy_2d": "umamba_bot_2d_endoscopy",
    "umamba_bot_microscopy_2d": "umamba_bot_2d_microscopy",
    "umamba_enc_abdomenct_3d": "umamba_enc_3d",
    "umamba_enc_abdomenmr_2d": "umamba_enc_2d",
    "umamba_enc_abdomenmr_3d": "umamba_enc_3d_abdomenmr",
    "umamba_enc_endoscopy_2d": "umamba_enc_2d_endoscopy",
    "umamba_enc_microscopy_2d": "umamba_enc_2d_microscopy",
    "vivim_b3": "vivim_b3",
    "vm_unet_d2222": "vm_unet",
    "vm_unet_d2292": "vm_unet_d2292",
    "vm_unet_v2": "vm_unet_v2",
}


def _official(manifest: str) -> tuple[dict[str, Tensor], int]:
    content = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, shape in content["state_dict"].items()}
    return tensors, content["params_total"]


def _filter(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return sys.modules[type(model).__module__].checkpoint_filter_fn(state_dict, model)


def _shapes(state_dict: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state_dict.items()}


@pytest.mark.parametrize("manifest", sorted(NAMES))
def test_checkpoint_fits_strictly(manifest: str) -> None:
    official, parameters = _official(manifest)
    model = ssmvision.create_model(NAMES[manifest], device="meta")
    ours = model.state_dict()
    converted = _filter(official, model)
    assert _shapes(converted) == _shapes(ours)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert _filter(ours, model) == ours, "our own keys must pass unchanged"


@pytest.mark.parametrize("manifest", sorted(NAMES))
def test_one_copy_of_every_tensor_is_enough(manifest: str) -> None:
    official, _ = _official(manifest)
    model = ssmvision.create_model(NAMES[manifest], device="meta")
    copies: dict[str, list[str]] = {}
    for key, value in official.items():
        copies.setdefault(next(iter(_filter({key: value}, model))), []).append(key)
    for pick in (min, max):
        alone = {key: official[key] for key in (pick(keys, key=len) for keys in copies.values())}
        assert _shapes(_filter(alone, model)) == _shapes(model.state_dict())
    # Whatever the order in the file, the original is preferred: the shortest name, the first of equally long ones.
    backwards = _filter(dict(reversed(official.items())), model)
    assert all(backwards[name] is official[min(keys, key=lambda key: (len(key), key))] for name, keys in copies.items())


def test_every_manifest_has_a_network() -> None:
    assert sorted(path.stem for path in MANIFESTS.glob("*.json")) == sorted(NAMES)


def test_heads_of_another_copy_of_nnmamba_are_left_out() -> None:
    model = ssmvision.create_model("test_nnmamba_seg")
    surplus = {"ds1_cls_conv.weight": torch.zeros(3, 8, 1, 1, 1), "ds1_cls_conv.bias": torch.zeros(3)}
    assert _filter(model.state_dict() | surplus, model).keys() == model.state_dict().keys()
