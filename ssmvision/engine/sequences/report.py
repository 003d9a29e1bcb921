"""What a comparison found, as a table and as a picture, from the lines of results.csv and noise.csv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssmvision.engine.pictures import save_png

Line = dict[str, Any]


def table(lines: Sequence[Line], noise_lines: Sequence[Line], metric: str) -> str:
    """The final scores of each row as Markdown: the mean over seeds at the learning rate that is best for the row.

    Noise is tried on fewer sequences: the score without it, at the frequencies that are worst for the row, one for each
    seed, and at those that are worst for the first row; and what either costs.
    """
    head = ["row", "parameters", "lr", metric, "of each seed", "seconds"]
    noisy = _noise_columns(lines, noise_lines, metric) if noise_lines else {}
    if noisy:
        first = next(iter(noisy))
        head += ["without noise", "at its worst omega", "drop", f"at the worst of {first}", "drop"]
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
        panels.append(("omega", "score", noise_lines, f"{metric} over the frequency of the noise"))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    chosen = {row: final[0]["lr"] for row, final in _best(lines, metric).items()}
    for panel, (x, y, source, title) in zip(axes, panels, strict=True):
        for row, lr in chosen.items():
            at = _by(x, [line for line in source if (line["row"], line["lr"]) == (row, lr)])
            panel.plot(sorted(at), [_mean(at[key], y) for key in sorted(at)], marker=".", label=row)
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
    best = _best(lines, metric)
    first = next(iter(best))
    columns = {}
    for row, final in best.items():
        own, other = (_by_seed(noise_lines, name, final[0]["lr"]) for name in (row, first))
        clean = sum(scores[0] for scores in own) / len(own)
        columns[row] = [_number(clean), *_attacked(own, own, metric), *_attacked(own, other, metric)]
    return columns


def _by_seed(noise_lines: Sequence[Line], row: str, lr: float) -> list[dict[float, float]]:
    """For each seed the score at each frequency."""
    own = [line for line in noise_lines if (line["row"], line["lr"]) == (row, lr)]
    return [{line["omega"]: line["score"] for line in group} for group in _by("seed", own).values()]


def _attacked(own: Sequence[dict[float, float]], other: Sequence[dict[float, float]], metric: str) -> list[str]:
    """What is left at the frequencies that are worst for `other`, and what they cost."""
    worst = [_worst(scores, metric) for scores in other]
    noisy = [scores[omega] for scores, omega in zip(own, worst, strict=True)]
    drops = [scores[0] - score for scores, score in zip(own, noisy, strict=True)]
    cost = _number(sum(drops) / len(drops))
    return [
        f"{_number(sum(noisy) / len(noisy))} (at {', '.join(map(_number, worst))})",
        f"{cost} ({', '.join(map(_number, drops))})" if len(drops) > 1 else cost,
    ]


def _worst(scores: dict[float, float], metric: str) -> float:
    choose: Callable[..., float] = min if metric == "accuracy" else max
    return choose((omega for omega in scores if omega), key=scores.__getitem__)


def _by(key: str, lines: Sequence[Line]) -> dict[Any, list[Line]]:
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(line[key], []).append(line)
    return groups


def _mean(lines: Sequence[Line], key: str = "score") -> float:
    return sum(line[key] for line in lines) / len(lines)


def _number(x: float) -> str:
    return f"{x:.4g}"
