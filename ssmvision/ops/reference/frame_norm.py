"""What `frame_norm` means, in torch's own operators."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

# Numbered as in cpu/csrc/kernels.h.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "elu": F.elu,
}
ACTIVATIONS = tuple(_FUNCTIONS)


def definition(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, activation: int) -> Tensor:
    """Group normalization and activation of pictures (n, c, h, w)."""
    return activate(F.group_norm(x, groups, weight, bias, eps), activation)


def activate(x: Tensor, activation: int) -> Tensor:
    """An activation by its number."""
    return _FUNCTIONS[ACTIVATIONS[activation]](x)
