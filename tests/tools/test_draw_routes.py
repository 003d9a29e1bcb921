"""The picture of the scan orders."""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

pytest.importorskip("matplotlib")
from ssmvision.ops import routes  # noqa: E402
from tools import draw_routes  # noqa: E402


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("first.svg", "second.svg"):
        assert draw_routes.main(["--output", str(folder / name)]) == 0
    return folder


def structure(path):
    """Elements and texts, without coordinates: these may differ in their last digits between matplotlib versions."""
    elements = list(ElementTree.parse(path).iter())
    return [(e.tag.rpartition("}")[2], (e.text or "").strip()) for e in elements if "metadata" not in e.tag][:5000]


def texts(path):
    return [text for tag, text in structure(path) if tag == "text"]


def test_the_picture_is_the_same_every_time(drawn):
    assert (drawn / "first.svg").read_bytes() == (drawn / "second.svg").read_bytes()


def test_the_committed_picture_is_up_to_date(drawn):
    """If this fails: python tools/draw_routes.py"""
    assert texts(ROOT / "docs" / "routes.svg") == texts(drawn / "first.svg")


def test_every_order_is_drawn(drawn):
    public = {name for name, f in vars(routes).items() if getattr(f, "__module__", "") == routes.__name__}
    named = public - {"raster", "inverse", "insert"}  # one makes grids of any rank, the others are no orders
    calls = " ".join(texts(drawn / "first.svg"))
    assert not [name for name in named if not name.startswith("_") and f"{name}(" not in calls]


def test_panels_show_whole_routes():
    for _, route in draw_routes.panels().values():
        assert sorted(route.tolist()) == list(range(draw_routes.SIZE**2))
