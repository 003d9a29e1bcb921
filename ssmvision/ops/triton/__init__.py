"""The Triton backend (CUDA and ROCm from one source), one module per operator; triton is imported on first use."""

import functools
import importlib.util
import os


class TritonUnavailableError(RuntimeError):
    """Triton cannot run here; the message says why."""


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 is set: kernels then run on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def devices() -> tuple[str, ...]:
    """Types of devices whose tensors the kernels accept."""
    return ("cuda", "cpu") if interpreting() else ("cuda",)


@functools.cache
def load() -> None:
    """Make sure that triton is there.

    Raises:
        TritonUnavailableError: It is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise TritonUnavailableError("triton is not installed; it comes with torch for Linux, or: pip install triton")
