"""`selective_scan` on the CPU: see `csrc/selective_scan_forward.cpp` and `csrc/selective_scan_backward.cpp`."""

from typing import Any

import torch
from torch import Tensor

from .._library import Gradients, empty_like_layout, in_float32, no_autocast
from . import contiguous, slices


def direct(*args: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`ops.selective_scan` without the product with z, in one call in which the library checks and allocates.

    Args:
        args: Those of the public function but the backend, and whether checkpoints are wanted.

    Returns:
        y, last state and checkpoints; nothing but None unless all tensors are float32 and fit.
    """
    return torch.ops.ssmvision_cpu.selective_scan_direct(*args)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    dt_proj: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, routes: Tensor | None,
    delta_softplus: bool, merge: bool, out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out` = (y, last state, checkpoints); shapes as in `ops.selective_scan._forward`."""
    u, delta, B, C = in_float32((u, delta, B, C))
    A, D, delta_bias, dt_proj, initial_state = contiguous(A, D, delta_bias, dt_proj, initial_state)
    reset, routes = contiguous(reset, routes)
    y, last, checkpoints = out
    if _partial(routes, u):
        y.zero_()
    parts = slices(u.shape[0], A.shape[1], u.shape[0] * A.numel() * u.shape[-1])
    torch.ops.ssmvision_cpu.selective_scan(
        u, delta, A, B, C, D, delta_bias, dt_proj, initial_state, reset, routes, delta_softplus, merge, parts,
        y, last.transpose(-1, -2), checkpoints,
    )  # fmt: skip


def backward(
    dy: Tensor, dlast: Tensor | None, checkpoints: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, delta_bias: Tensor | None, dt_proj: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, routes: Tensor | None, delta_softplus: bool, merge: bool,
) -> Gradients:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, delta_bias, dt_proj and initial_state."""
    u, delta, B, C = in_float32((u, delta, B, C))
    A, D, delta_bias, dlast, reset, routes = contiguous(A, D, delta_bias, dlast, reset, routes)
    b, k, d, n, length = u.shape[0], *A.shape, u.shape[-1]
    full = delta
    if dt_proj is not None:  # materialised for the time of this one call, as two matrix products per gradient need it
        with no_autocast(u):  # a backward pass may run inside the caller's autocast region
            full = (delta.transpose(-1, -2) @ dt_proj.transpose(-1, -2)).transpose(-1, -2)
    du, dfull = (empty_like_layout(x, x.shape) for x in (u, full))
    if _partial(routes, u):
        du.zero_()
        dfull.zero_()
    parts = slices(b, d, b * A.numel() * length)
    dA, dinitial = u.new_empty(b, k, n, d), u.new_empty(b, k, n, d)
    dD = None if D is None else u.new_empty(b, k, d)
    dbias = None if delta_bias is None else u.new_empty(b, k, d)
    dB, dC = (u.new_zeros(parts, b, k, x.shape[2], length, n) for x in (B, C))
    torch.ops.ssmvision_cpu.selective_scan_backward(
        dy, dlast, u, full, A, B, C, D, delta_bias, reset, routes, delta_softplus, merge, parts, checkpoints,
        du, dfull, dA, dB, dC, dD, dbias, dinitial,
    )  # fmt: skip
    ddelta, dproj = dfull, None
    if dt_proj is not None:
        with no_autocast(u):
            ddelta = (dfull.transpose(-1, -2) @ dt_proj).transpose(-1, -2)
            dproj = (dfull @ delta.transpose(-1, -2)).sum(0)
    # Partial sums are added in a fixed order, so that repeated runs agree to the last bit.
    return (
        du,
        ddelta,
        _total(dA).transpose(-1, -2),
        _total(dB).transpose(-1, -2),
        _total(dC).transpose(-1, -2),
        None if dD is None else _total(dD),
        None if dbias is None else _total(dbias),
        dproj,
        None if initial_state is None else dinitial.transpose(-1, -2),
    )


def _total(parts: Tensor) -> Tensor:
    """The sum over the first dimension; no copy of what is one part only."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _partial(routes: Tensor | None, u: Tensor) -> bool:
    """Whether routes may leave tokens unvisited, whose outputs are then zero."""
    return routes is not None and routes.shape[1] != u.shape[-1]
