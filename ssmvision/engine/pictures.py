"""The two pictures of a run: its curves, and predictions beside their images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .checkpoint import atomic_write


def save_png(figure: Any, path: str | Path) -> None:
    """Writes a matplotlib figure, the whole file or nothing."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    atomic_write(path, lambda file: file.write(png.getvalue()))


def draw_curves(history: Sequence[dict[str, Any]], path: str | Path) -> bool:
    """Draws loss and accuracy over epochs into a PNG; returns False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    epochs = [row["epoch"] + 1 for row in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for name, label in (("train_loss", "training"), ("val_loss", "validation")):
        loss.plot(epochs, [row[name] for row in history], marker=".", label=label)
    for name, label in (("val_top1", "top-1"), ("val_top5", "top-5")):
        accuracy.plot(epochs, [row[name] for row in history], marker=".", label=label)
    for axes, title in ((loss, "loss"), (accuracy, "validation accuracy (%)")):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    save_png(figure, path)
    return True


def draw_predictions(
    images: Sequence[Image.Image], titles: Sequence[str], path: str | Path, wrong: Sequence[bool] = (), columns: int = 6
) -> bool:
    """Draws images with a title each into one PNG, titles of `wrong` ones in red; returns False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.1 * columns, 2.5 * rows), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    marks = list(wrong) or [False] * len(images)
    for axes, image, title, is_wrong in zip(grid, images, titles, marks, strict=False):
        axes.imshow(image.convert("RGB"))
        axes.set_title(title, fontsize=8, color="tab:red" if is_wrong else "black")
    save_png(figure, path)
    return True
