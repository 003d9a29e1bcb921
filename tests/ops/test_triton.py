"""Triton's kernels in Triton's interpreter: outputs and all gradients against the float64 definition, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssmvision.ops import _backend, selective_scan

SCRIPT = Path(__file__).with_name("triton_in_interpreter.py")
CASES = [
    "linear_scan, reverse=False", "linear_scan, reverse=True", "linear_scan from zero", "linear_scan of ConvS5",
    "causal_conv1d", "causal_conv1d along routes", "ssd_scan over 19", "ssd_scan over 70",
    *(f"selective_scan, {name}" for name in (
        "plain", "everything", "across the border of a chunk", "growing", "several tiles", "two groups of whole tiles",
        "blocks of states", "strided", "channels last", "apart", "no routes, merged", "random", "subset",
        "bidirectional", "cross", "column", "serpentine", "window", "atrous", "volume", "bfloat16", "float16",
        "walking", "walking a subset", "walking a subset in bfloat16", "walking in bfloat16", "walking on AMD",
        "blocks of states on AMD",
    )),
    *(f"golden selective_scan, case{i}" for i in range(6)),
    *(f"golden selective_scan_2d, case{i}" for i in range(3)),
    *(f"golden linear_scan, case{i}" for i in range(3)), *(f"golden ssd_scan, case{i}" for i in range(4)),
]  # fmt: skip


@pytest.fixture(scope="module")
def errors():
    """By case. The interpreter must be asked for before triton is imported, hence a process of its own."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_interpreted_kernels_match_the_definition(errors, case):
    assert errors[case]
    assert all(error <= 2e-6 for error in errors[case]), errors[case]


def test_an_operator_without_triton_kernels_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(_backend, "_has", lambda backend, operator: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="backend 'triton' has no selective_scan yet"):
        _backend.choose("selective_scan", "triton", torch.ones(1))


def test_tensors_of_another_device_are_refused():
    x = torch.ones(1, 3, 5)
    with pytest.raises(ValueError, match="backend 'triton' cannot run tensors on cpu"):
        selective_scan(x, x, -torch.ones(3, 2), x[:, :2], x[:, :2], backend="triton")
