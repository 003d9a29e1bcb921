"""Verification of what is no whole network: operators through the tool, and failures that must show."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ssmvision.engine.verify import verify_case
from ssmvision.engine.verify.compare import compare

PARITY = Path(__file__).parents[1] / "parity"


@pytest.mark.parametrize("case", ["ssm_selective_scan", "ssm_ssd", "ssm_linear_scan_resets", "ssm_2d_selective_scan"])
def test_operators_are_verified(case):
    result = verify_case(PARITY / case)
    assert result.ok, str(result)
    assert set(result.worst) == {"output", "gradient"}


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("ssm_s4_block", "layer.kernel.C"),
        ("ssm_s4_dplr", "legt.P"),
        ("ssm_s4nd", "kernel.1.A_imag"),
        ("ssm_s5_resets", "params/layers_1/seq/Lambda_re"),
        ("ssm_spacetime_companion", "closed_loop.k"),
        ("ssm_2dssm", "A.A_3"),
    ],
)
def test_a_wrong_weight_fails(case, key, tmp_path):
    folder = Path(shutil.copytree(PARITY / case, tmp_path / case))
    weights = safetensors.torch.load_file(folder / "ckpt.safetensors")
    weights[key] *= 1.1
    safetensors.torch.save_file(weights, folder / "ckpt.safetensors")
    assert not verify_case(folder).ok


@pytest.mark.parametrize("case", ["ssm_s4_block", "ssm_s5_zoh", "ssm_2dssm_complex"])
def test_a_superfluous_weight_or_option_fails(case, tmp_path):
    folder = Path(shutil.copytree(PARITY / case, tmp_path / case))
    weights = safetensors.torch.load_file(folder / "ckpt.safetensors")
    safetensors.torch.save_file({**weights, "extra": torch.zeros(1)}, folder / "ckpt.safetensors")
    assert "extra" in verify_case(folder).problem
    meta = json.loads((folder / "meta.json").read_text())
    meta["kwargs"]["frobnicate"] = True
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "frobnicate" in verify_case(folder).problem


def test_float32_tensors_are_known_to_their_rounding_alone():
    meta = {"tolerance": {"rtol": 1e-12, "atol": 1e-14}}
    exact = torch.tensor([1 / 3, 1e-3], dtype=torch.float64)
    assert compare("", {"output": exact}, {"output": exact.float()}, meta).ok
    assert not compare("", {"output": exact}, {"output": exact.float().double()}, meta).ok
    assert not compare("", {"output": exact * (1 + 1e-5)}, {"output": exact.float()}, meta).ok
