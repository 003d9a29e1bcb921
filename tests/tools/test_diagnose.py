"""The regimes of tokens, as a table, a file and a plot."""

import csv
import sys

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
from ssmvision.engine import export_folder
from ssmvision.engine.inspection.diagnose import REGIMES, diagnose_model, draw
from ssmvision.engine.inspection.inputs import _read_volume
from tools import diagnose as tool
from tools import predict, visualize

SMALL = ["--model", "test_vim", "--img-size", "32"]


def diagnosed(photo, output, *arguments):
    assert tool.main([str(photo), *arguments, "--output", str(output)]) == 0
    (table,) = output.glob("*_tokens.csv")
    (picture,) = output.glob("*_tokens.png")
    with Image.open(picture) as image:
        assert len(image.convert("L").getcolors()) > 50, "an empty picture"
    return list(csv.DictReader(table.open()))


def test_a_model_forced_to_converge_is_told_from_another(photo, tmp_path, capsys):
    torch.manual_seed(0)
    free = diagnosed(photo, tmp_path / "free", *SMALL)
    printed = capsys.readouterr().out
    assert "layers.3.mixer" in printed
    assert "8 scans: " in printed
    assert [(row["layer"], row["route"]) for row in free] == [(f"layers.{i}.mixer", k) for i in range(4) for k in "01"]
    assert all(float(row["mu_min"]) < 0 < float(row["mu_max"]) for row in free)
    # What is not forced may come to rest by chance.
    assert sum(row["regime"] == "fast divergent" for row in free) >= 6
    forced = diagnosed(photo, tmp_path / "forced", *SMALL, "--model-kwargs", "input_output=negative")
    assert "8 scans: 8 convergent, 0 slowly divergent, 0 fast divergent" in capsys.readouterr().out
    assert {row["regime"] for row in forced} == {"convergent"}
    assert {float(row["mu_max"]) for row in forced} == {0}
    assert {float(row["negative"]) for row in forced} == {1}


def test_exported_folders_say_how_they_are_constrained(photo, tmp_path):
    from ssmvision import create_model

    torch.manual_seed(0)
    model = create_model("test_vim", img_size=32, input_output="negative")
    export_folder(model, tmp_path / "export", {"input_size": (3, 32, 32)})
    rows = diagnosed(photo, tmp_path / "out", "--model", str(tmp_path / "export"))
    assert {row["regime"] for row in rows} == {"convergent"}


def test_images_are_counted_up_to_the_limit(photo, tmp_path, capsys):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(photo.read_bytes())
    torch.manual_seed(0)
    rows = diagnosed(tmp_path, tmp_path / "out", *SMALL, "--max-images", "2")
    assert {float(row["agree"]) for row in rows} <= {0.5, 1}


@pytest.mark.parametrize(
    ("shown", "model", "layer"),
    [
        ("photo", ["test_umamba_bot"], "mamba_layer.mamba"),
        ("photo", ["test_vm_unet", "--input-size", "3", "32", "32"], "layers.0.blocks.0.op"),
        ("volume", ["test_umamba_enc"], "encoder.mamba_layers.0.mamba"),
        ("frames", ["test_vivim"], "stages.0.0.mamba"),
        ("frames", ["test_videomamba_video", "--num-frames", "4", "--img-size", "32"], "layers.0.mixer"),
    ],
)
def test_segmenters_and_models_of_video_are_diagnosed(shown, model, layer, tmp_path, request):
    torch.manual_seed(0)
    rows = diagnosed(request.getfixturevalue(shown), tmp_path / "out", "--model", *model)
    assert rows[0]["layer"] == layer
    assert all(float(row["mu_min"]) < 0 < float(row["mu_max"]) and float(row["agree"]) > 0 for row in rows)


def test_noise_needs_no_files(tmp_path):
    assert len(diagnosed("random", tmp_path / "out", "--model", "test_segmamba")) == 12


def test_volumes_are_standardized_around_their_centre(volume):
    whole = _read_volume(str(volume), (1, 20, 24, 28))
    assert whole.mean().abs() < 1e-5
    assert whole.std() == pytest.approx(1, abs=1e-3)
    assert torch.equal(_read_volume(str(volume), (1, 16, 24, 10)), whole[:, 2:18, :, 9:19])
    padded = _read_volume(str(volume), (1, 24, 24, 28))
    assert torch.equal(padded[:, 2:22], whole)
    assert (padded[:, :2] == whole.min()).all()


def test_regimes_have_their_colours():
    from ssmvision import create_model

    torch.manual_seed(0)
    model = create_model("test_vim", img_size=32, input_output="negative")
    figure = draw(diagnose_model(model, torch.randn(1, 3, 32, 32)), "title")
    curves = figure.axes[0].lines
    key = {line.get_label(): line.get_color() for line in curves if line.get_label() in REGIMES}
    assert {line.get_color() for line in curves[:8]} == {key["convergent"]}
    assert len(set(key.values())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photo}", "--model", "test_vssd"], "tokens could be followed: it runs no scan at all."),
        (["{text}", "--model", "test_vim"], "1 of 1 files are no images that can be read:\n  {text}: not an image"),
        (["{photo}", "--model", "test_vim", "--max-images", "0"], "--max-images must be at least 1, not 0."),
        (["{photo}", "--model", "test_umamba_enc"], "The model takes 8 images as frames or slices, not 1."),
        (["{volume}", "--model", "test_umamba_enc"], "{volume} cannot be read: "),
        (["random", "--model", "test_segmamba_nossm"], "SegMamba has no selective scan, whose tokens"),
        (["random", "--model", "test_segmamba", "--input-size", "1", "16", "20"], "needs sides that are mult"),
        (["random", "--model", "test_convs5"], "test_convs5 predicts video: it has neither selective scans to follow"),
        (["random", "--model", "unet_vmamba_tiny"], "unet_vmamba_tiny has no input size of its own: say --input-size"),
    ],
)
def test_errors_are_one_sentence(arguments, message, complaint):
    assert message in complaint(tool, arguments)


def test_tools_for_classifiers_say_so(complaint):
    wanted = "test_umamba_enc is no classifier of images, the only models that this tool can use."
    assert wanted in complaint(predict, ["{photo}", "--model", "test_umamba_enc"])


def test_a_volume_of_another_kind_is_told_from_what_the_model_takes(volume, complaint):
    wanted = "is (1, 20, 24, 28), channels first, but the model takes (3, 160, 160)."
    assert wanted in complaint(tool, [str(volume), "--model", "test_vim"])


@pytest.mark.parametrize("drawing", [tool, visualize])
def test_what_is_missing_is_named(drawing, complaint, monkeypatch):
    for name in [*sys.modules]:
        if name.startswith(
            ("matplotlib", "ssmvision.engine.inspection.diagnose", "ssmvision.engine.inspection.visualize")
        ):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "Pictures need matplotlib: pip install 'ssmvision[train]'." in complaint(drawing, ["{photo}"])
