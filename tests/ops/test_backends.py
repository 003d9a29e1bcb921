"""Which backend runs, who may change that, and what happens where the native library cannot be built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scan_cases import Case, cast, make

from ssmvision.ops import backend_info, selective_scan

ROOT = Path(__file__).parents[2]
SCAN = """
import torch
from ssmvision.ops import backend_info, selective_scan
u = torch.ones(1, 3, 5)
for _ in range(3):
    y, last = selective_scan(u, u, -torch.ones(3, 2), torch.ones(1, 2, 5), torch.ones(1, 2, 5))
assert abs(y[0, 0, 0].item() - 2.0) < 1e-6
print(backend_info()["cpu"])
"""


def start(script=SCAN, **environment):
    """A Python process of its own; an environment variable of None is taken away."""
    merged = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "always", **environment}
    merged = {name: str(value) for name, value in merged.items() if value is not None}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script], env=merged, text=True, **pipes)


def run(script=SCAN, **environment):
    process = start(script, **environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def simple_scan(**options):
    return selective_scan(**cast(make(Case()), torch.float32), **options)


def test_backend_info_tells_what_runs():
    info = backend_info()
    assert info["cpu"]["backend"] == "cpu"
    assert info["cpu"]["detail"] in ("avx512", "avx2", "generic")
    assert info["cuda"]["backend"] in ("triton", "reference")
    assert info["cuda"]["detail"] if info["cuda"]["backend"] == "reference" else True


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_environment_chooses(monkeypatch, name):
    monkeypatch.setenv("SSMVISION_BACKEND", name)
    assert backend_info()["override"] == name
    assert torch.equal(simple_scan()[0], simple_scan(backend=name)[0])


def test_environment_reaches_the_operator(monkeypatch):
    monkeypatch.setenv("SSMVISION_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        simple_scan()


def test_argument_beats_environment(monkeypatch):
    monkeypatch.setenv("SSMVISION_BACKEND", "nonsense")
    simple_scan(backend="reference")


def test_float64_runs_on_the_reference_and_says_so_once():
    script = """
import torch
from ssmvision.ops import selective_scan
u, b = torch.ones(1, 3, 5).double(), torch.ones(1, 2, 5).double()
for _ in range(3):
    selective_scan(u, u, -torch.ones(3, 2).double(), b, b)
"""
    _, err = run(script)
    assert err.count("RuntimeWarning") == 1
    assert "float64" in err
    assert "SSMVISION_BACKEND=reference" in err


def test_native_switched_off_works_and_warns_once():
    out, err = run(SSMVISION_NATIVE="0")
    assert "'backend': 'reference'" in out
    assert "SSMVISION_NATIVE=0" in out
    assert err.count("RuntimeWarning") == 1
    assert "slow" in err
    assert "SSMVISION_BACKEND=reference" in err


def test_asked_for_reference_is_not_warned_of():
    _, err = run(SSMVISION_NATIVE="0", SSMVISION_BACKEND="reference")
    assert "RuntimeWarning" not in err


def test_native_asked_for_by_name_is_never_replaced():
    process = start(SSMVISION_NATIVE="0", SSMVISION_BACKEND="cpu")
    _, err = process.communicate(timeout=300)
    assert process.returncode
    assert "NativeBuildError: switched off by SSMVISION_NATIVE=0" in err


@pytest.mark.parametrize("compiler", [None, "/does/not/exist/g++"])
def test_no_compiler_works_and_tells_what_to_install(tmp_path, compiler):
    out, err = run(PATH=str(tmp_path), CXX=compiler, SSMVISION_CACHE=tmp_path / "cache")
    assert "'backend': 'reference'" in out
    assert err.count("RuntimeWarning") == 1
    assert "install g++ or clang" in err if compiler is None else compiler in err


def test_failed_compilation_is_told(tmp_path):
    out, err = run(CXX="/bin/false", SSMVISION_CACHE=tmp_path)
    assert "'backend': 'reference'" in out
    assert "false failed" in err
    assert not list(tmp_path.glob(".build-*"))


def test_cache_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("no folder")
    out, err = run(SSMVISION_CACHE=tmp_path / "file" / "cache")
    assert "'backend': 'reference'" in out
    assert err.count("RuntimeWarning") == 1
    assert "cannot write the cache" in err
    assert "set SSMVISION_CACHE" in err


def test_unknown_instruction_set_is_told():
    """A typing error must not turn a fast machine into a slow one in silence."""
    process = start(SSMVISION_ISA="avx3")
    _, err = process.communicate(timeout=300)
    assert "SSMVISION_ISA" in err


@pytest.mark.slow
def test_processes_that_start_at_once_build_one_library(tmp_path):
    processes = [start(SSMVISION_CACHE=tmp_path) for _ in range(3)]
    results = [process.communicate(timeout=500) for process in processes]
    for process, (out, err) in zip(processes, results, strict=True):
        assert process.returncode == 0, err
        assert "'backend': 'cpu'" in out
        assert "Warning" not in err
    left = [path.suffix for path in tmp_path.iterdir()]
    assert left.count(".so") == 1
    assert set(left) <= {".so", ".lock"}
    library = next(tmp_path.glob("*.so"))
    built = library.stat().st_mtime_ns
    run(SSMVISION_CACHE=tmp_path)
    assert library.stat().st_mtime_ns == built


@pytest.mark.slow
def test_built_library_serves_where_no_compiler_is(tmp_path):
    """Built on a login node, used on compute nodes."""
    run(SSMVISION_CACHE=tmp_path / "cache")
    out, _ = run(SSMVISION_CACHE=tmp_path / "cache", PATH=str(tmp_path), CXX=None)
    assert "'backend': 'cpu'" in out


def test_import_builds_nothing(tmp_path):
    run("import ssmvision.ops", SSMVISION_CACHE=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
