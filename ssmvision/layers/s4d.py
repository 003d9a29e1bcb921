"""S4D: convolution kernels of diagonal state space models (arXiv:2206.11893), under the official parameter names.

Letters: b batch, c outputs per channel, d channels, l token, s states of which each stands for a conjugate pair,
k copies of the dynamics that channels share.
"""

import math
from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._complex import as_complex, wide
from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers._packed import packed_conv
from ssmvision.layers.hippo import diagonal_init, hippo, init_log_dt_
from ssmvision.layers.ptd import ptd
from ssmvision.ops._library import no_autocast

TRANSFORMS = ("exp", "relu", "softplus", "sigmoid", "none")
_SMALLEST = 1e-4
_DSS_EPS = 1e-7


class S4DKernel(nn.Module):
    """Kernel of a diagonal SSM, y_l = 2 Re(sum_s C_s h_l), h_l = exp(dt A) h_{l-1} + B' u_l (official SSMKernelDiag).

    Args:
        dim: Channels.
        d_state: Real state size; d_state / 2 conjugate pairs are stored.
        channels: Outputs per channel.
        init: See `hippo.diagonal_init`; or "ptd", see `ptd.ptd`: kernel and states, small sums of large terms, are then
            computed in float64, for 2 to 3 times the time of a kernel and 1.15 times that of a step of training.
        disc: "zoh", "bilinear" or "dss" (softmax-normalized over the length; a kernel without a recurrence).
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        dt_tie: One step size for all states of a channel.
        dt_transform: From the stored to the actual step size: "exp", "softplus", "relu", "sigmoid" or "none".
        real_transform: The same for minus the real part of A, which thereby stays negative.
        imag_transform: The same for minus the imaginary part of A.
        n_ssm: Copies of A and B, in turn for the channels; None for one per channel.
        B_clip: Largest imaginary part of the initial B of a HiPPO measure, None for B as it is: see `hippo.nplr`.
        bandlimit: Drop states that oscillate above this fraction of the sampling rate; None to keep all.
        lr: Learning rate of dt, A and B; None for that of the other parameters.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        channels: int = 1,
        init: str = "legs",
        disc: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_tie: bool = True,
        dt_transform: str = "exp",
        real_transform: str = "exp",
        imag_transform: str = "none",
        n_ssm: Optional[int] = None,
        B_clip: Optional[float] = 2.0,
        bandlimit: Optional[float] = None,
        lr: Optional[float] = 1e-3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check(dim, d_state, n_ssm, {dt_transform, real_transform, imag_transform})
        if disc not in ("zoh", "bilinear", "dss"):
            raise ValueError(f"disc {disc!r} is not 'zoh', 'bilinear' or 'dss'")
        dd = {"device": device, "dtype": dtype}
        copies, pairs = n_ssm or dim, d_state // 2
        self.dim, self.d_state, self.channels, self.init, self.disc = dim, d_state, channels, init, disc
        self.dt_range, self.B_clip, self.bandlimit, self.lr = (dt_min, dt_max), B_clip, bandlimit, lr
        self.dt_transform, self.real_transform, self.imag_transform = dt_transform, real_transform, imag_transform
        self.inv_dt = nn.Parameter(torch.empty(dim, 1 if dt_tie else pairs, **dd))
        self.C = nn.Parameter(torch.empty(channels, dim, pairs, 2, **dd))
        self.B = nn.Parameter(torch.empty(1, copies, pairs, 2, **dd))
        self.A_real = nn.Parameter(torch.empty(copies, pairs, **dd))
        self.A_imag = nn.Parameter(torch.empty(copies, pairs, **dd))
        self.own_options = undecayed("inv_dt", "B", "A_real", "A_imag", lr=lr)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize dt log-uniformly, A and B by `init`, and C as complex normal of total variance 1."""
        init_log_dt_(self.inv_dt, *self.dt_range)
        if self.dt_transform != "exp":
            self.inv_dt.copy_(inverse_transform(self.inv_dt.exp(), self.dt_transform))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        A, B = self._initial_system()
        self.A_real.copy_(inverse_transform(-A.real, self.real_transform).expand_as(self.A_real))
        self.A_imag.copy_(inverse_transform(-A.imag, self.imag_transform).expand_as(self.A_imag))
        self.B.copy_(torch.view_as_real(B).expand_as(self.B))

    def _initial_system(self) -> tuple[Tensor, Tensor]:
        if self.init != "ptd":
            return diagonal_init(self.init, self.d_state, self.B_clip)
        system = ptd(self.d_state)
        # Random in the basis of the undiagonalized system: in that of the eigenvectors, states cancel each other.
        C = torch.randn(self.channels, self.dim, self.d_state, dtype=torch.float64).to(system.V) @ system.V
        self.C.copy_(torch.view_as_real(C))
        return system.Lambda, system.V_inv @ hippo("legs", self.d_state)[1].to(system.V)

    def forward(
        self, length: int, rate: float = 1.0, state: Optional[Tensor] = None
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The kernel over `length` tokens.

        Args:
            length: Tokens.
            rate: Factor of the step size: 0.5 for a signal sampled twice as densely.
            state: (b, d, s), complex: the state before the first token.

        Returns:
            (c, d, l); and what `state` adds to the output, (b, c, d, l), or None.
        """
        dt_A, B, C = self._system(rate)
        dtype = wide(self.C).dtype
        if self.disc == "dss":
            if state is not None:
                raise ValueError("the kernel of disc='dss' has no state")
            return self._softmax_kernel(dt_A, B * C, length, rate).to(dtype), None
        A_bar, B_bar = self._discrete(dt_A, B, rate)
        log_A = dt_A if self.disc == "zoh" else A_bar.log()
        kernel = sum_of_powers(2 * C * B_bar, log_A, length).to(dtype)
        if state is None:
            return kernel, None
        return kernel, sum_of_powers(2 * C * (A_bar * state)[:, None], log_A, length).to(dtype)

    def step(self, u: Tensor, state: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """One token (b, d) after `state` (b, d, s): the outputs (b, c, d) and the next state."""
        if self.disc == "dss":
            raise ValueError(
                "a layer with disc='dss' cannot run step by step: its kernel is normalized over the length"
            )
        dt_A, B, C = self._system(rate)
        A_bar, B_bar = self._discrete(dt_A, B, rate)
        state = A_bar * state + B_bar * u[..., None]
        return 2 * torch.einsum("cds,bds->bcd", C, state).real.to(wide(u).dtype), state

    def initial_state(self, batch: int) -> Tensor:
        """What precedes a sequence: zeros (b, d, s), complex."""
        return as_complex(self._precise(self.C).new_zeros(batch, self.dim, self.d_state // 2, 2))

    def _precise(self, x: Tensor) -> Tensor:
        return x.double() if self.init == "ptd" else wide(x)

    def _system(self, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """The products dt A (d, s), B (d, s) and C (c, d, s), complex, in float32 or wider."""
        dt, A = self._dt(rate), self._A()
        B, C = as_complex(self._precise(self.B))[0].repeat(self.dim // len(A), 1), as_complex(self._precise(self.C))
        dt_A = dt * A.repeat(self.dim // len(A), 1)
        if self.bandlimit is not None:
            C = C * (dt_A.imag.abs() / (2 * math.pi) < 0.5 * self.bandlimit)
        return dt_A, B, C

    def _dt(self, rate: float) -> Tensor:
        return transform(self._precise(self.inv_dt), self.dt_transform) * rate

    def _A(self) -> Tensor:
        real, imag = self._precise(self.A_real), self._precise(self.A_imag)
        return -torch.complex(transform(real, self.real_transform), transform(imag, self.imag_transform))

    def _discrete(self, dt_A: Tensor, B: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        dt = self._dt(rate)
        if self.disc == "bilinear":
            return (1 + dt_A / 2) / (1 - dt_A / 2), B * dt / (1 - dt_A / 2)
        A_bar = torch.exp(dt_A)
        return A_bar, B * (A_bar - 1) / (dt_A / dt)

    def _softmax_kernel(self, dt_A: Tensor, C: Tensor, length: int, rate: float) -> Tensor:
        """DSS (arXiv:2203.14343, proposition 1b): states weighed by a softmax over the tokens."""
        A = dt_A / self._dt(rate)
        total = torch.expm1(dt_A * length) * A
        weights = torch.expm1(dt_A) * total.conj() / (total * total.conj() + _DSS_EPS)
        return sum_of_powers(C * weights, dt_A, length)


class MinimalKernel(nn.Module):
    """The kernel of `S4D`: zoh, B folded into C, A = -exp(log_A_real) + i A_imag."""

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        lr: Optional[float] = 1e-3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _check(dim, d_state, None, set())
        dd = {"device": device, "dtype": dtype}
        self.dt_range = (dt_min, dt_max)
        self.C = nn.Parameter(torch.empty(dim, d_state // 2, 2, **dd))
        self.log_dt = nn.Parameter(torch.empty(dim, **dd))
        self.log_A_real = nn.Parameter(torch.empty(dim, d_state // 2, **dd))
        self.A_imag = nn.Parameter(torch.empty(dim, d_state // 2, **dd))
        self.own_options = undecayed("log_dt", "log_A_real", "A_imag", lr=lr)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """S4D-Lin: A = -1/2 + i pi s in every channel."""
        init_log_dt_(self.log_dt, *self.dt_range)
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        A, _ = diagonal_init("lin", 2 * self.A_imag.shape[-1])
        self.log_A_real.copy_((-A.real).log().expand_as(self.log_A_real))
        self.A_imag.copy_(-A.imag.expand_as(self.A_imag))

    def forward(self, length: int) -> Tensor:
        """The kernel (d, l)."""
        dt_A, C_bar = self.system()
        return sum_of_powers(2 * C_bar, dt_A, length)

    def system(self) -> tuple[Tensor, Tensor]:
        """The products dt A and C (exp(dt A) - 1) / A, (d, s)."""
        A = torch.complex(-torch.exp(wide(self.log_A_real)), wide(self.A_imag))
        dt_A = A * torch.exp(wide(self.log_dt))[:, None]
        return dt_A, as_complex(self.C) * torch.expm1(dt_A) / A


class S4D(nn.Module):
    """The layer of S4D's example code: kernel, skip connection, GELU, and a gated linear map over channels.

    Args:
        dim: Channels.
        d_state: Real state size.
        dropout: Rate after the activation.
        transposed: Tokens are (b, dim, l), else (b, l, dim).
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kernel: `dt_min`, `dt_max` and `lr` of the kernel.
    """

    own_options = undecayed("D")

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        dropout: float = 0.0,
        transposed: bool = True,
        device: Any = None,
        dtype: Any = None,
        **kernel: Any,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.transposed = transposed
        self.D = nn.Parameter(torch.empty(dim, **dd))
        self.kernel = MinimalKernel(dim, d_state, **kernel, **dd)
        self.dropout = nn.Dropout1d(dropout)
        self.output_linear = nn.Sequential(nn.Conv1d(dim, 2 * dim, 1, **dd), nn.GLU(dim=-2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """D is normal; the kernel and the linear map initialize themselves."""
        nn.init.normal_(self.D)

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, dim, l) → the same, (b, l, dim) if not `transposed`; `reset` (b, l) is True where a packed one starts."""
        u = x if self.transposed else x.transpose(1, 2)
        if not u.shape[-1]:  # which `output_linear` refuses
            return x
        y = packed_conv(u, self.kernel(u.shape[-1]), self.D, reset=reset)
        y = self.output_linear(self.dropout(F.gelu(y)))
        return y if self.transposed else y.transpose(1, 2)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token (b, dim) after `state` (see `initial_state`): its output (b, dim) and the next state."""
        dt_A, C_bar = self.kernel.system()
        state = torch.exp(dt_A) * state + x[..., None]
        y = 2 * (C_bar * state).sum(-1).real + self.D * x
        return self.output_linear(F.gelu(y.to(x.dtype))[..., None])[..., 0], state

    def initial_state(self, batch: int) -> Tensor:
        """What precedes a sequence: zeros (b, dim, s), complex."""
        return as_complex(self.kernel.C.new_zeros(batch, *self.kernel.C.shape))


def sum_of_powers(weights: Tensor, log_A: Tensor, length: int) -> Tensor:
    """Re sum_s weights_s exp(l log_A_s) for every l < length, the kernel of a diagonal system (S4D, equation 5).

    As l = i m + j, a power is the product of one of two short sets, about sqrt(length) each, and the sum over states a
    product of real matrices: nothing of size (d, s, l) ever exists.

    Args:
        weights: (..., d, s), complex.
        log_A: (d, s), complex.
        length: Tokens.

    Returns:
        (..., d, length), real.
    """
    m = max(1, math.isqrt(length))
    within = _powers(log_A, torch.arange(m, device=log_A.device))
    at_start = weights[..., None] * _powers(log_A, torch.arange(0, length, m, device=log_A.device))
    with no_autocast(at_start):
        blocks = torch.cat([at_start.real, -at_start.imag], -2).mT @ torch.cat([within.real, within.imag], -2)
    return blocks.flatten(-2)[..., :length]


def _powers(log_A: Tensor, steps: Tensor) -> Tensor:
    """The powers exp(log_A steps), (d, s, l); by parts, since torch's complex exponential goes number by number."""
    size, angle = torch.exp(log_A.real[..., None] * steps), log_A.imag[..., None] * steps
    return torch.complex(size * angle.cos(), size * angle.sin())


def transform(x: Tensor, name: str) -> Tensor:
    """From a stored to an actual parameter; "relu" keeps a small distance from zero."""
    if name == "relu":
        return F.relu(x) + _SMALLEST
    transforms: dict[str, Callable[[Tensor], Tensor]] = {
        "exp": torch.exp, "softplus": F.softplus, "sigmoid": torch.sigmoid, "none": torch.clone,
    }  # fmt: skip
    return transforms[name](x)


def inverse_transform(x: Tensor, name: str) -> Tensor:
    """From an actual to a stored parameter; what is smaller than 1e-4 is stored as 1e-4."""
    x = x.clamp(min=_SMALLEST)
    if name == "softplus":
        return x.expm1().log()
    transforms: dict[str, Callable[[Tensor], Tensor]] = {
        "exp": torch.log, "relu": torch.clone, "sigmoid": torch.logit, "none": torch.clone,
    }  # fmt: skip
    return transforms[name](x)


def _check(dim: int, d_state: int, n_ssm: Optional[int], transforms: set[str]) -> None:
    if d_state % 2:
        raise ValueError(f"d_state {d_state} is odd: states come in conjugate pairs")
    if n_ssm is not None and dim % n_ssm:
        raise ValueError(f"{dim} channels cannot share {n_ssm} copies of the dynamics evenly")
    if unknown := transforms - set(TRANSFORMS):
        raise ValueError(f"there is no transform {sorted(unknown)[0]!r}; known: {', '.join(TRANSFORMS)}")
