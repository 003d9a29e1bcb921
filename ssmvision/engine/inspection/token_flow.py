"""The tokens of every selective scan, followed as they flow; the equations are in `layers/token_dynamics.py`.

Letters: b image, k route, d channel, n state, r rank of the step size, t token along a route.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmvision.data import UserError
from ssmvision.layers.token_dynamics import input_output_eigenvalues, scan_projections
from ssmvision.ops import selective_scan

from .scans import ScanCall, watch_scans

REGIMES = ("convergent", "slowly divergent", "fast divergent")
GROWN, VANISHED = 1e3, 1 / 30  # times the norm at the start, where nothing new is to be seen
STEPS, TOLERANCE = 300, 0.02


@dataclass(frozen=True)
class Scan:
    """The scans that one call of a layer runs, on the tokens they ran on.

    Attributes:
        layer: Name of the module.
        u: Tokens in the order of each route, (b, k, d, t).
        x_proj: Rows of step sizes, B and C, (k, r + 2n, d).
        A: (k, d, n).
        dt_proj: (k, d, r).
        delta_bias: (k, d), or None.
    """

    layer: str
    u: Tensor
    x_proj: Tensor
    A: Tensor
    dt_proj: Tensor
    delta_bias: Tensor | None

    def velocity(self, u: Tensor) -> Tensor:
        """The scan's output without its skip, which is du / dt of tokens (b, k, d, t)."""
        n, r, length = self.A.shape[2], self.dt_proj.shape[2], u.shape[3]
        delta, b, c = (self.x_proj @ u).split([r, n, n], dim=2)
        in_order = torch.arange(length, device=u.device).expand(u.shape[1], -1)
        y, _ = selective_scan(
            u, delta, self.A, b, c, delta_bias=self.delta_bias, delta_softplus=True, dt_proj=self.dt_proj,
            routes=in_order, merge=False,
        )  # fmt: skip
        return y

    def eigenvalues(self) -> list[Tensor]:
        """Those of the symmetric part of each route's input-output matrix."""
        n = self.A.shape[2]
        return [input_output_eigenvalues(w[-2 * n : -n], w[-n:]) for w in self.x_proj]


class NothingToDiagnose(UserError):
    """The model has no selective scan."""


@torch.no_grad()
def find_scans(model: Any, images: Tensor) -> list[Scan]:
    """The scans of a model on its input, images (b, c, h, w) or another, in the order in which they run.

    Raises:
        NothingToDiagnose: For a model without selective scans.
    """
    calls = watch_scans(model, images)
    selective = [call for call in calls if call.operator == "selective_scan"]
    if scans := [_scan(call, made) for call in selective if (made := scan_projections(call.module))]:
        return scans
    others = ", ".join(sorted({call.operator for call in calls}))
    raise NothingToDiagnose(
        f"{type(model).__name__} has no selective scan, whose tokens could be followed: "
        + (f"all it runs is {others}." if others else "it runs no scan at all.")
    )


def _scan(call: ScanCall, projections: list[Tensor]) -> Scan:
    given, candidates = call.arguments, torch.stack(projections)
    k, _, n = given["A"].shape
    u = given["u"].expand(-1, k, -1, -1)
    # Calls of one layer may take turns with its projections: each has the one that made its B.
    made = candidates[:, -2 * n : -n] @ u[0].unsqueeze(1)  # (k, candidates, n, l)
    nearest = (made - given["B"][0, :, :1]).square().sum((2, 3)).argmin(1)
    if given["routes"] is not None:
        u = torch.stack([u[:, i, :, route] for i, route in enumerate(given["routes"])], dim=1)
    return Scan(call.layer, u, candidates[nearest], given["A"], given["dt_proj"], given["delta_bias"])


@dataclass(frozen=True)
class Flow:
    """Tokens that follow du / dt = `Scan.velocity`, every sequence and route on its own.

    Attributes:
        times: (steps, b, k), in units of norm / speed at the start.
        norms: Over channels and tokens, relative to the start, (steps, b, k).
        rates: d log(norm) / d time, (steps, b, k).
        growing: Share of the tokens whose own norm ended above where it began, (b, k).
    """

    times: Tensor
    norms: Tensor
    rates: Tensor
    growing: Tensor

    def exponents(self) -> Tensor:
        """The p of d norm / d time ~ norm^(1 + p), (b, k): the last half of the growth against the first, or NaN.

        Above 0 the norm is infinite after finite time; below, it stays finite for all times.
        """
        norms = self.norms.log()
        lowest, begin = norms.min(0, keepdim=True)  # tokens may shrink before they grow
        middle = (norms < (lowest + norms[-1:]) / 2).cumsum(0).argmax(0, keepdim=True)  # the last step below the half
        first, second = norms.gather(0, middle) - lowest, norms[-1:] - norms.gather(0, middle)
        times = (
            self.times.gather(0, middle) - self.times.gather(0, begin),
            self.times[-1:] - self.times.gather(0, middle),
        )
        return ((second / times[1]) / (first / times[0])).log()[0] / ((norms[-1] - lowest[0]) / 2)

    def regimes(self) -> list[list[str]]:
        """The regime of every sequence and route."""
        vanishing = (self.norms[-1] < 1) & (self.rates[-1] <= 0)
        number = torch.where(vanishing, 0, 1 + (self.exponents() > 0).long())
        return [[REGIMES[i] for i in row] for row in number.tolist()]


@torch.no_grad()
def follow(scan: Scan, steps: int = STEPS) -> Flow:
    """Follows the tokens from where they are, by Heun's method with the step size that its error allows."""

    def norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=(2, 3)).clamp(min=1e-30)

    u, f = scan.u, scan.velocity(scan.u)
    unit = norm(u) / norm(f)
    time, h = torch.zeros_like(unit, dtype=torch.float64), 0.1 * unit  # the last steps are beyond float32
    records = []
    for _ in range(steps):
        records.append((time / unit, norm(u) / norm(scan.u), unit * (u * f).sum((2, 3)) / norm(u).square()))
        done = (records[-1][1] > GROWN) | (records[-1][1] < VANISHED) | (norm(f) <= 1e-30)
        if done.all():
            break
        there = scan.velocity(u + _per_flow(h) * f)
        new = u + _per_flow(h / 2) * (f + there)
        error = (h / 2 * norm(there - f) / norm(new)).nan_to_num(1e6, 1e6)
        good = (error <= TOLERANCE) & ~done
        u, time = torch.where(_per_flow(good), new, u), time + h * good
        h = h * (0.9 * (TOLERANCE / error.clamp(min=1e-9)).sqrt()).clamp(0.2, 3)
        f = scan.velocity(u)
    grown = torch.linalg.vector_norm(u, dim=2) > torch.linalg.vector_norm(scan.u, dim=2)
    times, norms, rates = map(torch.stack, zip(*records, strict=True))
    return Flow(times, norms, rates, grown.float().mean(2))


def _per_flow(x: Tensor) -> Tensor:
    return x[:, :, None, None]
