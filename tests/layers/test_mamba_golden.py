"""Golden cases of the Mamba family's layers, and what their checks notice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ssmvision.engine.verify import verify_case

PARITY = Path(__file__).parents[1] / "parity"
CASES = [
    "ssm_fscil_neck_ss2d",
    "ssm_fscil_neck_ssm",
    "ssm_hiss_mamba",
    "ssm_hiss_s4",
    "ssm_hydra_block",
    "ssm_mamba1_block",
    "ssm_mamba2_block",
    "ssm_mamba3_siso",
    "ssm_motionmamba_unet",
    "ssm_smamba",
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_official_code_is_matched(case, backend, monkeypatch):
    monkeypatch.setenv("SSMVISION_BACKEND", backend)
    result = verify_case(PARITY / case)
    assert {"output", "gradient"} <= set(result.worst)
    assert result.ok, str(result)


def edited(case, folder, edit_tensors=None, edit_weights=None, edit_meta=None):
    folder = Path(shutil.copytree(PARITY / case, folder / case))
    for name, edit in (("io", edit_tensors), ("ckpt", edit_weights)):
        if edit is not None:
            tensors = load_file(folder / f"{name}.safetensors")
            edit(tensors)
            save_file(tensors, folder / f"{name}.safetensors")
    if edit_meta is not None:
        meta = json.loads((folder / "meta.json").read_text())
        edit_meta(meta)
        (folder / "meta.json").write_text(json.dumps(meta))
    return verify_case(folder)


# Tensors beside outputs and gradients that a check must read: the case, and one of each.
FEATURES = [
    *[("ssm_fscil_neck_ssm", x) for x in ("main", "residual", "dts", "Bs_new", "sep_loss.Cs", "supp_novel")],
    ("ssm_fscil_neck_ss2d", "main"),
    ("ssm_hiss_mamba", "low_level_last"),
    ("ssm_hiss_s4", "low_level_last"),
    *[("ssm_mamba3_siso", x) for x in ("case0.final_Angle", "case1.final_SSM", "case1.final_K", "case0.final_V")],
    ("ssm_motionmamba_unet", "enc0.htm"),
    ("ssm_smamba", "layer0.output"),
]


@pytest.mark.parametrize(("case", "name"), FEATURES)
def test_every_tensor_of_a_case_is_compared(case, name, tmp_path):
    result = edited(case, tmp_path, lambda tensors: tensors[name].mul_(1.01))
    assert not result.ok
    assert not result.problem


@pytest.mark.parametrize("case", [case for case in CASES if case != "ssm_mamba3_siso"])
def test_missing_and_surplus_weights_are_named(case, tmp_path):
    def edit(weights):
        del weights[max(weights)]
        weights["teacher"] = torch.zeros(1)

    missing = max(load_file(PARITY / case / "ckpt.safetensors")).rpartition(".")[2]
    result = edited(case, tmp_path, edit_weights=edit)
    assert "teacher" in result.problem
    assert missing in result.problem


def test_arguments_that_are_not_built_are_named(tmp_path):
    result = edited("ssm_mamba1_block", tmp_path, edit_meta=lambda meta: meta["kwargs"].update(layers_of_cake=2))
    assert "layers_of_cake" in result.problem
    result = edited("ssm_hiss_mamba", tmp_path, edit_meta=lambda meta: meta["kwargs"]["hl"].update(type="LSTMNet"))
    assert "LSTMNet" in result.problem
