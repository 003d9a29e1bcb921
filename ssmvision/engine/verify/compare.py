"""How far found tensors are from those of the official code, as fractions of what a case allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

__all__ = ["Verification", "compare"]

KINDS = ("output", "feature", "gradient")


@dataclass(frozen=True)
class Verification:
    """The worst errors of one case, as fractions of what its tolerances allow: above 1 is a failure.

    Args:
        name: Name of the case.
        worst: For "output", "feature" and "gradient": (fraction, tensor it was seen in).
        problem: Why nothing could be compared, or what is missing; empty if all was compared.
        note: What was left out of account but is no failure.
    """

    name: str
    worst: dict[str, tuple[float, str]]
    problem: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything was compared and lies within the tolerances."""
        return not self.problem and all(fraction <= 1 for fraction, _ in self.worst.values())

    def with_overlooked(self, tensors: str, arguments: str) -> Verification:
        """The same, failed by tensors that were not compared, with a note of arguments that were not looked at."""
        return replace(self, problem=self.problem or tensors, note=arguments)

    def __str__(self) -> str:
        """`NAME ok|FAIL` with the worst error of each kind."""
        errors = "  ".join(
            f"{kind} {fraction:.3f} of tolerance ({name})" for kind, (fraction, name) in self.worst.items()
        )
        return "  ".join(
            part for part in (f"{self.name} {'ok' if self.ok else 'FAIL'}", errors, self.problem, self.note) if part
        )


def compare(
    name: str,
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    rounding: Mapping[str, float] = MappingProxyType({}),
) -> Verification:
    """Compare tensors by name.

    Args:
        name: Of the case.
        found: Ours; "output...", "feat..." and "grad..." tell what a tensor is.
        wanted: The official ones; NaN marks entries of which nothing is known.
        meta: The case's `tolerance`, `grad_tolerance` and `output_absmax`.
        rounding: What is to be added to the absolute tolerance of some tensors.
    """
    worst: dict[str, tuple[float, str]] = {}
    loss = sum(want.pow(2).mean().item() for key, want in wanted.items() if key.partition(".")[0] == "output")
    for key, want in wanted.items():
        kind = "gradient" if key.startswith("grad") else "feature" if key.startswith("feat") else "output"
        if key not in found and kind == "gradient" and not want.nan_to_num().any():
            continue  # what takes no part has no gradient here, and one of zeros elsewhere
        if key not in found:
            return Verification(name, worst, f"our model does not give {key}")
        if found[key].shape != want.shape:
            return Verification(name, worst, f"{key} is {tuple(found[key].shape)}, expected {tuple(want.shape)}")
        rtol, atol = _tolerance(kind, want, meta, loss)
        fraction = _fraction(found[key], want, (rtol, atol + rounding.get(key, 0.0)))
        worst[kind] = max(worst.get(kind, (-1.0, "")), (fraction, key))
    problem = "" if "output" in worst else "the case holds no output"
    return Verification(name, {kind: worst[kind] for kind in KINDS if kind in worst}, problem)


def _tolerance(kind: str, want: Tensor, meta: Mapping[str, Any], loss: float) -> tuple[float, float]:
    if kind != "gradient":
        # The absolute tolerance was derived from the output's magnitude. Features may be a hundred times larger, and
        # there the official float32 tensors themselves miss a float64 run by several times the unscaled tolerance.
        scale = want.abs().max().item() / meta.get("output_absmax", torch.inf) if kind == "feature" else 1.0
        # What a case stores in float32 is not known better than that, whatever it allows for its float64 tensors.
        eps = 8 * torch.finfo(torch.float32).eps if want.dtype == torch.float32 else 0.0
        rounding = eps * want.nan_to_num().abs().max().item()
        rtol, atol = meta["tolerance"]["rtol"], meta["tolerance"]["atol"] * max(1.0, scale)
        return max(rtol, eps), max(atol, rounding)
    allowed = meta.get("grad_tolerance", {"rtol": 1e-3, "atol_rel_to_max": 1e-4})
    largest = want.nan_to_num().abs().max().item()
    # float32 knows the loss to eps, and its derivatives no better: what vanishes by cancellation is mere rounding.
    return allowed["rtol"], max(allowed["atol_rel_to_max"] * largest, torch.finfo(torch.float32).eps * loss)


def _fraction(found: Tensor, want: Tensor, tolerance: tuple[float, float]) -> float:
    rtol, atol = tolerance
    known = ~want.isnan()
    if not found.isfinite().all() or not known.any():
        return float("inf")
    error = (found.double() - want.double()).abs()[known]
    fraction = error / (atol + rtol * want.double().abs()[known])
    return fraction.where(error > 0, 0.0).nan_to_num(nan=torch.inf).max().item()
