"""What the pictures share: their look, and panels of lines, eigenvalues and matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

INK, SOFT, FAINT = "#24292f", "#57606a", "#d8dee4"
LINES = ["#2c5c9e", "#e0684b", "#4d9a6a", "#8a5aa8", "#f2b134", "#3aa6b9", "#b0526e", "#7a8794"]
HEAT = matplotlib.colors.LinearSegmentedColormap.from_list(
    "heat", ["#ffffff", "#c9d8ec", "#7fa3d1", "#2c5c9e", "#8a5aa8", "#e0684b", "#f2b134"]
)
SIGNED = matplotlib.colors.LinearSegmentedColormap.from_list("signed", ["#2c5c9e", "#ffffff", "#e0684b"])


def sheet(rows: int, columns: int, height: float, **grid: Any) -> tuple[Figure, Any]:
    """A figure as wide as all others, and its grid of panels."""
    figure = Figure(figsize=(10.4, height))
    space = {"left": 0.055, "right": 0.985, "top": 1 - 0.45 / height, "bottom": 0.42 / height}
    return figure, figure.add_gridspec(rows, columns, **{"hspace": 0.55, "wspace": 0.28, **space, **grid})


def heading(axes: Axes, title: str, below: str = "") -> None:
    """A title, and under it in small letters the code that is drawn."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=16 if below else 6)
    if below:
        axes.annotate(below, (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=7.5,
                      family="monospace", color=SOFT)  # fmt: skip


def plain(axes: Axes, xlabel: str = "", ylabel: str = "") -> None:
    """Quiet axes with labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8c959f")
    axes.tick_params(labelsize=7.5, colors=SOFT, length=2.5)
    axes.set_xlabel(xlabel, fontsize=8, color=SOFT, labelpad=2)
    axes.set_ylabel(ylabel, fontsize=8, color=SOFT, labelpad=2)


def lines(axes: Axes, x: Tensor, curves: Mapping[str, Tensor], width: float = 1.3) -> None:
    """Curves over x, one colour each; names that are empty or start with "_" are not in the legend."""
    for color, (name, y) in zip(LINES, curves.items(), strict=False):
        axes.plot(x.numpy(), y.numpy(), color=color, linewidth=width, label=name)
    if any(name and name[0] != "_" for name in curves):
        axes.legend(fontsize=7.5, frameon=False, labelcolor=INK, handlelength=1.4, borderaxespad=0.2)


def unit_circle(axes: Axes) -> None:
    """Where discrete eigenvalues are stable: inside."""
    turn = np.linspace(0, 2 * np.pi, 100)
    axes.plot(np.cos(turn), np.sin(turn), color=FAINT, linewidth=1.2, zorder=0)
    axes.axhline(0, color=FAINT, linewidth=0.7, zorder=0)
    axes.axvline(0, color=FAINT, linewidth=0.7, zorder=0)
    axes.set_aspect("equal")


def matrix(axes: Axes, values: Tensor, decades: float = 3.0) -> None:
    """|values| on a logarithmic scale of so many decades below the largest; exact zeros and less stay white."""
    size = values.abs() / values.abs().max().clamp(min=1e-30)
    shown = (size.clamp(min=10**-decades).log10() / decades + 1).numpy()
    axes.imshow(shown, cmap=HEAT, vmin=0, vmax=1, interpolation="none")
    bare(axes)


def bare(axes: Axes) -> None:
    """A frame without ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#8c959f")
        spine.set_linewidth(0.6)


def scale_of(figure: Figure, place: Sequence[float], decades: float, label: str) -> None:
    """The legend of `matrix`."""
    axes = figure.add_axes((place[0], place[1], place[2], place[3]))
    axes.imshow(np.linspace(0, 1, 128)[None], cmap=HEAT, aspect="auto", extent=(-decades, 0, 0, 1))
    axes.set_yticks([])
    axes.set_xticks(range(-int(decades), 1), [f"1e{k}" if k else "1" for k in range(-int(decades), 1)])
    axes.tick_params(labelsize=7, colors=SOFT, length=2)
    axes.set_title(label, fontsize=7.5, color=SOFT, loc="left", pad=3)
