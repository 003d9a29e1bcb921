"""What `frame_norm` means, in torch's own operators."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

# Numbered as in cpu/csrc/kernels.h.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": partial(F.gelu, approximate="tanh"),  # layers keep it, and are pickled
    "relu": F.relu,
    "silu": F.silu,
    "elu": F.elu,
}
ACTIVATIONS = tuple(FUNCTIONS)


def definition(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: int) -> Tensor:
    """Group normalization and activation of pictures (n, c, h, w)."""
    return activate(F.group_norm(x, groups, weight, bias, eps), activation)


def activate(x: Tensor, activation: int) -> Tensor:
    """An activation by its number."""
    return FUNCTIONS[ACTIVATIONS[activation]](x)
