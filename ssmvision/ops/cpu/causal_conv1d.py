"""`causal_conv1d` on the CPU: see `csrc/causal_conv1d.cpp`."""

import torch
from torch import Tensor

from .._library import Gradients, empty_like_layout
from . import contiguous, slices


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, reset: Tensor | None, silu: bool, out: Tensor
) -> None:
    """Fill `out`; shapes as in `ops.causal_conv1d._forward`."""
    bias, routes, reset, weight_ = contiguous(bias, routes, reset, weight.transpose(1, 2))
    parts = slices(x.shape[0], weight.shape[1], out.numel())
    torch.ops.ssmvision_cpu.causal_conv1d(x.float(), weight_, bias, routes, reset, silu, parts, out)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, reset: Tensor | None, silu: bool
) -> Gradients:
    """Gradients of x, weight and bias."""
    bias, routes, reset, weight_ = contiguous(bias, routes, reset, weight.transpose(1, 2))
    (b, _, d, _), (k, _, width) = x.shape, weight.shape
    x = x.float()
    dx, dweight, dbias = empty_like_layout(x, x.shape).zero_(), x.new_empty(b, k, width, d), x.new_empty(b, k, d)
    parts = slices(b, d, dy.numel())
    torch.ops.ssmvision_cpu.causal_conv1d_backward(dy, x, weight_, bias, routes, reset, silu, parts, dx, dweight, dbias)
    return dx, dweight.sum(0).transpose(1, 2), dbias.sum(0)
