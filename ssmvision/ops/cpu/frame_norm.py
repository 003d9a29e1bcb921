"""`frame_norm` on the CPU: see `csrc/frame_norm.cpp`."""

import torch
from torch import Tensor

from . import channels_last, contiguous


def direct(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and the mean and the inverse of the standard deviation of each channel's group, (n, c)."""
    weight, bias = contiguous(weight, bias)
    return torch.ops.ssmvision_cpu.frame_norm(channels_last(x), weight, bias, groups, eps, activation)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse: Tensor, groups: int, eps: float,
    activation: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias."""
    weight, bias = contiguous(weight, bias)
    dx, dweight, dbias = torch.ops.ssmvision_cpu.frame_norm_backward(
        channels_last(dy), channels_last(x), weight, bias, mean, inverse, groups, activation
    )
    return dx, dweight.sum(0), dbias.sum(0)
