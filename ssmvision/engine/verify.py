"""Proof of a conversion: our model with official weights against what the official code computed.

A case is a folder:

    ckpt.safetensors   weights under the official key names
    io.safetensors     input[.N], output[.N], feat.N[.M], grad_input, grad.<official key>, and what else a family's
                       models take, by name
    meta.json          family, official_class, kwargs (of the official constructor), tolerance {rtol, atol},
                       grad_tolerance {rtol, atol_rel_to_max}, output_absmax (features larger than the output are
                       allowed proportionally more), feats (official module names, in the order of feat.N)

Gradients are those of the sum over outputs of output.pow(2).mean(), in eval mode.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ssmvision.data import UserError
from ssmvision.hub import CheckpointError, compare_keys

__all__ = ["Verification", "verify_case"]

KINDS = ("output", "feature", "gradient")


@dataclass(frozen=True)
class Verification:
    """The worst errors of one case, as fractions of what its tolerances allow: above 1 is a failure.

    Args:
        name: Name of the case.
        worst: For "output", "feature" and "gradient": (fraction, tensor it was seen in).
        problem: Why nothing could be compared, or what is missing; empty if all was compared.
    """

    name: str
    worst: dict[str, tuple[float, str]]
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether everything was compared and lies within the tolerances."""
        return not self.problem and all(fraction <= 1 for fraction, _ in self.worst.values())

    def __str__(self) -> str:
        """`NAME ok|FAIL` with the worst error of each kind."""
        errors = "  ".join(
            f"{kind} {fraction:.3f} of tolerance ({name})" for kind, (fraction, name) in self.worst.items()
        )
        return "  ".join(part for part in (f"{self.name} {'ok' if self.ok else 'FAIL'}", errors, self.problem) if part)


def verify_case(folder: Path) -> Verification:
    """Build our model from the official arguments, load the weights strictly and compare everything.

    Args:
        folder: The case.

    Raises:
        UserError: The folder is not a case, or its family is not one of ours.
    """
    meta, weights, expected = _read(folder)
    family = _family(meta["family"])
    try:
        official = family.from_official(meta.get("official_class", ""), meta["kwargs"])
        model = official.model.eval()
        inner = getattr(model, "model", model)  # features_only wrappers hold the network
        converted = family.checkpoint_filter_fn(weights, inner)
        report = compare_keys(converted, inner.state_dict())
        if not report.ok:
            return Verification(folder.name, {}, f"the weights do not fit: {report.summary()}")
        inner.load_state_dict(converted)
    except (ValueError, KeyError, CheckpointError) as error:
        return Verification(folder.name, {}, f"cannot be built: {error}")
    found = _run(official, meta.get("feats", []), expected)
    wanted = {key: value for key, value in expected.items() if key.startswith(("output", "feat."))}
    inputs = found.pop("inputs")
    found |= _gradients(inner, found.pop("loss"), inputs)
    found |= _variants(official, inputs, expected)
    wanted |= _expected_gradients(family, inner, weights, expected)
    return _compare(folder.name, found, wanted, meta)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return meta, load_file(folder / "ckpt.safetensors"), load_file(folder / "io.safetensors")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a case (ckpt.safetensors, io.safetensors, meta.json): {error}") from error


def _family(name: str) -> Any:
    try:
        return importlib.import_module(f"ssmvision.models.{name}")
    except ModuleNotFoundError as error:
        raise UserError(f"there is no family {name!r} in ssmvision.models") from error


def _run(official: Any, features: list[str], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Outputs and features under the names of the case, and what the gradients need."""
    model: nn.Module = official.model
    found: dict[str, Any] = {}
    for index, feature in enumerate(features):
        for part, tap in enumerate(official.taps(feature)):
            key = f"feat.{index}.{part}" if part else f"feat.{index}"

            def hook(_: nn.Module, inputs: Any, output: Any, key: str = key, tap: Any = tap) -> None:
                found[key] = tap.read(inputs, output).detach()

            model.get_submodule(tap.module).register_forward_hook(hook)
    inputs = [expected[key].requires_grad_() for key in _numbered("input", expected)]
    result = model(*inputs, *(expected[name] for name in official.inputs if name in expected))
    outputs = list(result) if isinstance(result, (list, tuple)) else [result]
    for index, output in enumerate(outputs):
        found[f"output.{index}" if index else "output"] = output.detach()
    return found | {"loss": sum(output.pow(2).mean() for output in outputs), "inputs": inputs}


def _variants(official: Any, inputs: list[Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of the model changed in one respect after the other, where the case has them."""
    found = {}
    for name, change in official.variants.items():
        if name in expected:
            change(official.model)
            found[name] = official.model(*inputs).detach()
    return found


def _numbered(name: str, tensors: dict[str, Tensor]) -> Iterator[str]:
    index, key = 0, name
    while key in tensors:
        yield key
        index, key = index + 1, f"{name}.{index + 1}"


def _gradients(model: nn.Module, loss: Tensor, inputs: list[Tensor]) -> dict[str, Any]:
    loss.backward()
    found = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"grad_input": inputs[0].grad}


def _expected_gradients(
    family: Any, model: nn.Module, weights: dict[str, Tensor], expected: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The case's gradients under our names.

    A conversion only renames and rearranges, so the weights' own filter converts gradients as well; NaN marks the
    entries of which the case says nothing.
    """
    unknown = {key: expected.get(f"grad.{key}", torch.full(w.shape, torch.nan)) for key, w in weights.items()}
    converted = family.checkpoint_filter_fn(unknown, model)
    wanted = {f"grad.{key}": value for key, value in converted.items() if not value.isnan().all()}
    return wanted | ({"grad_input": expected["grad_input"]} if "grad_input" in expected else {})


def _compare(name: str, found: dict[str, Tensor], wanted: dict[str, Tensor], meta: dict[str, Any]) -> Verification:
    worst: dict[str, tuple[float, str]] = {}
    loss = sum(want.pow(2).mean().item() for key, want in wanted.items() if key.partition(".")[0] == "output")
    for key, want in wanted.items():
        if key not in found:
            return Verification(name, worst, f"our model does not give {key}")
        if found[key].shape != want.shape:
            return Verification(name, worst, f"{key} is {tuple(found[key].shape)}, expected {tuple(want.shape)}")
        kind = "gradient" if key.startswith("grad") else "feature" if key.startswith("feat") else "output"
        fraction = _fraction(found[key], want, _tolerance(kind, want, meta, loss))
        worst[kind] = max(worst.get(kind, (-1.0, "")), (fraction, key))
    return Verification(name, {kind: worst[kind] for kind in KINDS if kind in worst})


def _tolerance(kind: str, want: Tensor, meta: dict[str, Any], loss: float) -> tuple[float, float]:
    if kind != "gradient":
        # The absolute tolerance was derived from the output's magnitude. Features may be a hundred times larger, and
        # there the official float32 tensors themselves miss a float64 run by several times the unscaled tolerance.
        scale = want.abs().max().item() / meta.get("output_absmax", torch.inf) if kind == "feature" else 1.0
        return meta["tolerance"]["rtol"], meta["tolerance"]["atol"] * max(1.0, scale)
    allowed = meta.get("grad_tolerance", {"rtol": 1e-3, "atol_rel_to_max": 1e-4})
    largest = want.nan_to_num().abs().max().item()
    # Where the loss does not depend on a tensor (that of unit vectors is constant), its gradient is mere rounding.
    vanishes = largest < torch.finfo(torch.float32).eps * loss
    return allowed["rtol"], torch.finfo(torch.float32).eps * loss if vanishes else allowed["atol_rel_to_max"] * largest


def _fraction(found: Tensor, want: Tensor, tolerance: tuple[float, float]) -> float:
    rtol, atol = tolerance
    known = ~want.isnan()
    if not found.isfinite().all():
        return float("inf")
    error = (found.double() - want.double()).abs()[known]
    return (error / (atol + rtol * want.double().abs()[known])).max().item()
