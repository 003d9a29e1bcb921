"""The pictures of kernels, spectra and mixing matrices."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

pytest.importorskip("matplotlib")
from ssmvision.engine.inspection.layer_pictures import PICTURES, write_picture  # noqa: E402
from ssmvision.engine.inspection.layer_pictures.panels import matrix, sheet  # noqa: E402
from tools import draw_kernels  # noqa: E402


def texts(path):
    """Titles and labels but numbers, whose choice may follow the last digits of what is drawn."""
    found = [e.text.strip() for e in ElementTree.parse(path).iter() if e.tag.endswith("}text") and e.text]
    return [text for text in found if any(c.isalpha() for c in text)]


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_the_committed_picture_is_up_to_date(name, tmp_path):
    """If this fails: python tools/draw_kernels.py"""
    assert texts(ROOT / "docs" / name) == texts(write_picture(name, tmp_path))


def test_a_picture_is_the_same_every_time_and_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    wanted = torch.randn(3)
    torch.manual_seed(5)
    for folder in ("first", "second"):
        assert draw_kernels.main(["one_framework.svg", "--output", str(tmp_path / folder)]) == 0
    assert torch.equal(torch.randn(3), wanted)
    assert len({(tmp_path / folder / "one_framework.svg").read_bytes() for folder in ("first", "second")}) == 1


def test_an_unknown_picture_is_named(capsys):
    with pytest.raises(SystemExit):
        draw_kernels.main(["layers/s6.svg"])
    assert "there is no picture 'layers/s6.svg'; known: layers/hippo.svg" in capsys.readouterr().err


def test_colours_follow_decades():
    figure, grid = sheet(1, 1, 2.0)
    axes = figure.add_subplot(grid[0])
    matrix(axes, torch.tensor([[1.0, -0.1], [0.01, 0.0]]), decades=2)
    shown = torch.as_tensor(axes.images[0].get_array())
    torch.testing.assert_close(shown, torch.tensor([[1, 0.5], [0, 0]]), check_dtype=False, rtol=0, atol=1e-6)
