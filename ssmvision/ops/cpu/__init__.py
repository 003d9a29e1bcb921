"""The native CPU backend: C++ kernels (`csrc/`) for AVX-512, AVX2 or any other machine, one module per operator."""

import functools
import os
from typing import Any

import torch
from torch import Tensor

from .build import ISAS, NativeBuildError, best_isa, ensure_library

__all__ = ["NativeBuildError", "channels_last", "contiguous", "instruction_set", "load", "slices"]


@functools.cache
def load() -> None:
    """Load the native library into this process, building it first if needed.

    Raises:
        NativeBuildError: It cannot be built or loaded; asked again, the same answer comes at once.
    """
    if os.environ.get("SSMVISION_NATIVE", "1") == "0":
        raise NativeBuildError("switched off by SSMVISION_NATIVE=0")
    path = ensure_library(instruction_set())
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise NativeBuildError(f"{path} does not load ({error}); delete it to build it anew") from error


@functools.cache
def instruction_set() -> str:
    """The instruction set that the kernels use on this machine; `SSMVISION_ISA` asks for a narrower one.

    Raises:
        NativeBuildError: `SSMVISION_ISA` names none, or one that this machine lacks.
    """
    best = best_isa()
    asked = os.environ.get("SSMVISION_ISA") or best
    available = ISAS[: ISAS.index(best) + 1]
    if asked not in available:
        raise NativeBuildError(f"SSMVISION_ISA={asked} is not one of {', '.join(available)}, which this machine has")
    return asked


def slices(batch: int, channels: int, elements: int) -> int:
    """Into how many channel slices a sample is cut so that every thread has work."""
    return torch.ops.ssmvision_cpu.slices(batch, channels, elements)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The tensors, each in row-major layout; None stays None."""
    return [None if x is None else x.contiguous() for x in tensors]


def channels_last(x: Tensor) -> Tensor:
    """Pictures (n, c, h, w) in memory as (n, h, w, c)."""
    return x.contiguous(memory_format=torch.channels_last)
