"""Operators against the official ones: outputs, last states and gradients of calls "case0", "case1", ..."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmvision.engine.verify.case import Case
from ssmvision.engine.verify.modules import Check, Tensors, kind_of, within
from ssmvision.ops import linear_scan, resets_from_seq_idx, selective_scan, selective_scan_2d, ssd_scan

__all__ = ["CHECKS"]

# What one call gives: its outputs by their names in the case, and the inputs that gradients are known of.
Call = Callable[[Tensors, dict[str, Any]], tuple[Tensors, Tensors]]


# What says nothing but which tensors a call has, and their sizes.
_SIZES = {
    "B", "C", "D", "G", "H", "L", "N", "P", "Q", "T", "V", "b", "bias", "d", "decoupled", "h0", "p", "seq", "z",
}  # fmt: skip


def _calls(call: Call, outputs: dict[str, str], given: str) -> Check:
    """A check of an operator.

    Args:
        call: The operator.
        outputs: The case's names of the gradients that come in, by the names of outputs.
        given: Pattern of the names of what a call is given.
    """

    def check(case: Case) -> tuple[Tensors, Tensors]:
        found: Tensors = {}
        wanted: Tensors = {}
        for name, kwargs in case.calls(_SIZES):
            tensors = within(name, case.tensors)
            ours, inputs = call(tensors, kwargs)
            driven = {output: grad for output, grad in outputs.items() if grad in tensors}
            gradients = torch.autograd.grad(
                [ours[output] for output in driven], list(inputs.values()), [tensors[grad] for grad in driven.values()],
                materialize_grads=True,
            )  # fmt: skip
            separator = "." if any(key.startswith("grad.") for key in tensors) else "_"
            ours = ours | {f"grad{separator}{key}": x for key, x in zip(inputs, gradients, strict=True)}
            ours = {key: x.detach() for key, x in ours.items() if key in tensors}
            found |= {f"{kind_of(key)}.{name}.{key}": x for key, x in ours.items()}
            theirs = {key for key in tensors if key.startswith("grad") and key not in outputs.values()} | ours.keys()
            wanted |= {f"{kind_of(key)}.{name}.{key}": tensors[key] for key in theirs}
        return found, wanted

    return Check(check, rf"\w+\.({'|'.join((given, *outputs.values()))})")


def _given(tensors: Tensors, names: tuple[str, ...]) -> Tensors:
    return {name: tensors[name].clone().requires_grad_() for name in names if name in tensors}


def _selective_scan(tensors: Tensors, kwargs: dict[str, Any]) -> tuple[Tensors, Tensors]:
    given = _given(tensors, ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"))
    arguments: dict[str, Any] = dict(given)
    if kwargs.get("complex"):  # pairs (re, im): of A on an axis of their own, of B and C interleaved along the tokens
        arguments["A"] = torch.view_as_complex(given["A"])
        for name in ("B", "C"):  # if they do not change from token to token, the same axis as of A
            like_A = given[name].shape == given["A"].shape
            constant = kwargs.get(name, "const" if like_A else "var") == "const"
            arguments[name] = torch.view_as_complex(given[name] if constant else given[name].unflatten(-1, (-1, 2)))
    y, last = selective_scan(**arguments, delta_softplus=kwargs.get("softplus", False))
    found = {"out": y, "out_f64": y, "last_real": last.real}
    return found | {"last_state": torch.view_as_real(last) if last.is_complex() else last}, given


def _ssd(tensors: Tensors, kwargs: dict[str, Any]) -> tuple[Tensors, Tensors]:
    given = _given(tensors, ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"))
    arguments: dict[str, Any] = {"initial_state" if name == "initial_states" else name: x for name, x in given.items()}
    reset = resets_from_seq_idx(tensors["seq_idx"]) if "seq_idx" in tensors else None
    if "dt_limit" in kwargs:
        arguments["dt_limit"] = tuple(kwargs["dt_limit"])
    y, last = ssd_scan(**arguments, dt_softplus=kwargs.get("softplus", False), reset=reset)
    return {"out": y, "final_state": last}, given


def _linear_scan(tensors: Tensors, kwargs: dict[str, Any]) -> tuple[Tensors, Tensors]:
    given = _given(tensors, ("a", "x", "h0"))
    reset = tensors["resets"].bool() if "resets" in tensors else None
    h, last = linear_scan(given["a"], given["x"], given.get("h0"), reset, backend=_backend(given["x"]))
    return {"out": h, "last": last}, given


def _selective_scan_2d(tensors: Tensors, kwargs: dict[str, Any]) -> tuple[Tensors, Tensors]:
    given = _given(tensors, ("x", "dt1", "dt2", "A1", "A2", "A3", "A4", "B1", "B2", "C1", "C2"))
    y, h1, h2 = selective_scan_2d(**given, backend=_backend(given["x"]))
    return {"out": y, "h1": h1, "h2": h2}, given


def _backend(x: Tensor) -> str:
    """Only the reference computes in float64."""
    return "reference" if x.dtype == torch.float64 else "auto"


CHECKS: dict[str, Check] = {
    "chimerastyle2dselectivessm": _calls(_selective_scan_2d, {"out": "grad_out"}, "x|[ABC]\\d|dt\\d|[AB]bar\\d"),
    "linearrecurrencewithresets": _calls(_linear_scan, {"out": "grad_out"}, "a|x|h0|resets"),
    "mamba1s6": _calls(
        _selective_scan, {"out": "grad_out", "last_real": "grad_last_state_real"}, "[ABCDuz]|delta|delta_bias"
    ),
    "mamba2ssd": _calls(
        _ssd, {"out": "grad_out", "final_state": "grad_final_state"}, "[ABCDxz]|dt|dt_bias|initial_states|seq_idx"
    ),
}
