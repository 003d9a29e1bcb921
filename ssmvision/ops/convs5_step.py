"""`convs5_step`, one frame of a stream of ConvS5.

Letters: n pictures, c channels, p complex states, h height, w width, k sides of a kernel.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from . import _backend
from .frame_norm import activation_code, runs_natively
from .reference import convs5_step as reference

__all__ = ["convs5_step", "frame_conv_weight"]


def convs5_step(
    u: Tensor,
    state: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    feedthrough: tuple[Tensor, ...] = (),
    groups: int = 1,
    eps: float = 1e-6,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """One step of ConvS5 (arXiv:2310.19694, equations 3 to 5) and of the ResNet block behind it, in one piece.

        x' = A x + B * u,  y = C * x',  and with a feedthrough  act(y + conv2(act(norm2(conv1(act(norm1(y)))))))

    Every convolution keeps the size of the picture, with zeros around it; complex numbers are pairs of channels.

    Args:
        u: Frames (n, c, h, w).
        state: x, (n, p, h, w) complex.
        A: (p,) complex.
        B: (k, k, c, 2p), real and imaginary parts of a state side by side; see `frame_conv_weight`.
        C: (k, k, 2p, c).
        feedthrough: Weight and bias of norm1 and conv1, then of norm2 and conv2; the weights of convolutions are
            (k, k, c, c). Empty for none.
        groups: Groups of both norms.
        eps: Of both norms.
        activation: One of `frame_norm.ACTIVATIONS`.

    Returns:
        The output (n, c, h, w) in u's dtype; and the next state. Without a gradient and in float32, they are
        channels-last in memory on a CPU.

    Raises:
        RuntimeError: Shapes that do not fit.
        ValueError: An activation that does not exist.
    """
    options = groups, eps, activation_code(activation)
    if len(feedthrough) not in (0, 8):
        raise RuntimeError(f"convs5_step: a feedthrough is eight tensors, not {len(feedthrough)}")
    if runs_natively(u, B, C, *feedthrough) and state.dtype == A.dtype == torch.complex64:
        tensors = (u, state, A, B, C, *(feedthrough or (None,) * 8))
        found = _backend.shortcut("convs5_step", _composite, _direct, "auto", *tensors, *options)
        if found is not None:
            return found
    return reference.definition(u, state, A, B, C, feedthrough, *options)


def frame_conv_weight(weight: Tensor) -> Tensor:
    """The weight (o, c, k, k) of a convolution as (k, k, c, o), the order in which it is read."""
    return weight.permute(2, 3, 1, 0).contiguous()


def _composite(u: Tensor, state: Tensor, A: Tensor, B: Tensor, C: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    feedthrough, options = args[:8], args[8:11]
    return reference.definition(u, state, A, B, C, () if feedthrough[0] is None else feedthrough, *options)


def _direct(backend: Any, *args: Any) -> Optional[tuple[Tensor, Tensor]]:
    tensors, options = args[:13], args[13:]
    return None if _backend.builds_graph(*tensors) else backend.direct(*tensors, options=options)
