"""`fft_conv`, the long convolution that a time-invariant state-space layer is when its kernel is known."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import watched
from ._library import cast, expect, expect_real


def fft_conv(u: Tensor, kernel: Tensor, D: Optional[Tensor] = None, backward_kernel: Optional[Tensor] = None) -> Tensor:
    """Causal depthwise convolution with kernels as long as the sequence (S4, arXiv:2111.00396, section 3.4), by FFT.

        y_t = sum_j kernel_j u_{t-j} + sum_j backward_kernel_j u_{t+1+j} + D u_t

    Args:
        u: Tokens (b, d, l), real.
        kernel: (d, j), or (c, d, j) for c outputs per channel; steps beyond l have no effect.
        D: Skip connection, (d,) or (c, d).
        backward_kernel: For a bidirectional layer, as `kernel`: its first step weighs the next token.

    Returns:
        (b, d, l) or (b, c, d, l), in u's dtype. The transforms run in float32 (float64 if u is), also under autocast.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    expect_real("fft_conv", {"u": u, "kernel": kernel, "D": D, "backward_kernel": backward_kernel})
    if u.dim() != 3:
        raise RuntimeError(f"fft_conv: u has shape {tuple(u.shape)}, expected (b, d, l)")
    outputs, d = tuple(kernel.shape[:-2]), u.shape[1]
    for name, x in (("kernel", kernel), ("backward_kernel", backward_kernel)):
        if x is not None:
            expect("fft_conv", name, x, (*outputs[:1], d, x.shape[-1]))
    if D is not None:
        expect("fft_conv", "D", D, (*outputs, d))
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    x = cast(u, real).unsqueeze(1) if outputs else cast(u, real)
    return cast(_convolve(x, cast(kernel, real), cast(D, real), cast(backward_kernel, real)), u.dtype)


def _convolve(x: Tensor, kernel: Tensor, D: Optional[Tensor], backward_kernel: Optional[Tensor]) -> Tensor:
    """On a circle long enough that neither kernel reaches around it into the tokens."""
    if not x.numel():  # which transforms refuse
        return x.expand(x.shape[0], *kernel.shape[:-1], x.shape[-1])
    length = x.shape[-1]
    kernel = kernel[..., :length]
    if backward_kernel is None:
        circle = length + kernel.shape[-1]
        spectrum = _rfft(kernel, circle)
    else:
        backward_kernel = backward_kernel[..., :length]
        circle = length + max(kernel.shape[-1], backward_kernel.shape[-1])
        before = F.pad(backward_kernel.flip(-1), (circle - backward_kernel.shape[-1], 0))
        spectrum = _rfft(F.pad(kernel, (0, circle - kernel.shape[-1])) + before, circle)
    if D is not None:  # a kernel of one step has the same value at all frequencies
        spectrum = spectrum + D.unsqueeze(-1)
    return torch.fft.irfft(_rfft(x, circle) * spectrum, circle)[..., :length]


def _rfft(x: Tensor, n: int) -> Tensor:
    """`torch.fft.rfft`, whose own gradient is a complex transform: a real one is half the work."""
    return torch.fft.rfft(x, n) if watched((x,)) else _RFFT.apply(x, n)  # type: ignore[no-any-return]


class _RFFT(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        ctx.length, ctx.n = x.shape[-1], n
        return torch.fft.rfft(x, n)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        doubled = torch.fft.irfft(gradient, ctx.n, norm="forward").narrow(-1, 0, ctx.length)
        once = gradient[..., :1].real  # frequencies that have no conjugate: zero, and the highest of an even n
        if ctx.n % 2 == 0:
            once = once + gradient[..., -1:].real * (1 - 2 * (torch.arange(ctx.length, device=gradient.device) % 2))
        return (doubled + once) / 2, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return torch.fft.rfft(tangent, ctx.n)
