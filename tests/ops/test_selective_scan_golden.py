"""Golden cases that the official `selective_scan_ref` wrote: tests/parity/ssm_selective_scan."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scan_cases import BACKENDS, error

from ssmvision.ops import selective_scan

FOLDER = Path(__file__).parents[1] / "parity" / "ssm_selective_scan"
META = json.loads((FOLDER / "meta.json").read_text())
OPTIONAL = {"D", "z", "delta_bias"}


def golden(case):
    tensors = load_file(FOLDER / "io.safetensors")
    return {n.removeprefix(f"{case}."): x for n, x in tensors.items() if n.startswith(f"{case}.")}


def arguments(case, tensors):
    names = {"u", "delta", "A", "B", "C"} | (OPTIONAL & tensors.keys())
    inputs = {name: tensors[name].clone().requires_grad_() for name in names}
    return inputs, {"delta_softplus": META["kwargs"][case]["softplus"]}


def in_our_types(inputs):
    """The complex case stores pairs (re, im): of A on an axis of their own, of B and C interleaved along the tokens."""
    if inputs["A"].dim() == 2:
        return inputs
    pairs = {"A": inputs["A"], **{n: inputs[n].unflatten(-1, (-1, 2)) for n in ("B", "C")}}
    return {**inputs, **{n: torch.view_as_complex(x) for n, x in pairs.items()}}


def test_there_are_cases():
    assert len(META["kwargs"]) == 6
    assert [name for name, kwargs in META["kwargs"].items() if kwargs.get("complex")] == ["case3"]


@pytest.mark.parametrize("case", META["kwargs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_case(backend, case):
    tensors = golden(case)
    inputs, options = arguments(case, tensors)
    y, last = selective_scan(**in_our_types(inputs), **options, backend=backend)
    wanted = tensors["last_state"]
    torch.testing.assert_close(y, tensors["out"], **META["tolerance"])
    torch.testing.assert_close(torch.view_as_real(last) if last.is_complex() else last, wanted, **META["tolerance"])
    assert error(y, tensors["out_f64"]) < 2e-6
    torch.autograd.backward([y, last.real], [tensors["grad_out"], tensors["grad_last_state_real"]])
    for name, x in inputs.items():
        assert error(x.grad, tensors[f"grad.{name}"]) < 5e-6, name


@pytest.mark.parametrize("name", ["B", "C", "u", "z"])
def test_complex_tensors_never_lose_their_imaginary_part(name):
    inputs, options = arguments("case0", golden("case0"))
    inputs[name] = inputs[name] * (1 + 1j)
    with pytest.raises((RuntimeError, TypeError, ValueError), match="complex"):
        selective_scan(**inputs, **options)
