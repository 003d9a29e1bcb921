"""Golden cases from the official code: outputs, features and gradients, through the tool that users have."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ssmvision.engine.verify import verify_case
from ssmvision_tools import verify

PARITY = Path(__file__).parents[1] / "parity"
CASES = [
    "efficientvmamba",
    "groupmamba",
    "localvim_midcls",
    "localvim_rope",
    "localvmamba",
    "mambar",
    "mambavision",
    "mambavision_ls",
    "medmamba",
    "mlla",
    "msvmamba",
    "plainmamba",
    "spatialmamba",
    "videomamba_image",
    "videomamba_image_distill",
    "videomamba_video",
    "videomamba_video_pretrain",
    "vim_headcls_ln",
    "vim_midcls",
    "vim_midcls_stride8",
    "vim_nocls_meanpool",
    "vmamba_m0",
    "vmamba_v0",
    "vmamba_v05_backbone",
    "vmamba_v05_s1",
    "vmamba_v05_s2",
    "vssd",
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_official_code_is_matched(case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMVISION_BACKEND", backend)
    result = verify_case(PARITY / case)
    assert set(result.worst) == {"output", "feature", "gradient"}
    assert result.ok, str(result)


def _copy(case: str, folder: Path) -> Path:
    return Path(shutil.copytree(PARITY / case, folder / case))


def _edit_weights(case: Path, edit) -> None:
    weights = safetensors.torch.load_file(case / "ckpt.safetensors")
    edit(weights)
    safetensors.torch.save_file(weights, case / "ckpt.safetensors")


@pytest.mark.parametrize("key", ["layers.1.blocks.0.op.dt_projs_bias", "patch_embed.7.bias", "classifier.norm.weight"])
def test_a_wrong_weight_fails(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = _copy("vmamba_v05_s1", tmp_path)
    _edit_weights(case, lambda weights: weights[key].mul_(1.01))
    assert verify.main([str(case)]) == 1
    assert "vmamba_v05_s1 FAIL" in capsys.readouterr().out


def test_missing_and_surplus_keys_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = _copy("vim_midcls", tmp_path)

    def edit(weights: dict[str, torch.Tensor]) -> None:
        del weights["layers.0.mixer.D_b"]
        weights["teacher.weight"] = torch.zeros(1)

    _edit_weights(case, edit)
    assert verify.main([str(case)]) == 1
    out = capsys.readouterr().out
    assert "layers.0.mixer.D_b" in out
    assert "teacher.weight" in out


def test_a_feature_of_the_wrong_module_fails(tmp_path: Path) -> None:
    case = _copy("vmamba_v0", tmp_path)
    meta = json.loads((case / "meta.json").read_text())
    meta["feats"][1] = "layers.1.blocks.0"
    (case / "meta.json").write_text(json.dumps(meta))
    assert not verify_case(case).ok


@pytest.mark.parametrize(
    ("case", "key", "value"), [("videomamba_video_pretrain", "grad_input", 1e-6), ("vim_midcls", "grad_input", 1e-12)]
)
def test_gradients_vanish_where_the_official_ones_do(case: str, key: str, value: float, tmp_path: Path) -> None:
    case = _copy(case, tmp_path)
    tensors = safetensors.torch.load_file(case / "io.safetensors")
    tensors[key].fill_(value)
    safetensors.torch.save_file(tensors, case / "io.safetensors")
    result = verify_case(case)
    assert not result.ok
    assert result.worst["gradient"][1] == key


def test_several_cases_print_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(PARITY / "vim_headcls_ln"), str(PARITY / "vmamba_v0")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["vim_headcls_ln", "ok"], ["vmamba_v0", "ok"]]


def test_a_folder_that_is_no_case_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(tmp_path), str(PARITY / "vim_headcls_ln")]) == 2
    captured = capsys.readouterr()
    assert "is not a case" in captured.err
    assert "vim_headcls_ln ok" in captured.out
