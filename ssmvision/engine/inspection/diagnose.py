"""Which regime the tokens of every selective scan are in, convergent or slowly or fast divergent: table and plot."""

from __future__ import annotations

import csv
import io
import math
from argparse import Namespace
from collections import Counter
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from ssmvision.data import UserError

from ..checkpoint import atomic_write
from ..pictures import save_png
from .inputs import load_with_inputs
from .token_flow import REGIMES, Flow, Scan, find_scans, follow

_INK = "#24292f"
_COLOURS = dict(zip(REGIMES, ("#0a6fb0", "#d98a00", "#8a2981"), strict=True))


@dataclass(frozen=True)
class Diagnosis:
    """One route of one layer: what its weights say, and what its tokens do (medians over images).

    Attributes:
        layer: Name of the module.
        route: Number of the scan among those of the layer.
        regime: The most frequent one of `REGIMES` over images.
        agree: Share of the images in that regime.
        mu_min: Smallest eigenvalue of the symmetric part of the input-output matrix.
        mu_max: Largest one.
        negative: Share of the negative ones among those that are not zero.
        rate: d log(norm) / d time at the start, in units of speed / norm: from -1 to 1, straight to zero or away.
        exponent: See `Flow.exponents`.
        norm: At the end, relative to the start.
        growing: Share of tokens that grew.
        path: Times and norms of the first image, for the plot.
    """

    layer: str
    route: int
    regime: str
    agree: float
    mu_min: float
    mu_max: float
    negative: float
    rate: float
    exponent: float
    norm: float
    growing: float
    path: tuple[list[float], list[float]]


def diagnose(args: Namespace) -> list[Diagnosis]:
    """Diagnoses as `tools/diagnose.py --help` describes: prints the table and writes it with its plot.

    Raises:
        UserError: A model without selective scans or that cannot be made, or images that cannot be read.
    """
    if args.max_images < 1:
        raise UserError(f"--max-images must be at least 1, not {args.max_images}.")
    model, images, _ = load_with_inputs(args, args.max_images)
    rows = diagnose_model(model, images)
    name, output = Path(args.model or args.checkpoint).stem, Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    print(table(rows))
    atomic_write(output / f"{name}_tokens.csv", lambda file: file.write(as_csv(rows).encode()))
    save_png(draw(rows, f"{name}, {len(images)} input{'s' * (len(images) > 1)}"), output / f"{name}_tokens.png")
    for file in ("csv", "png"):
        print(output / f"{name}_tokens.{file}")
    return rows


def diagnose_model(model: Any, images: Tensor) -> list[Diagnosis]:
    """Diagnoses every scan of a model on images (b, c, h, w).

    Raises:
        NothingToDiagnose: For a model without selective scans.
    """
    rows: list[Diagnosis] = []
    for scan in find_scans(model.eval(), images):
        flow, before = follow(scan), sum(row.layer == scan.layer for row in rows)
        rows.extend(_diagnosis(scan, flow, route, before + route) for route in range(scan.A.shape[0]))
    return rows


def _diagnosis(scan: Scan, flow: Flow, k: int, route: int) -> Diagnosis:
    regimes = Counter(row[k] for row in flow.regimes())
    (regime, count), eigenvalues = regimes.most_common(1)[0], scan.eigenvalues()[k]
    nonzero = eigenvalues[eigenvalues != 0]

    def median(x: Tensor) -> float:
        return x[:, k].nanmedian().item()

    return Diagnosis(
        scan.layer,
        route,
        regime,
        count / scan.u.shape[0],
        eigenvalues.min().item(),
        eigenvalues.max().item(),
        (nonzero < 0).double().mean().item(),
        median(flow.rates[0]),
        median(flow.exponents()),
        median(flow.norms[-1]),
        median(flow.growing),
        (flow.times[:, 0, k].tolist(), flow.norms[:, 0, k].tolist()),
    )


def table(rows: list[Diagnosis]) -> str:
    """One line for each scan, and a summary."""
    lines = [("layer", "route", "regime", "mu min", "mu max", "mu < 0", "rate", "exponent", "norm", "grow")]
    for row in rows:
        exponent = "–" if math.isnan(row.exponent) else f"{row.exponent:+.1f}"
        lines.append(
            (row.layer, str(row.route), row.regime, f"{row.mu_min:+.3g}", f"{row.mu_max:+.3g}", f"{row.negative:.0%}",
             f"{row.rate:+.2f}", exponent, f"× {row.norm:.3g}", f"{row.growing:.0%}")
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.rjust, line, widths)) for line in lines]
    return "\n".join([*text, _summary(rows)])


def _summary(rows: list[Diagnosis]) -> str:
    counts = Counter(row.regime for row in rows)
    return f"{len(rows)} scans: " + ", ".join(f"{counts[regime]} {regime}" for regime in REGIMES)


def as_csv(rows: list[Diagnosis]) -> str:
    """All columns but the paths."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([field.name for field in fields(Diagnosis)][:-1])
    writer.writerows(astuple(row)[:-1] for row in rows)
    return file.getvalue()


def draw(rows: list[Diagnosis], title: str) -> Figure:
    """Norms of the tokens over time, and the range of eigenvalues of every scan, in the colours of the regimes."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    figure.suptitle(f"Token dynamics: {title}\n{_summary(rows)}", fontsize=11, color=_INK)
    left, right = figure.subplots(1, 2)
    for number, row in enumerate(rows):
        colour = _COLOURS[row.regime]
        left.plot(
            *(values[1:] for values in row.path), color=colour, linewidth=1.2, alpha=0.35 + 0.65 * number / len(rows)
        )
        right.vlines(number, row.mu_min, row.mu_max, color=colour, linewidth=max(1.5, 90 / len(rows)))
    left.set(xscale="log", yscale="log", xlabel="time (norm / speed at the start)", ylabel="norm / norm at the start")
    left.set_title("tokens that follow the scan", fontsize=9, color=_INK)
    right.axhline(0, color="#8c959f", linewidth=1)
    first = [i for i, row in enumerate(rows) if row.route == 0]
    shown = first[:: -(-len(first) // 12)]
    right.set_xticks(shown, [rows[i].layer for i in shown], rotation=30, ha="right", fontsize=7)
    right.set_ylabel("eigenvalues of the input-output matrix")
    right.set_title("smallest to largest, symmetric part", fontsize=9, color=_INK)
    for axes in (left, right):
        axes.grid(alpha=0.25)
    for regime in REGIMES:
        left.plot([], [], color=_COLOURS[regime], label=regime)
    left.legend(frameon=False, fontsize=8)
    return figure
