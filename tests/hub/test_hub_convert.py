import os

import pytest
import safetensors.torch
import torch
from hub_server import torch_bytes
from safetensors import safe_open

import ssmvision
from ssmvision.hub import file_sha256
from ssmvision_tools import convert_checkpoint


@pytest.fixture
def source(toy, tmp_path):
    checkpoint = {"model": toy.official_checkpoint(seed=1), "model_ema": toy.official_checkpoint(seed=2), "epoch": 9}
    (tmp_path / "official.pth").write_bytes(torch_bytes(checkpoint))
    return tmp_path / "official.pth"


@pytest.mark.parametrize(("options", "seed"), [([], 2), (["--use", "model"], 1), (["--use", "model_ema"], 2)])
def test_converts_what_was_asked_for(options, seed, toy, source, tmp_path, capsys):
    target = tmp_path / "ours.safetensors"
    assert convert_checkpoint.main(["toyssm_a", str(source), str(target), *options]) == 0
    assert torch.equal(
        safetensors.torch.load_file(target)["stem.weight"], toy.official_checkpoint(seed=seed)["patch.weight"]
    )
    ssmvision.create_model("toyssm_a", checkpoint_path=target)
    printed = capsys.readouterr().out
    assert f"sha256 {file_sha256(target)}" in printed
    assert "6 tensors" in printed
    with safe_open(target, "pt") as file:
        assert file.metadata()["source_sha256"] == file_sha256(source)


def test_other_class_counts(toy, tmp_path, capsys):
    (tmp_path / "five.pth").write_bytes(torch_bytes(toy.official_checkpoint(classes=5)))
    command = ["toyssm_a", str(tmp_path / "five.pth"), str(tmp_path / "five.safetensors")]
    assert convert_checkpoint.main(command) == 2
    assert "has 5 classes and toyssm_a was built with 7" in capsys.readouterr().err
    assert convert_checkpoint.main([*command, "--num-classes", "5"]) == 0


def test_inspect(source, capsys):
    assert convert_checkpoint.main(["--inspect", str(source)]) == 0
    printed = capsys.readouterr().out
    assert "model_ema: 6 entries, 6 of them tensors" in printed
    assert "epoch: 9" in printed
    assert "patch.weight (8, 3, 4, 4) float32" in printed


@pytest.mark.parametrize(
    ("model", "target", "message"),
    [
        ("toyssm_b", "out.safetensors", "does not fit toyssm_b, keys: 5 of another shape"),
        ("toyssm_c", "out.safetensors", "There is no model named 'toyssm_c'; did you mean toyssm_"),
        ("toyssm_a", "out.pth", "out.pth must end in .safetensors"),
        ("toyssm_a", "no/such/out.safetensors", "no/such is not a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_status_two(model, target, message, source, tmp_path, capsys):
    assert convert_checkpoint.main([model, str(source), str(tmp_path / target)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.incomplete")) + list(tmp_path.glob("out*"))


def test_arguments_are_needed(source):
    with pytest.raises(SystemExit) as caught:
        convert_checkpoint.main(["toyssm_a", str(source)])
    assert caught.value.code == 2


def test_a_failed_write_leaves_the_old_file(toy, source, tmp_path, monkeypatch):
    target = tmp_path / "ours.safetensors"
    target.write_bytes(b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    assert convert_checkpoint.main(["toyssm_a", str(source), str(target)]) == 2
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["official.pth", "ours.safetensors"]
