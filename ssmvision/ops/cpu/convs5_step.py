"""`convs5_step` on the CPU: see `csrc/convs5_step.cpp`."""

import torch
from torch import Tensor

from . import channels_last, contiguous


def direct(u: Tensor, state: Tensor, *args: Tensor | None, options: tuple[int, float, int]) -> tuple[Tensor, Tensor]:
    """The output and the next state, without a gradient."""
    return torch.ops.ssmvision_cpu.convs5_step(channels_last(u), channels_last(state), *contiguous(*args), *options)
