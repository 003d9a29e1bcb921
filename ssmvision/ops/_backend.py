"""Which code runs an operator: decided once per call, visible, and never a silent fall to a slow path."""

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import cpu, triton

BACKENDS = ("auto", "cpu", "triton", "reference")


def resolve(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend for tensors of `dtype` on `device`: "cpu", "triton" or "reference".

    Args:
        requested: A backend name; "auto" defers to the environment variable `SSMVISION_BACKEND`, then to the device.
        device: Where the tensors are.
        dtype: Floating-point type of the tokens.

    Raises:
        ValueError: Unknown backend, or one that cannot run these tensors.
        NativeBuildError: "cpu" was asked for by name and the native library cannot be built.
    """
    name = requested if requested != "auto" else os.environ.get("SSMVISION_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "reference" or device.type == "meta":
        return "reference"
    if name == "auto":
        return _automatic(device.type, dtype)
    if device.type != {"cpu": "cpu", "triton": "cuda"}[name]:
        raise ValueError(f"backend {name!r} cannot run tensors on {device}")
    if dtype == torch.float64:
        raise ValueError(f"backend {name!r} computes in float32; use backend='reference' for float64")
    if name == "cpu":
        cpu.load()
    else:
        triton.load()
    return name


def _automatic(device: str, dtype: torch.dtype) -> str:
    reason = _obstacle(device)
    if dtype == torch.float64:
        reason = "it computes in float32 and the tensors are float64"
    if reason is None:
        return {"cpu": "cpu", "cuda": "triton"}[device]
    _warn_once(f"selective_scan on {device} runs on the slow PyTorch reference backend, because the native one is not "
               f"usable: {reason}. Silence this by asking for it: SSMVISION_BACKEND=reference.")  # fmt: skip
    return "reference"


@functools.cache
def _obstacle(device: str) -> str | None:
    """Why the fast backend of a device cannot run, or None if it can."""
    loaders: dict[str, Callable[[], None]] = {"cpu": cpu.load, "cuda": triton.load}
    if device not in loaders:
        return f"there is none for {device} tensors"
    try:
        loaders[device]()
    except (cpu.NativeBuildError, NotImplementedError) as error:
        return str(error)
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def backend_info() -> dict[str, Any]:
    """What would run a float32 scan in this process, per device type, and why.

    Builds the native library if it is not there yet.

    Returns:
        For "cpu" and "cuda": {"backend": name, "detail": instruction set or the reason for the slow path}; and under
        "override" the value of `SSMVISION_BACKEND`.
    """
    info: dict[str, Any] = {"override": os.environ.get("SSMVISION_BACKEND")}
    for device, fast in (("cpu", "cpu"), ("cuda", "triton")):
        obstacle = _obstacle(device)
        detail = obstacle or (cpu.instruction_set() if device == "cpu" else "")
        info[device] = {"backend": "reference" if obstacle else fast, "detail": detail}
    return info
