"""Obtain the tests of the installed timm: they are in its source distribution, not in its wheel."""

import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import pytest
import timm

CACHE = Path(__file__).parents[2] / ".cache" / "timm_tests"
_NO_NETWORK = (
    "NewConnectionError",
    "ConnectTimeoutError",
    "NameResolutionError",
    "ProxyError",
    "Network is unreachable",
    "Failed to establish a new connection",
)


def timm_tests() -> Path:
    """Return the folder with the tests of the installed timm, fetched once into the cache."""
    given = os.environ.get("SSMVISION_TIMM_TESTS")
    if given:
        return _checked(Path(given))
    target = CACHE / f"timm-{timm.__version__}"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            unpacked = _unpack(_download(Path(folder)))
            try:
                unpacked.rename(target)
            except OSError:  # another worker was faster
                if not target.exists():
                    raise
    return _checked(target)


def _checked(source: Path) -> Path:
    version = f"\nVersion: {timm.__version__}\n"
    if not (source / "tests" / "test_models.py").is_file() or version not in (source / "PKG-INFO").read_text():
        pytest.fail(f"{source} is not the unpacked source distribution of timm {timm.__version__}")
    return source / "tests"


def _download(folder: Path) -> Path:
    # Built in isolation: reading the metadata of the sdist needs timm's build backend, which pip then brings along.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--no-deps", "--no-binary=timm"]
    command += [f"--dest={folder}", f"timm=={timm.__version__}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        return next(folder.glob("timm-*.tar.gz"))
    output = done.stdout + done.stderr
    if "PIP_NO_INDEX" in os.environ or any(sign in output for sign in _NO_NETWORK):
        reason = "NOT CHECKED: no network to fetch timm's tests; set SSMVISION_TIMM_TESTS to an unpacked timm sdist"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    pytest.fail(f"could not fetch the source distribution of timm {timm.__version__}:\n{output}")


def _unpack(archive: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(archive.parent, filter="data")
    return archive.parent / archive.name.removesuffix(".tar.gz")
