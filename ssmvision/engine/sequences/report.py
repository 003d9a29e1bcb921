"""What a comparison found, as a table and as a picture, from the lines of results.csv and noise.csv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssmvision.engine.pictures import save_png

Line = dict[str, Any]


def table(lines: Sequence[Line], noise_lines: Sequence[Line], metric: str) -> str:
    """The final scores of each row as Markdown: the mean over seeds at the learning rate that is best for the row.

    Noise is tried on fewer sequences: the score without it, at the mode that is worst for the row, and at the one that
    is worst for the first row.
    """
    head = ["row", "parameters", "lr", metric, "of each seed", "seconds"]
    noisy = _noise_columns(lines, noise_lines, metric) if noise_lines else {}
    if noisy:
        first = next(iter(noisy))
        head += ["without noise", "worst mode", "drop", f"worst mode of {first}", "drop"]
    found = [
        [row, str(final[0]["parameters"]), f"{final[0]['lr']:g}", _number(_mean(final)),
         ", ".join(_number(line["score"]) for line in final), f"{sum(line['seconds'] for line in final):.0f}",
         *noisy.get(row, [])]
        for row, final in _best(lines, metric).items()
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *found])


def draw(lines: Sequence[Line], noise_lines: Sequence[Line], metric: str, path: Path) -> bool:
    """Draws loss and score over epochs, and the score over frequencies; returns False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(15 if noise_lines else 10, 4), layout="constrained")
    panels = [("epoch", "train_loss", lines, "training loss"), ("epoch", "score", lines, f"validation {metric}")]
    if noise_lines:
        panels.append(("mode", "score", noise_lines, f"{metric} over the frequency of the noise"))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    chosen = {row: final[0]["lr"] for row, final in _best(lines, metric).items()}
    for panel, (x, y, source, title) in zip(axes, panels, strict=True):
        for row, lr in chosen.items():
            at = _by(x, [line for line in source if (line["row"], line["lr"]) == (row, lr)])
            panel.plot(list(at), [_mean(group, y) for group in at.values()], marker=".", label=row)
        panel.set(title=title, xlabel=x)
        panel.grid(alpha=0.3)
        panel.legend()
    save_png(figure, path)
    return True


def _best(lines: Sequence[Line], metric: str) -> dict[str, list[Line]]:
    """Of each row the last epochs of its seeds, at the best of its learning rates."""
    better: Callable[..., list[Line]] = max if metric == "accuracy" else min
    last = max(line["epoch"] for line in lines)
    rows = _by("row", [line for line in lines if line["epoch"] == last])
    return {row: better(_by("lr", final).values(), key=_mean) for row, final in rows.items()}


def _noise_columns(lines: Sequence[Line], noise_lines: Sequence[Line], metric: str) -> dict[str, list[str]]:
    means: dict[str, dict[int, float]] = {}
    for row, final in _best(lines, metric).items():
        own = [line for line in noise_lines if (line["row"], line["lr"]) == (row, final[0]["lr"])]
        means[row] = {mode: _mean(group) for mode, group in _by("mode", own).items()}
    worst = {row: _worst(by_mode, metric) for row, by_mode in means.items()}
    first = worst[next(iter(worst))]
    return {
        row: [
            _number(by_mode[0]),
            f"{_number(by_mode[worst[row]])} (mode {worst[row]})",
            _number(by_mode[0] - by_mode[worst[row]]),
            f"{_number(by_mode[first])} (mode {first})",
            _number(by_mode[0] - by_mode[first]),
        ]
        for row, by_mode in means.items()
    }


def _worst(by_mode: dict[int, float], metric: str) -> int:
    choose: Callable[..., int] = min if metric == "accuracy" else max
    return choose((mode for mode in by_mode if mode), key=by_mode.__getitem__)


def _by(key: str, lines: Sequence[Line]) -> dict[Any, list[Line]]:
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(line[key], []).append(line)
    return groups


def _mean(lines: Sequence[Line], key: str = "score") -> float:
    return sum(line[key] for line in lines) / len(lines)


def _number(x: float) -> str:
    return f"{x:.4g}"
