"""Draw every scan order of `ssmvision.ops.routes` as one picture.

python tools/draw_routes.py                    write docs/routes.svg
python tools/draw_routes.py --output a.png     any format that matplotlib writes
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from torch import Tensor

from ssmvision.ops import routes

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "routes.svg"
LOCAL = ["w2", "w2_flip", "v", "h_flip"]
SIZE = 6  # the grids are SIZE x SIZE
COLORS = matplotlib.colors.LinearSegmentedColormap.from_list("path", ["#2c5c9e", "#8a5aa8", "#e0684b", "#f2b134"])
INK, FAINT = "#24292f", "#d8dee4"
SOLID: dict[str, Any] = {"linewidths": 2.2, "zorder": 2}
DASHED: dict[str, Any] = {"linewidths": 0.9, "alpha": 0.55, "linestyles": (0, (2.2, 1.8)), "zorder": 1}


def panels() -> dict[str, tuple[str, Tensor]]:
    """What is drawn: title -> (the call that makes it, the route)."""
    row, column = routes.row(SIZE, SIZE), routes.column(SIZE, SIZE)
    return {
        "row": ("row(h, w)", row),
        "column": ("column(h, w)", column),
        "row, reversed": ("reverse(row(h, w))", routes.reverse(row)),
        "column, reversed": ("reverse(column(h, w))", routes.reverse(column)),
        "serpentine": ("serpentine(h, w)", routes.serpentine(SIZE, SIZE)),
        "window": ("window(h, w, 3)", routes.window(SIZE, SIZE, 3)),
        "atrous": ("atrous(h, w, 2)", routes.atrous(SIZE, SIZE, 2)),
    }


def stacks() -> dict[str, tuple[str, Tensor, int]]:
    """Stacks of routes that run in one call: title -> (the call, the routes, width of the grid)."""
    return {
        "bidirectional": ("bidirectional(l)", routes.bidirectional(8), 8),
        "continuous": ("continuous(h, w)", routes.continuous(4, 4), 4),
        "cross": ("cross(h, w)", routes.cross(4, 4), 4),
        "local": (f"local(h, w, {LOCAL})", routes.local(4, 4, LOCAL), 4),
        "atrous cross": ("atrous_cross(h, w)", routes.atrous_cross(4, 4), 4),
    }


def draw() -> Figure:
    """One panel for each order, and one row of small panels for each stack."""
    figure = plt.figure(figsize=(10.4, 11.1))
    grid = figure.add_gridspec(5, 4, hspace=0.36, wspace=0.12, left=0.02, right=0.98, top=0.935, bottom=0.02,
                               height_ratios=[1, 1, 0.56, 0.56, 0.56])  # fmt: skip
    for i, (title, (call, route)) in enumerate(panels().items()):
        axes = figure.add_subplot(grid[i // 4, i % 4])
        _heading(axes, title, call)
        _path(axes, route, SIZE, SIZE)
    _legend(figure.add_subplot(grid[1, 3]))
    places = {
        "bidirectional": grid[2, :2].subgridspec(2, 1, hspace=0.05), "cross": grid[2, 2:].subgridspec(1, 4),
        "local": grid[3, :2].subgridspec(1, 4), "atrous cross": grid[3, 2:].subgridspec(1, 4),
        "continuous": grid[4, :2].subgridspec(1, 4),
    }  # fmt: skip
    for title, (call, stack, width) in stacks().items():
        for k, route in enumerate(stack):
            axes = figure.add_subplot(places[title][k])
            if k == 0:
                _heading(axes, title, call)
            height = (int(stack.max()) + 1) // width
            _path(axes, route, width, height, numbered=height == 1)  # small panels have no room
    return figure


def _heading(axes: Axes, title: str, call: str) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=17)
    axes.annotate(call, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8.5,
                  family="monospace", color="#57606a")  # fmt: skip


def _path(axes: Axes, route: Tensor, width: int, height: int, numbered: bool = True) -> None:
    """Tokens as numbered dots; solid lines to neighbours, bows over skipped tokens, dashes for jumps to other rows."""
    y, x = np.divmod(route.numpy(), width)
    points = np.stack([x, y], 1).astype(float)
    colors = COLORS(np.linspace(0, 1, len(points)))
    move = np.diff(points, axis=0)
    straight, skip = np.abs(move).sum(1) == 1, (np.abs(move).sum(1) == 2) & (move[:, 1] == 0)
    bow = np.where(skip, -0.3, 0.0)
    lines = [_curve(*ends, rise) for ends, rise in zip(pairwise(points), bow, strict=True)]
    for kind, style in ((straight, SOLID), (skip, SOLID | {"linewidths": 1.5}), (~straight & ~skip, DASHED)):
        chosen = np.flatnonzero(kind)
        axes.add_collection(LineCollection([lines[i] for i in chosen], colors=colors[1:][chosen], **style))
    heads = [_head(line, move[i], 1.0 if straight[i] or skip[i] else 0.75) for i, line in enumerate(lines)]
    axes.add_collection(PolyCollection(heads, facecolors=colors[1:], edgecolors="none", zorder=3))
    axes.scatter(points[:, 0], points[:, 1], s=22, c=colors, zorder=4, linewidths=0)
    axes.scatter(points[0, 0], points[0, 1], s=78, facecolor="white", edgecolor=colors[0], linewidths=2, zorder=3.5)
    axes.scatter(points[-1, 0], points[-1, 1], s=64, c=[colors[-1]], marker="s", zorder=3.5, linewidths=0)
    for step, (px, py) in enumerate(points if numbered else ()):
        axes.text(px + 0.45, py + 0.44, str(step), fontsize=5, color="#8c959f", ha="right", va="bottom")
    _frame(axes, width, height)


def _curve(start: np.ndarray, end: np.ndarray, height: float) -> np.ndarray:
    """From start to end along a parabola that rises by `height` in the middle."""
    t = np.linspace(0, 1, 9 if height else 3)[:, None]
    return start + t * (end - start) + np.array([0, height]) * 4 * t * (1 - t)


def _head(line: np.ndarray, move: np.ndarray, scale: float) -> np.ndarray:
    """A triangle in the middle of a line, pointing along the move."""
    toward = scale * move / np.hypot(*move)
    aside, middle = np.array([-toward[1], toward[0]]), line[len(line) // 2]
    back = middle - 0.11 * toward
    return np.stack([middle + 0.15 * toward, back + 0.12 * aside, back - 0.12 * aside])


def _frame(axes: Axes, width: int, height: int) -> None:
    for value in range(width + 1):
        axes.plot([value - 0.5] * 2, [-0.5, height - 0.5], color=FAINT, linewidth=0.7, zorder=0)
    for value in range(height + 1):
        axes.plot([-0.5, width - 0.5], [value - 0.5] * 2, color=FAINT, linewidth=0.7, zorder=0)
    axes.set(xlim=(-0.6, width - 0.4), ylim=(height - 0.4, -0.6), aspect="equal", anchor="NW")
    axes.axis("off")


def _legend(axes: Axes) -> None:
    axes.set(xlim=(0, 6), ylim=(6, 0), aspect="equal", anchor="NW")
    axes.axis("off")
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=COLORS, extent=(0.5, 5.5, 1.15, 0.85), aspect="equal")
    axes.text(0.5, 0.55, "first step", fontsize=8.5, color=INK)
    axes.text(5.5, 0.55, "last step", fontsize=8.5, color=INK, ha="right")
    rows = [(2.0, "start"), (2.8, "end"), (3.6, "step in a row or column"), (4.4, "jump")]
    axes.scatter(1, 2.0, s=78, facecolor="white", edgecolor=COLORS(0.0), linewidths=2)
    axes.scatter(1, 2.0, s=26, color=COLORS(0.0), linewidths=0)
    axes.scatter(1, 2.8, s=64, color=COLORS(1.0), marker="s", linewidths=0)
    axes.add_collection(LineCollection([[(0.5, 3.6), (1.5, 3.6)]], colors=[COLORS(0.6)], **SOLID))
    axes.add_collection(LineCollection([[(0.5, 4.4), (1.5, 4.4)]], colors=[COLORS(0.6)], **DASHED))
    axes.text(1, 5.2, "7", fontsize=6.5, color="#8c959f", va="center", ha="center")
    axes.text(2.0, 5.2, "number of the step", fontsize=8.5, color=INK, va="center")
    for y, text in rows:
        axes.text(2.0, y, text, fontsize=8.5, color=INK, va="center")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the picture; the same picture to the byte, whenever and wherever the same matplotlib runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--output", type=Path, default=PICTURE, help="file to write; its suffix says the format")
    output = parser.parse_args(argv).output
    with plt.rc_context({"svg.hashsalt": "ssmvision", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = draw()
        metadata = {"Date": None} if output.suffix == ".svg" else None
        figure.savefig(output, metadata=metadata, facecolor="white", dpi=150)
        plt.close(figure)
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
