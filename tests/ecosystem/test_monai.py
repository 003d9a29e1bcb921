"""MONAI's own check of a bundle, `verify_net_in_out`, on every segmenter and twin, by name and by class."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import verify_net_in_out

import ssmvision
from ssmvision.models._networks import family_of, list_networks, network_cfg

MICRO = [
    name for name in list_networks(["test_*"], [], []) if family_of(name).__name__.startswith("ssmvision.segmentation.")
]

_PLAN = {"features_per_stage": [8, 12], "kernel_sizes": [3, 3], "strides": [1, 2]}
_VSS = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "d_state": 4}
_PYRAMID = {"encoder": "test_vmamba"}

# Class → its own arguments of a micro network, size of the input.
CLASSES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "h_vmunet.HVMUNet": ({"dims": [4, 4, 8, 16, 32, 32], "depths": [1, 1, 1, 1], "d_state": 4}, (32, 64)),
    "lightm_unet.LightMUNet": ({"init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1], "d_state": 4}, (8, 8, 4)),
    "lkm_unet.LKMUNet": (_PLAN, (8, 12)),
    "nnmamba.NNMambaClassifier": ({"channels": 6, "blocks": 1}, (16, 16, 16)),
    "nnmamba.NNMambaSegmenter": ({"channels": 6, "blocks": 1, "reduction": 3}, (16, 16, 16)),
    "segmamba.SegMamba": (
        {"depths": [1] * 4, "feat_size": [8] * 4, "hidden_size": 8, "nslices": [8, 4, 2, 1]},
        (16, 16, 32),
    ),
    "swin_umamba.SwinUMamba": ({"features": [4, 8, 16, 32, 64], "depths": [1] * 4, "d_state": 4}, (64, 32)),
    "swin_umamba.SwinUMambaD": ({"features": [8, 16, 32, 64], "depths": [1] * 4, "d_state": 4}, (64, 32)),
    "ultralight_vm_unet.UltraLightVMUNet": ({"dims": [4, 8, 8, 16, 16, 16], "d_state": 4}, (32, 64)),
    "umamba.UMamba": (_PLAN | {"placement": "enc", "patch_size": [8, 4, 4]}, (8, 4, 4)),
    "unet.MixerUNet": ({"channels": [8, 12], "mixer": "ss3d"}, (7, 6, 5)),
    "unet.UNet2d": (_PYRAMID | {"decoder_channels": [8, 8, 8, 8, 8]}, (33, 40)),
    "upernet.UPerNet": (_PYRAMID | {"channels": 8}, (33, 40)),
    "vivim.Vivim": (
        {"dims": [8, 8, 16, 16], "depths": [1] * 4, "heads": [1, 1, 2, 2], "clip_depths": [1] * 4, "decoder_dim": 8},
        (5, 32, 32),
    ),
    "vm_unet.VMUNet": (_VSS | {"decoder_depths": [1] * 4}, (32, 64)),
    "vm_unet.VMUNetV2": (_VSS | {"mid_channel": 8, "dims": [16, 16, 32, 64]}, (32, 64)),
}


def _files(folder: Path, image: tuple[int, ...], classes: int, definition: dict[str, Any]) -> dict[str, str]:
    """The files of a bundle that define a network and say what goes in, (c, *size), and what comes out."""
    inputs, *size = image

    def tensor(count: int) -> dict[str, Any]:
        return {"num_channels": count, "spatial_shape": size, "dtype": "float32", "value_range": [0, 1]}

    metadata = {"network_data_format": {"inputs": {"image": tensor(inputs)}, "outputs": {"pred": tensor(classes)}}}
    config = {"network_def": {"spatial_dims": len(size), "in_channels": inputs, "out_channels": 5} | definition}
    files = {"meta_file": folder / "metadata.json", "config_file": folder / "inference.json"}
    for file, content in zip(files.values(), (metadata, config), strict=True):
        file.write_text(json.dumps(content))
    return {name: str(file) for name, file in files.items()}


def _named(name: str) -> dict[str, Any]:
    return {"_target_": "ssmvision.create_model", "model_name": name}


@pytest.mark.parametrize("name", MICRO)
def test_a_bundle_names_it(name: str, tmp_path: Path) -> None:
    files = _files(tmp_path, network_cfg(name).input_size, 5, _named(name))
    verify_net_in_out("network_def", device="cpu", **files)


@pytest.mark.parametrize("path", CLASSES)
def test_a_bundle_names_its_class(path: str, tmp_path: Path) -> None:
    arguments, size = CLASSES[path]
    files = _files(tmp_path, (3, *size), 5, {"_target_": f"ssmvision.segmentation.{path}"} | arguments)
    verify_net_in_out("network_def", device="cpu", **files)


def test_every_class_is_tried() -> None:
    found = {type(ssmvision.create_model(name, device="meta")) for name in MICRO}
    assert {f"{cls.__module__}.{cls.__name__}" for cls in found} == {
        f"ssmvision.segmentation.{path}" for path in CLASSES
    }


def test_a_bundle_that_promises_other_classes_is_told(tmp_path: Path) -> None:
    files = _files(tmp_path, (3, 64, 64), 4, _named("test_vm_unet"))
    with pytest.raises(ValueError, match="output channel number `5` doesn't match: `4`"):
        verify_net_in_out("network_def", device="cpu", **files)


@pytest.mark.slow
def test_the_command_line_says_so(tmp_path: Path) -> None:
    files = _files(tmp_path, (1, 8, 16, 16), 5, _named("test_umamba_enc"))
    options = [part for name, file in files.items() for part in (f"--{name}", file)]
    command = [sys.executable, "-m", "monai.bundle", "verify_net_in_out", "network_def", "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verified with no error" in done.stdout + done.stderr
