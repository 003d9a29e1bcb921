"""The regimes of tokens, as a table, a file and a plot."""

import csv
import sys

import pytest
import torch
from PIL import Image

pytest.importorskip("matplotlib")
from ssmvision.engine import export_folder
from ssmvision.engine.inspection.diagnose import REGIMES, diagnose_model, draw
from tools import diagnose as tool
from tools import visualize

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
        (["{photo}", "--model", "test_vssd"], "VSSD has no selective scan, whose tokens could be followed."),
        (["{text}", "--model", "test_vim"], "1 of 1 files are no images that can be read:\n  {text}: not an image"),
        (["{photo}", "--model", "test_vim", "--max-images", "0"], "--max-images must be at least 1, not 0."),
    ],
)
def test_errors_are_one_sentence(arguments, message, complaint):
    assert message in complaint(tool, arguments)


@pytest.mark.parametrize("drawing", [tool, visualize])
def test_what_is_missing_is_named(drawing, complaint, monkeypatch):
    for name in [*sys.modules]:
        if name.startswith(
            ("matplotlib", "ssmvision.engine.inspection.diagnose", "ssmvision.engine.inspection.visualize")
        ):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "Pictures need matplotlib: pip install 'ssmvision[train]'." in complaint(drawing, ["{photo}"])
