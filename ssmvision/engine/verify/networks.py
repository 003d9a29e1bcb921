"""Whole networks against the official ones: outputs, features and gradients."""

from __future__ import annotations

import copy
import importlib
import os
import pkgutil
from collections.abc import Iterator
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import ssmvision.models
import ssmvision.segmentation
from ssmvision.data import UserError
from ssmvision.engine.verify.case import Case
from ssmvision.engine.verify.compare import Verification, compare
from ssmvision.hub import CheckpointError, compare_keys
from ssmvision.models._official import WITHOUT_EFFECT

__all__ = ["expected_gradients", "verify_network"]

# Families that live in the file of another, as cases spell them.
_BESIDE = {"vmunetv2": "vmunet", "swinumambad": "swinumamba"}


def verify_network(case: Case) -> Verification:
    """Build our network from the official arguments, load the weights strictly and compare everything.

    Raises:
        UserError: The case's family is not one of ours.
    """
    family = _family(case)
    try:
        official = family.from_official(case.official_class, case.kwargs)
        case.kwargs.ignore((*WITHOUT_EFFECT, *official.without_effect))
        model = official.model.eval()
        inner = getattr(model, "model", model)  # features_only wrappers hold the network
        converted = family.checkpoint_filter_fn(case.weights, inner)
        report = compare_keys(converted, inner.state_dict())
        if not report.ok:
            return Verification(case.name, {}, f"the weights do not fit: {report.summary()}")
        inner.load_state_dict(converted)
    except (ValueError, KeyError, TypeError, CheckpointError) as error:
        return Verification(case.name, {}, f"cannot be built: {error}")
    expected = case.tensors
    found = _run(official, case.meta.get("feats", []), expected)
    wanted = {key: value for key, value in expected.items() if key.startswith(("output", "feat."))}
    inputs = found.pop("inputs")
    found |= _gradients(inner, found.pop("loss"), inputs)
    found |= _variants(official, inputs, expected)
    wanted |= expected_gradients(family, inner, case.weights, expected)
    result = compare(case.name, found, wanted, case.meta)
    if not (result.ok or result.problem):
        result = compare(case.name, found, wanted, case.meta, _rounding(official, wanted, expected))
    return result.with_overlooked(*case.overlooked(wanted, "|".join((r"input(\.\d+)?", *official.inputs))))


def _family(case: Case) -> Any:
    family = _BESIDE.get(case.family, case.family)
    if family not in _modules():
        raise UserError(f"there is no family {case.meta['family']!r} in ssmvision.models or ssmvision.segmentation")
    return importlib.import_module(_modules()[family])


@cache
def _modules() -> dict[str, str]:
    """The modules of our families by their names without underscores."""
    packages = (ssmvision.models, ssmvision.segmentation)
    return {
        found.name.replace("_", ""): f"{package.__name__}.{found.name}"
        for package in packages
        for found in pkgutil.iter_modules(package.__path__)
        if not found.name.startswith("_")
    }


def _run(official: Any, features: list[str], expected: dict[str, Tensor]) -> dict[str, Any]:
    """Outputs and features under the names of the case, and what the gradients need."""
    model: nn.Module = official.model
    found: dict[str, Any] = {}
    for index, feature in enumerate(features):
        if f"feat.{index}" not in expected:
            continue
        for part, tap in enumerate(official.taps(feature)):
            key = f"feat.{index}.{part}" if part else f"feat.{index}"

            def hook(_: nn.Module, inputs: Any, output: Any, key: str = key, tap: Any = tap) -> None:
                found[key] = tap.read(inputs, output).detach()

            model.get_submodule(tap.module).register_forward_hook(hook)
    inputs = [expected[key].requires_grad_() for key in _numbered("input", expected)]
    outputs = _outputs(model, official, inputs, expected)
    for index, output in enumerate(outputs):
        found[f"output.{index}" if index else "output"] = output.detach()
    return found | {"loss": _loss(outputs), "inputs": inputs}


def _outputs(network: nn.Module, official: Any, inputs: list[Tensor], tensors: dict[str, Tensor]) -> list[Tensor]:
    result = network(*inputs, *(tensors[name] for name in official.inputs if name in tensors))
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _loss(outputs: list[Tensor]) -> Tensor:
    """What the gradients of every case are those of."""
    return torch.stack([output.pow(2).mean() for output in outputs]).sum()


# How much of a gradient rounding may explain. Where an activation sits on the kink of a ReLU, float32 decides its side
# by chance, in the official code as here: among the golden cases that moved gradients by up to 3 %.
_MOST_ROUNDING = 0.05
_NOISE, _TRIALS = 3e-7, 4  # relative, of weights and inputs: a few units in the last place, as layers add them up


def _rounding(official: Any, wanted: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """For each gradient twice what noise of float32's size moves it by, measured in float64, up to a limit.

    Where no activation sits on a kink that is next to nothing, so that a wrong gradient finds no excuse here.
    """
    network = copy.deepcopy(getattr(official.model, "model", official.model)).double()
    for module in network.modules():
        module._forward_hooks.clear()
    double = {key: x.detach().double() if x.is_floating_point() else x for key, x in expected.items()}
    exact, *noisy = (_gradients_under_noise(network, official, double, seed) for seed in range(_TRIALS + 1))
    found = {}
    for key in wanted.keys() & exact.keys():
        moved = max((other[key] - exact[key]).abs().max().item() for other in noisy)
        found[key] = min(2 * moved, _MOST_ROUNDING * exact[key].abs().max().item())
    return found


def _gradients_under_noise(
    network: nn.Module, official: Any, double: dict[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """The gradients of a float64 network whose weights and inputs are a little off; seed 0 leaves them as they are."""
    generator = torch.Generator().manual_seed(seed)

    def off(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return (x * (1 + (_NOISE if seed else 0) * noise)).detach().requires_grad_()

    network = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.grad = None
            parameter.copy_(off(parameter))
    inputs = [off(double[key]) for key in _numbered("input", double)]
    with mock.patch.dict(os.environ, SSMVISION_BACKEND="reference"):
        return _gradients(network, _loss(_outputs(network, official, inputs, double)), inputs)


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


def expected_gradients(
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
