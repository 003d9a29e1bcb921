"""The kernel report: what it counts and compiles, and how it refuses."""

import pytest

from ssmvision.data import UserError
from ssmvision.engine.kernel_report import TARGETS, Finding, examine, kernels, traffic
from tools import kernel_report


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("tokens", "channels", "states", "rank"), [(3136, 192, 1, 6), (196, 768, 1, 24), (196, 384, 16, 24)]
)
def test_four_routes_move_a_fraction_of_the_bytes(target, tokens, channels, states, rank):
    pytest.importorskip("triton")
    found = traffic(32, 4, channels, states, rank, tokens, target)
    assert found.cached < found.cold <= 0.35 * found.materialised
    assert 83 <= found.materialised <= 88


def test_what_is_counted_follows_the_cache():
    pytest.importorskip("triton")
    small, large = (traffic(32, 4, 768, 1, 24, tokens, "sm_90") for tokens in (196, 3136))
    assert (small.fits, large.fits) == (True, False)
    assert large.cached == pytest.approx(2 + 2 + 4 + 4 * (2 + 24) * 2 / 768)
    assert large.in_flight == 32 * 768 * 3136 * 4
    assert large.bound == "memory"
    assert large.picoseconds == pytest.approx(large.cold / 3.35)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("operator", ["selective_scan", "linear_scan"])
def test_kernels_compile_within_their_budgets(monkeypatch, operator, target):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    variants = kernels(operator, "float32", target)
    for variant in variants[:2]:
        found = examine(variant, target)
        assert not found.broken, found
        assert min(found.widths.values()) == 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "name", "dtype", "target"),
    [
        ("selective_scan", "forward, VMamba", "bfloat16", "sm_80"),
        ("selective_scan", "forward, Vim", "bfloat16", "sm_80"),
        ("selective_scan", "backward, Vim", "bfloat16", "sm_80"),
        ("selective_scan", "forward, Vim", "float32", "sm_80"),
        ("selective_scan", "forward, Vim", "float32", "gfx942"),
        ("selective_scan", "forward, Mamba", "float32", "gfx942"),
        ("selective_scan", "backward, Mamba", "float32", "gfx942"),
        ("ssd_scan", "forward, y", "bfloat16", "gfx942"),
        ("ssd_scan", "forward, y", "float32", "gfx942"),
        ("ssd_scan", "backward, step and A", "float32", "gfx942"),
    ],
)
def test_the_tightest_kernels_compile_within_their_budgets(monkeypatch, operator, name, dtype, target):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (variant,) = (v for v in kernels(operator, dtype, target) if v.name.endswith(name))
    found = examine(variant, target)
    assert not found.broken, found


def test_broken_budgets_are_told():
    found = Finding("x", 129, 128, 8, 50_000, {"u_ptr": 64}, {})
    assert found.broken == [
        "129 registers, at most 128", "8 spilled", "50000 bytes of shared memory, at most 49152",
        "u_ptr read by 64 bits, not 128",
    ]  # fmt: skip
    assert not Finding("x", 128, 128, 0, 0, {"u_ptr": 128}, {}).broken


def test_the_interpreter_is_refused(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="TRITON_INTERPRET=1 is set"):
        examine(kernels("linear_scan", "float32", "sm_90")[0], "sm_90")
    assert kernel_report.main(["--operators", "linear_scan"]) == 2
    assert "unset it for the report" in capsys.readouterr().err


def test_wrong_arguments_are_told(capsys):
    with pytest.raises(SystemExit) as stop:
        kernel_report.main(["--targets", "sm_99"])
    assert stop.value.code == 2
    assert "sm_99" in capsys.readouterr().err.splitlines()[-1]
