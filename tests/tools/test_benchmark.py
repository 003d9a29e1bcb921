"""The benchmark checks before it measures, and prints what it says it prints."""

import sys

import pytest
import torch

from ssmvision.engine import benchmark
from ssmvision.engine.benchmark import Bar, OpShape, operators, others, published_scan, timing
from ssmvision.ops import cpu
from ssmvision_tools import benchmark as tool


@pytest.mark.parametrize("shape", [OpShape(1, 1, 16, 3, 9, slow=1), OpShape(2, 4, 16, 2, 16, slow=1)])
def test_every_figure_of_a_scan(shape: OpShape) -> None:
    found = benchmark.measure_op(shape, repeats=1)
    assert found.pop("output error") < 2e-6
    assert found.pop("gradient error") < 5e-6
    assert {"forward speedup", "train speedup", "backward / forward", "of exp limit"} <= found.keys()
    assert ("routes / raster" in found) == (shape.routes == 4)
    assert all(value > 0 for value in found.values())


def test_scans_that_disagree_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "published_scan", lambda *args: 2 * published_scan(*args))
    with pytest.raises(RuntimeError, match="scans disagree"):
        benchmark.measure_op(OpShape(1, 1, 16, 3, 9), repeats=1)


def test_a_bar_is_met_or_not() -> None:
    assert Bar(50).judge(50) == "bar >= 50: met"
    assert Bar(50).judge(49.9) == "bar >= 50: NOT met"
    assert Bar(1.15, at_least=False).judge(1.15) == "bar <= 1.15: met"
    assert Bar(1.15, at_least=False).judge(1.16) == "bar <= 1.15: NOT met"


def test_time_is_the_lower_quartile(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 5, 10, 11, 20, 23, 30, 32, 40, 49])  # 5, 1, 3, 2 and 9 seconds
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert benchmark.interleaved({"call": lambda: None}, repeats=5) == {"call": 2000}


def test_bare_exponentials_are_right() -> None:
    cpu.load()
    x = torch.linspace(-126, 126, 256)
    out = torch.full_like(x, torch.nan)
    torch.ops.ssmvision_cpu.exp2(x, 2, out)
    torch.testing.assert_close(out.double(), torch.exp2(x.double()), rtol=3e-7, atol=0)


@pytest.mark.parametrize("package", ["mambapy", "transformers"])
def test_what_could_be_installed_instead_agrees(package: str) -> None:
    pytest.importorskip(package)
    times = benchmark.measure_others(OpShape(1, 1, 32, 16, 9), repeats=1)[package]
    assert times is not None
    assert min(times) > 0


def test_what_is_not_installed_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "find_spec", lambda name: None)
    found = benchmark.measure_others(OpShape(1, 1, 32, 16, 9), repeats=1)
    assert found == {"mambapy": None, "transformers": None}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_memory_of_training_is_linear_in_length() -> None:
    short, long = benchmark.training_memory(8192), benchmark.training_memory(16384)
    assert short is not None
    assert long is not None
    assert 1.7 < long / short < 2.2
    assert 2 * long < 80


def test_time_of_training_grows_with_length() -> None:
    assert benchmark.time_growth(repeats=3, lengths=(64, 4096)) > 1


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
    assert "exponentials/s" in out
    assert "published forward" in out
    assert "bar <= 1.15: " in next(line for line in out.splitlines() if "routes / raster" in line)


def test_models_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        models = ["--models", "test_convnext", "test_vmamba", "--img-size", "64", "--repeats", "1", "--train"]
        assert tool.main(["models", *models]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "test_vmamba forward + backward at 64" in capsys.readouterr().out


def test_convs5_beside_its_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    tool.print_convs5(repeats=1, frames=3, lengths=(2, 4))
    out = capsys.readouterr().out
    assert out.count("GFLOP") == 3
    assert "no cache / ConvS5, sequence model" in out
    assert out.count("bar") == 7


def test_layers_beside_what_bounds_them(capsys: pytest.CaptureFixture[str]) -> None:
    tool.print_layers(repeats=1)
    out = capsys.readouterr().out
    assert out.count("whole layer") == 2
    assert out.count("bar <=") == 6


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
def test_segmenters_beside_their_twins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bars = {"time ratio": Bar(1e-9, at_least=False), "memory ratio": Bar(1e9, at_least=False)}
    monkeypatch.setattr(tool, "SEGMENTER_BARS", {"test_umamba_enc": bars})
    threads = torch.get_num_threads()
    try:
        assert tool.main(["segmenters", "--volume", "16", "32", "64", "--repeats", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "test_umamba_enc: forward at 16 x 32 x 64" in out
    assert "bar <= 1e-09: NOT met" in out
    assert "bar <= 1e+09: met" in out
