"""ConvS5: a diagonal state space over time whose input and output matrices are convolutions (arXiv:2310.19694).

Letters: b batch, t frame, u channels, p complex states, k kernel, h height, w width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.frame_norm import FrameNorm
from ssmvision.layers.hippo import init_log_dt_, nplr
from ssmvision.ops import convs5_step, frame_conv_weight, linear_scan
from ssmvision.ops.frame_norm import FUNCTIONS

__all__ = ["ConvS5", "per_frame"]

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_ACTIVATIONS = {name: function for name, function in FUNCTIONS.items() if name != "none"}


def per_frame(function: Callable[..., Tensor], *videos: Tensor) -> Tensor:
    """Apply a function of pictures (n, c, h, w) to videos (b, t, c, h, w), frame by frame."""
    frames = function(*(video.flatten(0, 1) for video in videos))
    return frames.unflatten(0, videos[0].shape[:2])


def _conv(channels: int, kernel_size: int, **dd: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size, padding="same", **dd)


class ResNetFeedthrough(nn.Module):
    """act(y + conv(act(norm(conv(act(norm(y))))))): what follows the states, of the SSM's output alone."""

    def __init__(self, channels: int, kernel_size: int, num_groups: int, activation: str, **dd: Any) -> None:
        super().__init__()
        self.activation = activation
        self.norm1 = FrameNorm(num_groups, channels, activation, eps=1e-6, **dd)
        self.conv1 = _conv(channels, kernel_size, **dd)
        self.norm2 = FrameNorm(num_groups, channels, activation, eps=1e-6, **dd)
        self.conv2 = _conv(channels, kernel_size, **dd)

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        """Frames y and u (n, u, h, w) → the same; u does not matter."""
        inner = self.conv1(self.norm1(y))
        return _ACTIVATIONS[self.activation](y + self.conv2(self.norm2(inner)))

    def for_steps(self) -> dict[str, Any]:
        """What `convs5_step` takes to do the same."""
        pairs = ((self.norm1, self.conv1), (self.norm2, self.conv2))
        tensors = [(norm.weight, norm.bias, frame_conv_weight(conv.weight), conv.bias) for norm, conv in pairs]
        norm = self.norm1
        return {
            "feedthrough": sum(tensors, ()), "groups": norm.num_groups, "eps": norm.eps, "activation": norm.activation
        }  # fmt: skip


class StandardFeedthrough(nn.Module):
    """act(norm(y + conv(u))): the input reaches the output through a convolution, D of state spaces."""

    def __init__(self, channels: int, kernel_size: int, num_groups: int, activation: str, **dd: Any) -> None:
        super().__init__()
        self.conv1 = _conv(channels, kernel_size, **dd)
        self.norm1 = FrameNorm(num_groups, channels, activation, eps=1e-6, **dd)

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        """Frames y and u (n, u, h, w) → the same."""
        return self.norm1(y + self.conv1(u))


class HalfGLUFeedthrough(nn.Module):
    """z * sigmoid(linear(z)) of z = act(norm(y)), pixel by pixel; kernel and groups do not matter."""

    def __init__(self, channels: int, kernel_size: int, num_groups: int, activation: str, **dd: Any) -> None:
        super().__init__()
        self.act = _ACTIVATIONS[activation]
        self.norm1 = nn.LayerNorm(channels, eps=1e-6, **dd)
        self.gate = nn.Linear(channels, channels, **dd)

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        """Frames y and u (n, u, h, w) → the same; u does not matter."""
        z = self.act(self.norm1(y.permute(0, 2, 3, 1)))
        return (z * self.gate(z).sigmoid()).permute(0, 3, 1, 2)


_FEEDTHROUGHS: dict[str, type[nn.Module]] = {
    "resnet": ResNetFeedthrough,
    "standard": StandardFeedthrough,
    "half_glu": HalfGLUFeedthrough,
}


class ConvS5(nn.Module):
    """x_t = A x_{t-1} + B * u_t, y_t = feedthrough(2 Re(C * x_t), u_t), with * a convolution over the frame.

    A is diagonal and acts on each pixel alone, so that all frames are computed by one scan over time; B and C are
    complex convolutions, each run as one real convolution. The state is complex64 under autocast, too.

    Args:
        dim: Channels of input and output.
        ssm_size: States; one of each conjugate pair is kept, p = ssm_size / 2.
        ssm_blocks: Blocks of the initial state matrix, each a HiPPO-LegS matrix of its own.
        B_kernel_size: Side of B.
        C_kernel_size: Side of C.
        D_kernel_size: Side of the convolutions of the feedthrough.
        feedthrough: "resnet", "standard" or "half_glu".
        activation: "gelu" (its tanh form), "relu", "silu" or "elu", in the feedthrough.
        num_groups: Groups of the feedthrough's norms.
        clip_eigs: Keep real parts of eigenvalues at or below -1e-4, which no training can then make unstable.
        dt_min: Smallest initial time step, in frames.
        dt_max: Largest initial time step, in frames.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: An option that does not exist, or states that do not split into blocks of conjugate pairs.
    """

    own_options = undecayed("Lambda_re", "Lambda_im", "B", "log_step")

    def __init__(
        self,
        dim: int,
        ssm_size: int = 256,
        ssm_blocks: int = 1,
        B_kernel_size: int = 3,
        C_kernel_size: int = 3,
        D_kernel_size: int = 3,
        feedthrough: str = "resnet",
        activation: str = "gelu",
        num_groups: int = 32,
        clip_eigs: bool = True,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if ssm_size % (2 * ssm_blocks):
            raise ValueError(f"ssm_size={ssm_size} must be a multiple of 2 * ssm_blocks={2 * ssm_blocks}")
        for name, value, known in (
            ("feedthrough", feedthrough, _FEEDTHROUGHS),
            ("activation", activation, _ACTIVATIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        dd = {"device": device, "dtype": dtype}
        self.ssm_size, self.ssm_blocks, self.clip_eigs = ssm_size, ssm_blocks, clip_eigs
        self.dt_range = (dt_min, dt_max)
        p = ssm_size // 2
        # Complex numbers as pairs, which optimizers, casts and safetensors all understand.
        self.Lambda_re = nn.Parameter(torch.empty(p, **dd))
        self.Lambda_im = nn.Parameter(torch.empty(p, **dd))
        self.B = nn.Parameter(torch.empty(p, dim, B_kernel_size, B_kernel_size, 2, **dd))
        self.C = nn.Parameter(torch.empty(dim, p, C_kernel_size, C_kernel_size, 2, **dd))
        self.log_step = nn.Parameter(torch.empty(p, **dd))
        self.feedthrough = _FEEDTHROUGHS[feedthrough](dim, D_kernel_size, num_groups, activation, **dd)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """HiPPO-LegS eigenvalues, B and C in their eigenvectors' basis, log-uniform steps."""
        (p, u, *k, _), (_, _, *k_C, _) = self.B.shape, self.C.shape
        with torch.device("cpu"):  # eigenvalues cannot be found on the meta device
            Lambda, _, _, V = nplr("legs", self.ssm_size // self.ssm_blocks)
            V = torch.block_diag(*[V.to(torch.complex64)] * self.ssm_blocks)
            B = nn.init.kaiming_normal_(torch.empty(2 * p, u, *k)).to(V)
            C = nn.init.kaiming_normal_(torch.empty(u, 2 * p, *k_C)).to(V)
        self.Lambda_re.copy_(Lambda.real.repeat(self.ssm_blocks))
        self.Lambda_im.copy_(Lambda.imag.repeat(self.ssm_blocks))
        self.B.copy_(torch.view_as_real(torch.einsum("np,n...->p...", V.conj(), B)))
        self.C.copy_(torch.view_as_real(torch.einsum("np,un...->up...", V, C)))
        init_log_dt_(self.log_step, *self.dt_range)

    def forward(self, u: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """All frames (b, t, dim, h, w) at once → the same; `reset` (b, t) is True where a packed clip starts."""
        return self.run(u, None, reset)[0]

    def run(self, u: Tensor, state: Optional[Tensor] = None, reset: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """As `forward`, after a state.

        Args:
            u: (b, t, dim, h, w).
            state: What precedes the first frame, (b, p, h, w) complex; zero if None.
            reset: (b, t), True where a packed clip starts.

        Returns:
            The output, of u's shape, and the state after the last frame, (b, p, h, w) complex.
        """
        A, B, C = self.discretized()
        driven = per_frame(lambda frames: _drive(frames, B), u)
        x, state = linear_scan(_by_pixel(A), driven, None if state is None else _by_pixel(state), reset)
        y = per_frame(lambda x, u: self.feedthrough(_observe(x, C, u.dtype), u), x, u)
        return y, _by_channel(state)

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One frame (b, dim, h, w) after `state` (see `initial_state`): its output and the next state."""
        return self.stepper()(u, state)

    def stepper(self) -> Step:
        """`step` for streams: what depends on the parameters alone is computed once, here, and not for every frame."""
        A, B, C = self.discretized()
        B, C = frame_conv_weight(_drive_weight(B)), frame_conv_weight(_observe_weight(C))
        if isinstance(self.feedthrough, ResNetFeedthrough):
            return partial(convs5_step, A=A.flatten(), B=B, C=C, **self.feedthrough.for_steps())

        def step(u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            y, state = convs5_step(u, state, A.flatten(), B, C)
            return self.feedthrough(y, u), state

        return step

    def initial_state(self, batch: int, height: int, width: int) -> Tensor:
        """The zeros that precede a sequence, (b, p, h, w) complex."""
        number = torch.promote_types(self.B.dtype, torch.float32).to_complex()
        return self.B.new_zeros(batch, self.ssm_size // 2, height, width, dtype=number)

    def discretized(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (p, 1, 1), B (p, dim, k, k) and C (dim, p, k, k) in steps of frames, all complex (zero-order hold)."""
        real = torch.promote_types(self.B.dtype, torch.float32)
        Lambda_re = self.Lambda_re.to(real)
        Lambda = torch.complex(Lambda_re.clamp(max=-1e-4) if self.clip_eigs else Lambda_re, self.Lambda_im.to(real))
        A = torch.exp(Lambda * self.log_step.to(real).exp())
        B, C = (torch.view_as_complex(kernel.to(real)) for kernel in (self.B, self.C))
        return A[:, None, None], ((A - 1) / Lambda)[:, None, None, None] * B, C


# Pictures are channels-last in memory throughout, as convolutions and norms prefer. A convolution whose output channels
# are re, im, re, im, ... then leaves complex states behind, with nothing copied before or after the scan.


def _drive(u: Tensor, B: Tensor) -> Tensor:
    """B * u: frames (n, dim, h, w) → states (n, h, w, p) complex."""
    weight = _drive_weight(B)
    driven = F.conv2d(u.contiguous(memory_format=torch.channels_last), weight.to(u.dtype), padding="same")
    return _as_states(driven.to(weight.dtype))


def _observe(x: Tensor, C: Tensor, dtype: torch.dtype) -> Tensor:
    """2 Re(C * x): states (n, h, w, p) complex → frames (n, dim, h, w) of a type."""
    return F.conv2d(_as_frames(x).to(dtype), _observe_weight(C).to(dtype), padding="same")


def _drive_weight(B: Tensor) -> Tensor:
    """(p, dim, k, k) complex → (2p, dim, k, k)."""
    return torch.view_as_real(B).movedim(-1, 1).flatten(0, 1)


def _observe_weight(C: Tensor) -> Tensor:
    """(dim, p, k, k) complex → (dim, 2p, k, k), of which the real part of the product remains, twice."""
    return torch.view_as_real(2 * C.conj()).movedim(-1, 2).flatten(1, 2)


def _as_frames(x: Tensor) -> Tensor:
    """States (n, h, w, p) complex → frames (n, 2p, h, w)."""
    return _by_channel(torch.view_as_real(x).flatten(-2))


def _as_states(x: Tensor) -> Tensor:
    """Frames (n, 2p, h, w) → states (n, h, w, p) complex."""
    return torch.view_as_complex(_by_pixel(x).contiguous().unflatten(-1, (-1, 2)))


def _by_pixel(x: Tensor) -> Tensor:
    """(..., p, h, w) → (..., h, w, p)."""
    return x.movedim(-3, -1)


def _by_channel(x: Tensor) -> Tensor:
    """(..., h, w, p) → (..., p, h, w)."""
    return x.movedim(-1, -3)
