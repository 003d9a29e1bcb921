"""The pictures of docs/: kernels, spectra and mixing matrices of real layers as they are initialized."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from .maps import draw_convs5, draw_hierarchical, draw_two_d
from .matrices import draw_mamba, draw_one_framework
from .spectra import draw_hippo, draw_s4, draw_s5

__all__ = ["PICTURES", "write_picture"]

# Path below docs/ -> what draws it.
PICTURES: dict[str, Callable[[], Figure]] = {
    "layers/hippo.svg": draw_hippo,
    "layers/s4.svg": draw_s4,
    "layers/s5.svg": draw_s5,
    "layers/mamba.svg": draw_mamba,
    "layers/two_d.svg": draw_two_d,
    "layers/convs5.svg": draw_convs5,
    "layers/hierarchical.svg": draw_hierarchical,
    "one_framework.svg": draw_one_framework,
}


def write_picture(name: str, folder: Path) -> Path:
    """Draw one of `PICTURES` below a folder; the same to the byte wherever the same torch and matplotlib run."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    style: dict[Any, Any] = {
        "svg.hashsalt": "ssmvision",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "path.simplify": True,
    }
    with plt.rc_context(style), torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        drawn = io.StringIO()
        PICTURES[name]().savefig(drawn, format="svg", metadata={"Date": None}, facecolor="white", dpi=72)
    # Coordinates to a hundredth of a point: half of the file is digits beyond that.
    path.write_text(re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", drawn.getvalue()), encoding="utf-8")
    return path
