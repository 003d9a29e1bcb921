"""The native CPU backend: C++ kernels for AVX-512, AVX2 or any other machine, chosen at run time."""

import functools
import os
from typing import Any

import torch
from torch import Tensor

from .build import ISAS, NativeBuildError, best_isa, ensure_library

__all__ = [
    "NativeBuildError", "causal_conv1d", "causal_conv1d_backward", "instruction_set", "load", "selective_scan",
    "selective_scan_backward",
]  # fmt: skip

_MIN_ELEMENTS_PER_TASK = 1 << 20  # about 0.3 ms of work: less is not worth waking a second thread


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


def _slices(batch: int, channels: int, elements: int) -> int:
    """Into how many channel slices a sample is cut so that every thread has work."""
    threads = min(torch.get_num_threads(), max(1, elements // _MIN_ELEMENTS_PER_TASK))
    return max(1, min(-(-threads // max(1, batch)), -(-channels // 16)))


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if x is None else x.contiguous() for x in tensors]


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    dt_proj: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, routes: Tensor | None,
    delta_softplus: bool, merge: bool, out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out` = (y, last state, checkpoints); shapes as in `ops.selective_scan._forward`, all float32."""
    A, D, delta_bias, dt_proj, initial_state = _contiguous(A, D, delta_bias, dt_proj, initial_state)
    reset, routes = _contiguous(reset, routes)
    y, last, checkpoints = out
    slices = _slices(u.shape[0], A.shape[1], u.shape[0] * A.numel() * u.shape[-1])
    torch.ops.ssmvision_cpu.selective_scan(
        u, delta, A, B, C, D, delta_bias, dt_proj, initial_state, reset, routes, delta_softplus, merge, slices,
        y, last.transpose(-1, -2), checkpoints,
    )  # fmt: skip


def selective_scan_backward(
    dy: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    delta_bias: Tensor | None, reset: Tensor | None, routes: Tensor | None, checkpoints: Tensor,
    delta_softplus: bool, merge: bool, du: Tensor, ddelta: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Fill `du` and `ddelta`; return the gradients of A, B, C, D, delta_bias and the initial state, all float32."""
    A, D, delta_bias, dlast, reset, routes = _contiguous(A, D, delta_bias, dlast, reset, routes)
    b, k, d, n, length = u.shape[0], *A.shape, u.shape[-1]
    slices = _slices(b, d, b * A.numel() * length)
    dA, dinitial = u.new_empty(b, k, n, d), u.new_empty(b, k, n, d)
    dD = None if D is None else u.new_empty(b, k, d)
    dbias = None if delta_bias is None else u.new_empty(b, k, d)
    dB, dC = (u.new_zeros(slices, b, k, x.shape[2], length, n) for x in (B, C))
    torch.ops.ssmvision_cpu.selective_scan_backward(
        dy, dlast, u, delta, A, B, C, D, delta_bias, reset, routes, delta_softplus, merge, slices, checkpoints,
        du, ddelta, dA, dB, dC, dD, dbias, dinitial,
    )  # fmt: skip
    # Partial sums are added in a fixed order, so that repeated runs agree to the last bit.
    return (
        dA.sum(0).transpose(-1, -2),
        dB.sum(0).transpose(-1, -2),
        dC.sum(0).transpose(-1, -2),
        None if dD is None else dD.sum(0),
        None if dbias is None else dbias.sum(0),
        dinitial.transpose(-1, -2),
    )


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, silu: bool, out: Tensor
) -> Tensor:
    """Fill and return `out`; shapes as in `ops.causal_conv1d._forward`, all float32."""
    bias, routes, weight_ = _contiguous(bias, routes, weight.transpose(1, 2))
    slices = _slices(x.shape[0], weight.shape[1], out.numel())
    torch.ops.ssmvision_cpu.causal_conv1d(x, weight_, bias, routes, silu, slices, out)
    return out


def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, silu: bool, dx: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add to the zeroed `dx`; return it and the gradients of weight and bias."""
    bias, routes, weight_ = _contiguous(bias, routes, weight.transpose(1, 2))
    (b, _, d, _), (k, _, width) = x.shape, weight.shape
    dweight, dbias = x.new_empty(b, k, width, d), x.new_empty(b, k, d)
    slices = _slices(b, d, dy.numel())
    torch.ops.ssmvision_cpu.causal_conv1d_backward(dy, x, weight_, bias, routes, silu, slices, dx, dweight, dbias)
    return dx, dweight.sum(0).transpose(1, 2), dbias.sum(0)
