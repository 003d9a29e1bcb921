"""What operators share: how they are registered with torch, how shapes are checked, which layouts outputs have."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

CHUNK = 64  # steps between two states that a scan saves for its backward pass; must equal CHUNK in cpu/csrc/kernels.h

Gradients = Sequence[Optional[Tensor]]  # one per differentiable input, None where that is absent

_NAMESPACE = "ssmvision"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")


class Kernel(NamedTuple):
    """An operator that calls a backend: its schema, its implementation, and its shapes and strides for fake tensors."""

    schema: str
    call: Callable[..., Any]
    fake: Callable[..., Any]


def register(
    schema: str,
    composite: Callable[..., Any],
    forward: Kernel,
    backward: Kernel,
    autograd: Callable[..., Any],
    setup_context: Callable[..., None],
) -> None:
    """Register a public operator and the two canonical ones that do its work.

    Args:
        schema: Of the public operator.
        composite: Brings its arguments to canonical form and calls `forward`.
        forward: The canonical operator.
        backward: Its gradient.
        autograd: Backward formula of `forward`, with its saved tensors.
        setup_context: Saves them.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, composite, "CompositeImplicitAutograd")
    for device in ("cpu", "cuda"):
        _library.impl(name, _without_autocast(name, device), f"Autocast{device.upper()}")
    for kernel in (forward, backward):
        kernel_name = kernel.schema.partition("(")[0]
        _library.define(kernel.schema)
        _library.impl(kernel_name, kernel.call, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{kernel_name}", kernel.fake, lib=_library)
    canonical = f"{_NAMESPACE}::{forward.schema.partition('(')[0]}"
    torch.library.register_autograd(canonical, autograd, setup_context=setup_context, lib=_library)


def _without_autocast(name: str, device_type: str) -> Callable[..., Any]:
    """Under autocast operators run as they are: they take any mix of dtypes and compute in float32."""

    def call(*args: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return getattr(torch.ops.ssmvision, name)(*args)

    return call


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Switches autocast off for operations on `x`'s device, where it is on: kernels and definitions mean float32."""
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def expect_real(operator: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise a RuntimeError that names a tensor which is not real floating point: casting would drop what it holds."""
    for name, x in tensors.items():
        if x is not None and not x.is_floating_point():
            raise RuntimeError(f"{operator}: {name} must be real floating point, not {x.dtype}")


def expect_number(operator: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise a RuntimeError that names a tensor which is neither real nor complex floating point."""
    for name, x in tensors.items():
        if x is not None and not (x.is_floating_point() or x.is_complex()):
            raise RuntimeError(f"{operator}: {name} must be real or complex floating point, not {x.dtype}")


def expect_reset(operator: str, reset: Tensor | None, shape: tuple[Any, ...]) -> None:
    """Raise a RuntimeError if flags of resets are not bool of the given shape."""
    if reset is None:
        return
    expect(operator, "reset", reset, shape)
    if reset.dtype != torch.bool:
        raise RuntimeError(f"{operator}: reset must be bool, not {reset.dtype}")


def expect_routes(operator: str, routes: Tensor | None, shape: tuple[Any, ...]) -> None:
    """Raise a RuntimeError if a table of routes is not int64 of the given shape."""
    if routes is None:
        return
    expect(operator, "routes", routes, shape)
    if routes.dtype != torch.int64:
        raise RuntimeError(f"{operator}: routes must be int64, not {routes.dtype}")


def expect(operator: str, name: str, x: Tensor, shape: tuple[Any, ...]) -> None:
    """Raise a RuntimeError that names the tensor and both shapes if `x` does not have `shape`."""
    if tuple(x.shape) != shape:
        raise RuntimeError(f"{operator}: {name} has shape {tuple(x.shape)}, expected {tuple(shape)}")


def cast(x: Tensor | None, dtype: torch.dtype) -> Any:
    """`x.to(dtype)` that costs nothing where nothing is to do."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


def cast_number(x: Tensor | None, dtype: torch.dtype) -> Any:
    """`x` in the precision of the real type `dtype`, real or complex as it is."""
    return cast(x, dtype.to_complex() if x is not None and x.is_complex() else dtype)


def cast_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)` for what is as large as the tokens: 16-bit stays as it is, backends read it."""
    return x if x.dtype in (torch.bfloat16, torch.float16) else cast(x, dtype)


def in_float32(args: Sequence[Any]) -> list[Any]:
    """The arguments with 16-bit tensors widened, for backends that compute on whole float32 tensors."""
    half = (torch.bfloat16, torch.float16)
    return [x.float() if isinstance(x, Tensor) and x.dtype in half else x for x in args]


def empty_like_layout(x: Tensor, shape: tuple[Any, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized (b, k, d, l) tensor that keeps `x`'s habit: channels-last if x's channels are adjacent."""
    b, k, d, length = shape
    if x.stride(2) == 1:
        return x.new_empty(b, k, length, d, dtype=dtype).transpose(-1, -2)
    return x.new_empty(b, k, d, length, dtype=dtype)


def settle(declared: list[Tensor], found: Gradients, given: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """Gradients in the types and layouts that fake tensors promise; empty where an input is absent.

    Args:
        declared: Uninitialized tensors of those types and layouts.
        found: What a backend returned.
        given: The incoming gradients, which an operator must not hand on. With them, what fits is taken as it is and
            its declared memory never touched; without, everything is copied.
    """
    borrowed = {x.data_ptr() for x in given or () if x is not None}
    for i, (target, value) in enumerate(zip(declared, found, strict=True)):
        if value is None or value is target:
            continue
        fits = value.dtype == target.dtype and value.stride() == target.stride()
        if given is not None and fits and value.data_ptr() not in borrowed:
            declared[i] = value
        else:
            target.copy_(value)
    return declared
