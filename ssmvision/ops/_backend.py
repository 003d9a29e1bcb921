"""Which code runs an operator: decided once per call, visible, and never a silent fall to a slow path."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from . import cpu, triton

try:  # private names of torch: with one that lacks them, every call goes through its dispatcher
    from torch._C._functorch import peek_interpreter_stack
    from torch.utils._python_dispatch import _len_torch_dispatch_stack
except ImportError:
    peek_interpreter_stack = _len_torch_dispatch_stack = None  # type: ignore[assignment]

BACKENDS = ("auto", "cpu", "triton", "reference")
_FASTEST = {"cpu": "cpu", "cuda": "triton"}  # "cuda" is also what torch calls ROCm devices
_LOADERS: dict[str, Callable[[], None]] = {"cpu": cpu.load, "triton": triton.load}
_DEVICES: dict[str, Callable[[], tuple[str, ...]]] = {"cpu": lambda: ("cpu",), "triton": triton.devices}

_lowering = 0  # how many `lowered_for_export` are open


class lowered_for_export:
    """Inside, `torch.export` and all that builds on it see operators as standard ones of torch instead of ours.

    What is exported then runs where this package is not installed. Outside of an export nothing changes. A single call
    asks for the same, at any time, by `backend="exportable"`.
    """

    def __enter__(self) -> None:
        global _lowering
        _lowering += 1

    def __exit__(self, *_: object) -> None:
        global _lowering
        _lowering -= 1


def shortcut(
    operator: str, composite: Callable[..., Any], direct: Callable[..., Any] | None, requested: str, *args: Any
) -> Any:
    """The result of a public operator on a way past torch's dispatcher; None if it has to go through it.

    There are two: an export wants operators of torch instead of ours, and where only autograd looks into a call, a
    backend may run it in one piece. A short scan takes less time than the dispatcher's layers.

    Args:
        operator: Its name.
        composite: What does its work in layers.
        direct: What does it with a backend that has a function `direct`, given as first argument; None if it cannot.
        requested: A backend name.
        args: All arguments of the operator, tokens first.
    """
    if requested == "exportable" or (_lowering > 0 and torch.compiler.is_exporting()):
        return composite(*args, "exportable")
    if direct is None or watched(args):
        return None
    backend = choose(operator, requested, args[0])
    return direct(backend, *args) if hasattr(backend, "direct") else None


_PLAIN = frozenset({Tensor, nn.Parameter, type(None), bool, int, float})  # types that take no part in a call


def watched(args: tuple[Any, ...]) -> bool:
    """Whether a compiler, a trace, a transform, a mode or a subclass of Tensor looks into a call."""
    if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing() or has_torch_function(args):
        return True
    if getattr(forward_ad, "_current_level", -1) >= 0:  # tangents are carried along
        return True
    if peek_interpreter_stack is None or peek_interpreter_stack() is not None or _len_torch_dispatch_stack():
        return True
    return not _PLAIN.issuperset(map(type, args))


def builds_graph(*args: Any) -> bool:
    """Whether autograd looks into a call."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args)


def run(operator: str, *args: Any) -> Any:
    """Calls a canonical operator, the last of whose arguments is the backend."""
    *rest, backend = args
    if backend == "exportable":
        return _module(backend, operator).forward(*rest)
    return getattr(torch.ops.ssmvision, f"{operator}_forward")(*args)


def choose(operator: str, requested: str, x: Tensor) -> Any:
    """Return the module that runs `operator` on tensors like `x`: `ops.<backend>.<operator>`.

    Args:
        operator: Name of the operator, which every backend has as a module with `forward` and `backward`.
        requested: A backend name; "auto" defers to the environment variable `SSMVISION_BACKEND`, then to the device.
        x: The tokens; their device and floating-point type decide.

    Raises:
        ValueError: Unknown backend, or one that cannot run these tensors.
        NativeBuildError: "cpu" was asked for by name and the native library cannot be built.
    """
    name = requested if requested != "auto" else os.environ.get("SSMVISION_BACKEND", "auto")
    return _decide(operator, name, x.device, x.dtype)


@functools.cache
def _decide(operator: str, name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    return _module(_resolve(operator, name, device, dtype), operator)


def _module(backend: str, operator: str) -> ModuleType:
    return importlib.import_module(f".{backend}.{operator}", __package__)


@functools.cache
def _has(backend: str, operator: str) -> bool:
    return importlib.util.find_spec(f".{backend}.{operator}", __package__) is not None


def _resolve(operator: str, name: str, device: torch.device, dtype: torch.dtype) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)}")
    if name == "reference" or device.type == "meta":
        return "reference"
    if name == "auto":
        return _automatic(operator, device.type, dtype)
    if device.type not in _DEVICES[name]():
        raise ValueError(f"backend {name!r} cannot run tensors on {device}")
    if dtype in (torch.float64, torch.complex128):
        raise ValueError(f"backend {name!r} computes in float32; use backend='reference' for float64")
    if not _has(name, operator):
        raise ValueError(f"backend {name!r} has no {operator} yet")
    _LOADERS[name]()
    return name


def _automatic(operator: str, device: str, dtype: torch.dtype) -> str:
    name = _FASTEST.get(device)
    reason = _obstacle(name, operator) if name else f"there is none for {device} tensors"
    if dtype in (torch.float64, torch.complex128):
        reason = "it computes in float32 and the tensors are float64"
    if name is not None and reason is None:
        return name
    _warn_once(f"{operator} on {device} runs on the slow PyTorch reference backend, because the native one is not "
               f"usable: {reason}. Silence this by asking for it: SSMVISION_BACKEND=reference.")  # fmt: skip
    return "reference"


@functools.cache
def _obstacle(backend: str, operator: str) -> str | None:
    """Why a fast backend cannot run an operator, or None if it can."""
    if not _has(backend, operator):
        return f"the {backend} backend has no {operator} yet"
    try:
        _LOADERS[backend]()
    except (cpu.NativeBuildError, triton.TritonUnavailableError) as error:
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
    for device, fast in _FASTEST.items():
        obstacle = _obstacle(fast, "selective_scan")
        detail = obstacle or (cpu.instruction_set() if device == "cpu" else "")
        info[device] = {"backend": "reference" if obstacle else fast, "detail": detail}
    return info
