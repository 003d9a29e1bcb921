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
    dy = dy.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # `channels_last`, also of a batch of gradients
    dx, dweight, dbias = torch.ops.ssmvision_cpu.frame_norm_backward(
        dy, channels_last(x), weight, bias, mean, inverse, groups, activation
    )
    return dx, dweight.sum(0), dbias.sum(0)
