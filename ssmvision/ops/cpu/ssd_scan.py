"""`ssd_scan` on the CPU: see `csrc/ssd_scan.cpp`."""

import torch
from torch import Tensor

from .._library import Gradients, in_float32
from . import contiguous, slices


def forward(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, reset: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out` = (y, last state, checkpoints); shapes as in `ops.ssd_scan`."""
    A, initial_state, reset = contiguous(A, initial_state, reset)
    y, last, checkpoints = out
    torch.ops.ssmvision_cpu.ssd_scan(
        *_views(x, step, A, B, C), initial_state, reset, _slices(x, B), _tokens_last(y), last.transpose(-1, -2),
        checkpoints,
    )  # fmt: skip


def backward(
    dy: Tensor, dlast: Tensor | None, checkpoints: Tensor, x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor,
    initial_state: Tensor | None, reset: Tensor | None,
) -> Gradients:  # fmt: skip
    """Gradients of x, step, A, B, C and initial_state."""
    A, dlast, reset = contiguous(A, dlast, reset)
    (b, length, h, p), (g, n) = x.shape, B.shape[2:]
    parts = _slices(x, B)
    dx, dstep, dA = step.new_empty(x.shape), step.new_empty(step.shape), step.new_empty(b, h)
    dB, dC = step.new_zeros(parts, b, g, length, n), step.new_zeros(parts, b, g, length, n)
    dinitial = step.new_empty(b, h, n, p)
    torch.ops.ssmvision_cpu.ssd_scan_backward(
        _tokens_last(dy), dlast, checkpoints, *_views(x, step, A, B, C), reset, parts, _tokens_last(dx),
        _tokens_last(dstep.unsqueeze(-1)), dA, dB, dC, dinitial,
    )  # fmt: skip
    # Partial sums are added in a fixed order, so that repeated runs agree to the last bit.
    return (
        dx,
        dstep,
        dA.sum(0),
        dB.sum(0).transpose(1, 2),
        dC.sum(0).transpose(1, 2),
        None if initial_state is None else dinitial.transpose(-1, -2),
    )


def _views(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
    """As the kernels see them, without copies of what is float32."""
    x, B, C = map(_tokens_last, in_float32((x, B, C)))
    return [x, _tokens_last(step.unsqueeze(-1)), A, B, C]


def _tokens_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _slices(x: Tensor, B: Tensor) -> int:
    heads = x.shape[2]
    return slices(x.shape[0], 16 * heads, x.numel() * B.shape[-1])  # one head is worth a slice, as 16 channels are
