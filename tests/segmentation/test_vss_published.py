"""Official segmenters of VSS blocks and light Mamba layers: golden cases, and every published configuration's keys."""

import json
import sys
from pathlib import Path

import pytest
import torch

import ssmvision
from ssmvision.engine.verify import verify_case

PARITY = Path(__file__).parents[1] / "parity"
MANIFESTS = Path(__file__).parents[1] / "manifests" / "segmentation"

CASES = [
    "h_vmunet", "lightm_unet_2d", "lightm_unet_3d", "swin_umamba", "swin_umamba_d", "ultralight_vm_unet", "vivim",
    "vm_unet", "vm_unet_v2",
]  # fmt: skip

# Manifest → our name.
NAMES = {
    "h_vmunet": "h_vmunet",
    "lightm_unet_lits_3d": "lightm_unet_3d",
    "lightm_unet_xray_2d": "lightm_unet_2d",
    "swin_umamba_abdomenmr": "swin_umamba",
    "swin_umamba_d_abdomenmr": "swin_umamba_d",
    "swin_umamba_d_endoscopy": "swin_umamba_d_endoscopy",
    "swin_umamba_d_microscopy": "swin_umamba_d_microscopy",
    "swin_umamba_endoscopy": "swin_umamba_endoscopy",
    "swin_umamba_microscopy": "swin_umamba_microscopy",
    "ultralight_vm_unet": "ultralight_vm_unet",
    "vivim_b3": "vivim_b3",
    "vm_unet_d2222": "vm_unet",
    "vm_unet_d2292": "vm_unet_d2292",
    "vm_unet_v2": "vm_unet_v2",
}


@pytest.mark.parametrize("case", CASES)
def test_official_code_is_matched(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMVISION_BACKEND", "cpu")
    result = verify_case(PARITY / case)
    assert set(result.worst) == {"output", "feature", "gradient"}, str(result)
    assert result.ok, str(result)


@pytest.mark.parametrize("manifest", sorted(NAMES))
def test_checkpoint_fits_strictly(manifest: str) -> None:
    content = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    official = {key: torch.empty(shape, device="meta") for key, shape in content["state_dict"].items()}
    model = ssmvision.create_model(NAMES[manifest], device="meta")
    convert, ours = sys.modules[type(model).__module__].checkpoint_filter_fn, model.state_dict()
    converted = convert(official, model)
    assert {key: v.shape for key, v in converted.items()} == {key: v.shape for key, v in ours.items()}
    assert sum(p.numel() for p in model.parameters()) == content["params_total"]
    assert convert(ours, model) == ours, "our own keys must pass unchanged"
