"""Builds the native CPU library once with the machine's C++ compiler, into a cache that survives.

Nothing is compiled at import or at `pip install` (a build environment would pull a second torch); the first scan on a
CPU tensor builds it, and every later process loads the cached file.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent / "csrc"
# torch's stable C ABI of version 2.10: a library built against it loads in every later torch.
_STABLE_ABI = "0x020a000000000000"
_FLAGS = ["-O3", "-std=c++20", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
_ISA_FLAGS: dict[str, list[str]] = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"],
}


ISAS = tuple(_ISA_FLAGS)  # narrowest first


class NativeBuildError(RuntimeError):
    """The native library cannot be built here; the message says why and what would help."""


def library_path(isa: str) -> Path:
    """Where the library of this source and instruction set lies, built or not.

    It may have been built on another machine that shares the cache: running it needs no compiler.
    `SSMVISION_CACHE` moves the cache; the default is `~/.cache/ssmvision`.
    """
    digest = hashlib.sha256(" ".join([*_FLAGS, *_ISA_FLAGS[isa], _STABLE_ABI]).encode())
    for source in sorted([*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h")]):
        digest.update(source.read_bytes())
    cache = Path(os.environ.get("SSMVISION_CACHE") or Path.home() / ".cache" / "ssmvision")
    return cache / f"libssmvision_cpu-{platform.machine()}-{isa}-{digest.hexdigest()[:16]}.so"


def ensure_library(isa: str) -> Path:
    """Return the path of the native library for an instruction set, building it if the cache has none.

    Safe when several processes start at once: each builds in a folder of its own and renames the result into place,
    and a rename either happens or does not. A short lock only spares the others the work.

    Raises:
        NativeBuildError: No compiler, a torch without the stable ABI, or a failed compilation.
    """
    path = library_path(isa)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            if not path.exists():
                _build(path, isa)
    except OSError as error:
        raise NativeBuildError(f"cannot write the cache {path.parent} ({error}); set SSMVISION_CACHE") from error
    return path


def _compiler() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or ""


def _build(path: Path, isa: str) -> None:
    compiler = _compiler()
    if sys.platform == "win32":
        raise NativeBuildError("native kernels are built for Linux and macOS only")
    if not compiler:
        raise NativeBuildError("no C++ compiler found; install g++ or clang, or point CXX at one")
    include = Path(torch.__file__).parent / "include"
    if not (include / "torch" / "csrc" / "stable" / "library.h").exists():
        raise NativeBuildError(f"torch {torch.__version__} has no stable C ABI headers; torch >= 2.10 does")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        flags = [*_FLAGS, *_ISA_FLAGS[isa], f"-DTORCH_TARGET_VERSION={_STABLE_ABI}", f"-I{include}"]
        objects = {source: f"{folder}/{source.stem}.o" for source in sorted(_SOURCES.glob("*.cpp"))}
        commands = [[compiler, *flags, "-c", str(source), "-o", out] for source, out in objects.items()]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        built = Path(folder) / path.name
        _run([compiler, "-shared", "-o", str(built), *objects.values(), *_link_flags()])
        built.replace(path)


def best_isa() -> str:
    """The widest instruction set of `ISAS` that this machine has."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "generic"
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "generic")


def _link_flags() -> list[str]:
    # torch is loaded already and provides its symbols; Linux must be told by which library, macOS must be told to wait.
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr.strip().splitlines() or ["no message"]
        raise NativeBuildError(f"{Path(command[0]).name} failed: {reason[0]}")


class _lock:
    """An advisory lock on a file; where locks do not exist, building twice is merely slower."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        self.file = open(self.path, "w")
        try:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass

    def __exit__(self, *error: object) -> None:
        self.file.close()
