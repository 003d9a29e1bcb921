"""What `causal_conv1d` means, in plain PyTorch: differentiable, float64-capable."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import Gradients, in_float32, no_autocast
from ._routes import along_routes, back_to_tokens


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, reset: Tensor | None, silu: bool
) -> Tensor:
    """Depthwise causal convolution along every route (Mamba, arXiv:2312.00752, figure 3), over no token before the
    latest reset.

    Shapes: x (b, 1, d, l), weight (k, d, w), bias (k, d), routes (k, l), reset (b, 1|k, l). Returns (b, k, d, l).
    """
    y = _convolve(_windows(x, weight, routes, reset), weight, bias)
    return back_to_tokens(F.silu(y) if silu else y, routes, x.shape[-1])


def adjoint(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, reset: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of `definition`, itself differentiable: gradients of x, weight and bias."""
    k, _, width = weight.shape
    tokens = x.shape[-1]
    windows = _windows(x, weight, routes, reset)
    grad = along_routes(dy, k, routes)
    if silu:
        y = _convolve(windows, weight, bias)
        gate = torch.sigmoid(y)
        grad = grad * gate * (1 + y * (1 - gate))
    dwindows = _within_reset(grad.unsqueeze(-1) * weight[:, :, None], routes, reset)
    dx = torch.stack([F.pad(dwindows[..., j], (j, width - 1 - j)) for j in range(width)]).sum(0)
    dx = back_to_tokens(dx[..., width - 1 :], routes, tokens).sum(1, keepdim=True)
    return dx, (grad.unsqueeze(-1) * windows).sum((0, 3)), grad.sum((0, 3))


def _windows(x: Tensor, weight: Tensor, routes: Tensor | None, reset: Tensor | None) -> Tensor:
    """What the kernel sees at each step: (b, k, d, l, w)."""
    ordered = along_routes(x, weight.shape[0], routes)
    windows = F.pad(ordered, (weight.shape[-1] - 1, 0)).unfold(-1, weight.shape[-1], 1)
    return _within_reset(windows, routes, reset)


def _within_reset(windows: Tensor, routes: Tensor | None, reset: Tensor | None) -> Tensor:
    """Windows (b, k, d, l, w) with zeros before the latest reset."""
    if reset is None:
        return windows
    k, width = windows.shape[1], windows.shape[-1]
    sequence = along_routes(reset, k, routes).cumsum(-1)  # counts the resets up to each step
    sequences = F.pad(sequence, (width - 1, 0)).unfold(-1, width, 1).unsqueeze(2)
    return windows.masked_fill(sequences != sequences[..., -1:], 0)


def _convolve(windows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = (windows * weight[:, :, None]).sum(-1)
    return y if bias is None else y + bias[..., None]


def forward(*args: Any, out: Tensor) -> None:
    """Fill `out`."""
    with no_autocast(out):
        out.copy_(definition(*in_float32(args)))


def backward(dy: Tensor, *args: Any) -> Gradients:
    """Gradients as `adjoint` returns them."""
    with no_autocast(dy):
        return adjoint(dy, *in_float32(args))
