"""`frame_norm`, group normalization and activation of pictures: what surrounds the convolutions of ConvS5.

Torch's own operators mean the same and run wherever something looks into the call. Its channels-last kernel takes
numbers one by one where a group is narrower than a vector, and its tanh form of GELU costs a third of a convolution.

Letters: n pictures, c channels, h height, w width.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from . import _backend
from ._library import expect
from .reference import frame_norm as reference
from .reference.frame_norm import ACTIVATIONS, FUNCTIONS

__all__ = ["ACTIVATIONS", "FUNCTIONS", "frame_norm"]


def frame_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, activation: str = "none"
) -> Tensor:
    """Group normalization (arXiv:1803.08494), then an activation.

    Args:
        x: Pictures (n, c, h, w); channels-last in memory is fastest.
        weight: (c,).
        bias: (c,).
        groups: Number of groups; divides c.
        eps: Added to the variance.
        activation: One of `ACTIVATIONS`; "gelu" is the tanh form.

    Returns:
        (n, c, h, w), channels-last in memory where float32 runs on a CPU.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
        ValueError: An activation that does not exist.
    """
    code = activation_code(activation)
    expect("frame_norm", "weight", weight, (x.shape[1],))
    expect("frame_norm", "bias", bias, (x.shape[1],))
    if groups < 1 or x.shape[1] % groups:
        raise RuntimeError(f"frame_norm: {x.shape[1]} channels do not split into {groups} groups")
    args = (x, weight, bias, groups, eps, code)
    if runs_natively(x, weight, bias):
        found = _backend.shortcut("frame_norm", _composite, _direct, "auto", *args)
        if found is not None:
            return found
    return reference.definition(*args)


def activation_code(name: str) -> int:
    """The number that kernels know an activation by."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {name!r}")
    return ACTIVATIONS.index(name)


def runs_natively(x: Tensor, *parameters: Tensor) -> bool:
    """Whether pictures and parameters are what the CPU's kernels take; on other devices torch's own are fast."""
    return x.is_cpu and x.dim() == 4 and all(t.dtype == torch.float32 for t in (x, *parameters))


def _composite(*args: Any) -> Tensor:
    *rest, _ = args
    return reference.definition(*rest)


def _direct(backend: Any, *args: Any) -> Tensor:
    if _backend.builds_graph(*args[:3]):
        return _Direct.apply(backend, *args)
    return backend.direct(*args)[0]


class _Direct(torch.autograd.Function):
    """What autograd knows of `_direct`. Only the pictures are kept, not what the activation was given."""

    @staticmethod
    def forward(ctx: Any, backend: Any, *args: Any) -> Tensor:
        y, *statistics = backend.direct(*args)
        x, weight, bias, *ctx.options = args
        ctx.backend = backend
        ctx.save_for_backward(x, weight, bias, *statistics)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight, bias, *statistics = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the definition's gradient is itself differentiable
            vjp = torch.func.vjp(lambda *tensors: reference.definition(*tensors, *ctx.options), x, weight, bias)
            gradients = vjp[1](dy)
        else:
            gradients = ctx.backend.backward(dy, x, weight, bias, *statistics, *ctx.options)
        return None, *gradients, None, None, None
