"""What checks of single modules share: weights loaded strictly, output and gradients under the official names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ssmvision.engine.verify.case import Case
from ssmvision.hub import compare_keys

__all__ = [
    "Check", "Tensors", "check_module", "gradients", "kind_of", "load_strictly", "renamed", "within",
    "without_options",
]  # fmt: skip

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """How a family is checked.

    Args:
        compute: What we compute and what the official code computed, by name: that of the case, or a kind
            ("output", "feat" or "grad"), a dot and that of the case.
        given: Pattern of the names of tensors that are not results: inputs, and what was drawn at random.
    """

    compute: Callable[[Case], tuple[Tensors, Tensors]]
    given: str = "input"


def check_module(case: Case, module: nn.Module, **inputs: Any) -> tuple[Tensors, Tensors]:
    """Output and gradients of a module whose parameters have the official names.

    Args:
        case: With `input`, `output`, and gradients of `output.pow(2).mean()`.
        module: Ours; put into eval mode.
        **inputs: What it takes beside the input.
    """
    load_strictly(module.eval(), case.weights)
    x = case.tensors["input"].clone().requires_grad_()
    y = module(x, **inputs)
    y.pow(2).mean().backward()
    wanted = {name: t for name, t in case.tensors.items() if name in ("output", "grad_input") or name[:5] == "grad."}
    return {"output": y.detach()} | gradients(module, x), wanted


def gradients(module: nn.Module, x: Tensor) -> Tensors:
    """Of the input and the parameters, after the backward pass."""
    tensors = {"grad_input": x} | {f"grad.{name}": p for name, p in module.named_parameters()}
    return {name: t.grad for name, t in tensors.items() if t.grad is not None}


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights, all of which must be used and fit.

    Raises:
        ValueError: They do not fit.
    """
    ours = module.state_dict()
    # A number may be stored as such or as a vector of one, as S4's `l_kernel` is by versions of the official code.
    weights = {
        name: x.reshape(1) if not x.dim() and name in ours and ours[name].shape == (1,) else x
        for name, x in weights.items()
    }
    report = compare_keys(weights, ours)
    if not report.ok:
        raise ValueError(f"the weights do not fit: {report.summary()}")
    module.load_state_dict(weights)


def within(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors below a prefix, without it."""
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def renamed(kwargs: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Official arguments under our names."""
    return {names.get(name, name): value for name, value in kwargs.items()}


def without_options(kwargs: Mapping[str, Any], off: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Official arguments without options that are not built here, given the values that turn them off.

    Raises:
        ValueError: One of them is on.
    """
    for name, values in off.items():
        if name in kwargs and kwargs[name] not in values:
            raise ValueError(f"the official option {name}={kwargs[name]!r} is not built here")
    return {name: value for name, value in kwargs.items() if name not in off}


def kind_of(name: str) -> str:
    """The kind by which `compare` tells how near a tensor must be."""
    return "grad" if name.startswith("grad") else "output"
