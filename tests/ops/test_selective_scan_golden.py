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
REAL = [name for name, kwargs in META["kwargs"].items() if not kwargs.get("complex")]
OPTIONAL = {"D", "z", "delta_bias"}


def golden(case):
    tensors = load_file(FOLDER / "io.safetensors")
    return {n.removeprefix(f"{case}."): x for n, x in tensors.items() if n.startswith(f"{case}.")}


def arguments(case, tensors):
    names = {"u", "delta", "A", "B", "C"} | (OPTIONAL & tensors.keys())
    inputs = {name: tensors[name].clone().requires_grad_() for name in names}
    return inputs, {"delta_softplus": META["kwargs"][case]["softplus"]}


def test_there_are_cases():
    assert len(REAL) == 5


@pytest.mark.parametrize("case", REAL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_case(backend, case):
    tensors = golden(case)
    inputs, options = arguments(case, tensors)
    y, last = selective_scan(**inputs, **options, backend=backend)
    torch.testing.assert_close(y, tensors["out"], **META["tolerance"])
    torch.testing.assert_close(last, tensors["last_state"], **META["tolerance"])
    assert error(y, tensors["out_f64"]) < 2e-6
    torch.autograd.backward([y, last], [tensors["grad_out"], tensors["grad_last_state_real"]])
    for name, x in inputs.items():
        assert error(x.grad, tensors[f"grad.{name}"]) < 5e-6, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_complex_state_matrix_is_refused(backend):
    tensors = golden("case3")
    inputs, options = arguments("case3", tensors)
    inputs["A"] = torch.view_as_complex(tensors["A"])
    with pytest.raises((RuntimeError, TypeError, ValueError), match="complex"):
        selective_scan(**inputs, **options, backend=backend)


@pytest.mark.parametrize("name", ["A", "B", "C", "u"])
def test_complex_tensors_never_lose_their_imaginary_part(name):
    inputs, options = arguments("case0", golden("case0"))
    inputs[name] = inputs[name] * (1 + 1j)
    with pytest.raises((RuntimeError, TypeError, ValueError), match="complex"):
        selective_scan(**inputs, **options)
