"""The benchmark checks before it measures, and prints what it says it prints."""

import pytest
import torch

from ssmvision.engine import benchmark
from ssmvision.engine.benchmark import OpShape
from ssmvision_tools import benchmark as tool


@pytest.mark.parametrize("shape", [OpShape(1, 1, 16, 3, 9), OpShape(2, 4, 16, 2, 16)])
def test_native_scan_is_checked_against_the_published_form(shape: OpShape) -> None:
    found = benchmark.measure_op(shape, repeats=1, slow_repeats=1)
    assert found["error"] < 1e-5
    kinds = {"forward", "train"}
    assert {f"{kind}, {slow}" for kind in kinds for slow in ("published form", "our reference")} <= found.keys()
    assert ("routes" in found) == (shape.routes == 4)
    assert all(value > 0 for name, value in found.items() if name != "error")


def test_calls_take_turns() -> None:
    seen: list[str] = []
    times = benchmark.interleaved({name: lambda name=name: seen.append(name) for name in "ab"}, repeats=3)
    assert seen == list("abababab")
    assert times.keys() == {"a", "b"}


def test_ops_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(benchmark.OPS, "tiny", OpShape(1, 4, 16, 2, 16))
    threads = torch.get_num_threads()
    try:
        assert tool.main(["ops", "--shapes", "tiny", "--repeats", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "scan backend" in out.splitlines()[0]
    assert "published form" in out
    assert "along four routes, merged" in out


def test_models_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        models = ["--models", "test_convnext", "test_vmamba", "--img-size", "64", "--repeats", "1", "--train"]
        assert tool.main(["models", *models]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "test_vmamba forward + backward at 64" in capsys.readouterr().out
