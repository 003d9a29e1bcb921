"""`linear_scan` on the CPU: see `csrc/linear_scan.cpp`."""

import torch
from torch import Tensor

from .._library import Gradients
from . import contiguous, slices


def forward(
    a: Tensor, x: Tensor, initial_state: Tensor | None, reset: Tensor | None, reverse: bool, out: tuple[Tensor, Tensor]
) -> None:
    """Fill `out` = (h, last state); shapes as in `ops.linear_scan._forward`."""
    initial_state, reset = contiguous(initial_state, reset)
    h, last = out
    x_rows = _rows(x if x.is_complex() else x.float())
    torch.ops.ssmvision_cpu.linear_scan(
        _rows(a), x_rows, initial_state, reset, _sharing(a, x), a.is_complex(), reverse, _parts(x_rows), _rows(h), last
    )


def backward(
    dh: Tensor, dlast: Tensor | None, h: Tensor, a: Tensor, initial_state: Tensor | None, reset: Tensor | None,
    reverse: bool,
) -> Gradients:  # fmt: skip
    """Gradients of a, x and initial_state."""
    dlast, initial_state, reset = contiguous(dlast, initial_state, reset)
    b, length, p, q = h.shape
    h_rows, sharing = _rows(h), _sharing(a, h)
    parts = _parts(h_rows)
    dx, dinitial = torch.empty_like(h), a.new_empty(b, p, q)
    # The gradients of decays that are constant in time are summed over time, the others where several states share one.
    if a.shape[1] == 1:
        da = a.new_zeros(1, b, 1, p, q)
    elif sharing == 1:
        da = a.new_empty(1, b, length, p, q)
    else:
        da = a.new_zeros(parts, b, length, p, 1)
    torch.ops.ssmvision_cpu.linear_scan_backward(
        _rows(dh), dlast, h_rows, _rows(a), initial_state, reset, sharing, a.is_complex(), reverse, parts,
        da, _rows(dx), dinitial,
    )  # fmt: skip
    # Partial sums are added in a fixed order, so that repeated runs agree to the last bit.
    return da.sum_to_size(1, *a.shape)[0], dx, None if initial_state is None else dinitial


def _rows(x: Tensor) -> Tensor:
    """(b, l, p, q) as (b, l, floats): complex numbers are pairs of floats."""
    rows = (torch.view_as_real(x) if x.is_complex() else x).flatten(2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _sharing(a: Tensor, x: Tensor) -> int:
    """How many consecutive states have the same decay."""
    return 1 if a.shape[3] == x.shape[3] else x.shape[3]


def _parts(rows: Tensor) -> int:
    return slices(rows.shape[0], rows.shape[2], rows.numel())
