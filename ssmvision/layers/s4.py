"""S4: kernels of normal-plus-low-rank state space models (arXiv:2111.00396) and the block around them.

Parameter names, and what they mean in a checkpoint, are those of github:state-spaces/s4.

Letters: b batch, c outputs per channel, d channels, l token, r rank, s states of which each stands for a conjugate
pair, n = 2 s, w frequencies.
"""

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._complex import as_complex, wide
from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers._packed import packed_conv
from ssmvision.layers.hippo import init_log_dt_, nplr
from ssmvision.layers.s4d import S4DKernel, inverse_transform, transform

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus, "elu": nn.ELU, "id": nn.Identity, "identity": nn.Identity, "linear": nn.Identity,
}  # fmt: skip


class S4Kernel(nn.Module):
    """Kernel of x' = (diag(A) - P P*) x + B u, y = 2 Re(C x), discretized bilinearly (official SSMKernelDPLR).

    C is stored as the frequency-domain form needs it, C (I - A_bar^L), for the length L in the buffer `l_kernel`. As
    in the official code a fresh layer (`l_kernel` 0) converts C in place at its first forward, and a sequence longer
    than `l_kernel` doubles that; a checkpoint brings both. At another `rate` C stands for a length of L / rate.
    `l_kernel` is read at every call, where `torch.compile` breaks its graph.

    Args:
        dim: Channels.
        d_state: Real state size n; n / 2 conjugate pairs are stored.
        channels: Outputs per channel.
        init: One of `hippo.NPLR_MEASURES`.
        rank: Of the low-rank part.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        dt_transform: From the stored to the actual step size, as in `S4DKernel`.
        real_transform: The same for minus the real part of A.
        imag_transform: The same for minus the imaginary part of A.
        n_ssm: Copies of A, B and P, in turn for the channels; None for one per channel.
        bandlimit: Drop states that oscillate above this fraction of the sampling rate; None to keep all.
        lr: Learning rate of dt, A, B and P; None for that of the other parameters.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    l_kernel: Tensor

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        channels: int = 1,
        init: str = "legs",
        rank: int = 1,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_transform: str = "exp",
        real_transform: str = "exp",
        imag_transform: str = "none",
        n_ssm: Optional[int] = None,
        bandlimit: Optional[float] = None,
        lr: Optional[float] = 1e-3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if n_ssm is not None and dim % n_ssm:
            raise ValueError(f"{dim} channels cannot share {n_ssm} copies of the dynamics evenly")
        dd = {"device": device, "dtype": dtype}
        copies, pairs = n_ssm or dim, d_state // 2
        self.dim, self.d_state, self.channels, self.init, self.rank = dim, d_state, channels, init, rank
        self.dt_range, self.bandlimit = (dt_min, dt_max), bandlimit
        self.dt_transform, self.real_transform, self.imag_transform = dt_transform, real_transform, imag_transform
        self.inv_dt = nn.Parameter(torch.empty(dim, 1, **dd))
        self.C = nn.Parameter(torch.empty(channels, dim, pairs, 2, **dd))
        self.B = nn.Parameter(torch.empty(1, copies, pairs, 2, **dd))
        self.P = nn.Parameter(torch.empty(rank, copies, pairs, 2, **dd))
        self.A_real = nn.Parameter(torch.empty(copies, pairs, **dd))
        self.A_imag = nn.Parameter(torch.empty(copies, pairs, **dd))
        self.register_buffer("l_kernel", torch.zeros(1, dtype=torch.long, device=device))
        self.own_options = undecayed("inv_dt", "B", "P", "A_real", "A_imag", lr=lr)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize dt log-uniformly, A, B and P by `init`, and C as complex normal of total variance 1."""
        init_log_dt_(self.inv_dt, *self.dt_range)
        if self.dt_transform != "exp":
            self.inv_dt.copy_(inverse_transform(self.inv_dt.exp(), self.dt_transform))
        nn.init.normal_(self.C, std=math.sqrt(0.5))
        A, P, B, _ = nplr(self.init, self.d_state, self.rank)
        self.A_real.copy_(inverse_transform(-A.real, self.real_transform).expand_as(self.A_real))
        self.A_imag.copy_(inverse_transform(-A.imag, self.imag_transform).expand_as(self.A_imag))
        self.B.copy_(torch.view_as_real(B).expand_as(self.B))
        self.P.copy_(torch.view_as_real(P.resolve_conj())[:, None].expand_as(self.P))
        self.l_kernel.zero_()

    def forward(
        self, length: int, rate: float = 1.0, state: Optional[Tensor] = None
    ) -> tuple[Tensor, Optional[Tensor]]:
        """The kernel over `length` tokens; arguments and results as of `S4DKernel`."""
        if not length:
            empty = self.C.new_zeros(*self.C.shape[:2], 0)
            return empty, None if state is None else empty.expand(len(state), *empty.shape)
        circle = self._circle(length, rate)
        A, B, P, C, dt = self._system(rate)
        omega = torch.exp(-2j * math.pi / circle * torch.arange(circle // 2 + 1, device=A.device, dtype=torch.float64))
        inputs = B[None]
        if state is not None:
            # (1 / dt + A / 2) s is the input that leaves A_bar s behind.
            through = 2 * torch.einsum("rds,bds->bdr", P.conj(), state).real
            low_rank = torch.einsum("rds,bdr->bds", P, through.to(P))
            inputs = torch.cat([inputs, state / dt + (A * state - low_rank) / 2])
        spectrum = self._spectrum(A * dt, inputs, P, C, dt, omega)
        kernel = torch.fft.irfft(spectrum, n=circle)[..., :length]
        return kernel[0], None if state is None else kernel[1:]

    def step(self, u: Tensor, state: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """One token (b, d) after `state` (b, d, s): the outputs (b, c, d) and the next state.

        Builds the dense matrices of the recurrence anew at every call; see `recurrence`.
        """
        return recur(u, state, *self.recurrence(rate))

    def recurrence(self, rate: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """A_bar (d, n, n), B_bar (d, n) and C (c, d, n) of the recurrence, complex, conjugates last."""
        circle = self._circle(1, rate) if self.l_kernel.item() else 0
        A_bar, B_bar, C = self._dense(rate)
        if circle:
            total = torch.matrix_power(A_bar.to(torch.complex128), circle)
            C = _solve_right(torch.eye(total.shape[-1], device=C.device) - total, C.to(total)).to(C)
        return A_bar, B_bar, C

    def initial_state(self, batch: int) -> Tensor:
        """What precedes a sequence: zeros (b, d, s), complex."""
        return as_complex(self.C.new_zeros(batch, self.dim, self.d_state // 2, 2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Official checkpoints hold `l_kernel` as a number or as a vector of one."""
        if (length := state_dict.get(f"{prefix}l_kernel")) is not None:
            state_dict[f"{prefix}l_kernel"] = length.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _circle(self, length: int, rate: float) -> int:
        """Steps of size `rate` dt that C is converted for, at least `length`."""
        wanted = round(rate * length)
        self._convert_C(wanted + (round(wanted / rate) < length))
        return round(self.l_kernel.item() / rate)

    def _system(self, rate: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A (d, s), B (d, s), P (r, d, s), C (c, d, s) and the step sizes (d, 1)."""
        real, imag = (
            transform(wide(self.A_real), self.real_transform),
            transform(wide(self.A_imag), self.imag_transform),
        )
        repeats = self.dim // len(real)
        A, C = -torch.complex(real, imag).repeat(repeats, 1), as_complex(self.C)
        dt = transform(wide(self.inv_dt), self.dt_transform) * rate
        if self.bandlimit is not None:
            C = C * (dt * A.imag.abs() / (2 * math.pi) < 0.5 * self.bandlimit)
        return A, as_complex(self.B)[0].repeat(repeats, 1), as_complex(self.P).repeat(1, repeats, 1), C, dt

    def _spectrum(self, dt_A: Tensor, B: Tensor, P: Tensor, C: Tensor, dt: Tensor, omega: Tensor) -> Tensor:
        """The generating function at roots of unity, (1 + b, c, d, w), by Woodbury's identity.

        Both sides of the resolvent 1 / (z - dt A), z = 2 (1 - w) / (1 + w), are multiplied by (1 + w) / 2, so that
        nothing is infinite at w = -1.
        """
        omega = omega.to(dt_A)
        half = (1 + omega) / 2
        resolvent = dt[..., None] / (1 - omega - dt_A[..., None] * half)
        mirrored = dt[..., None] / (1 - omega - dt_A.conj()[..., None] * half)

        def between(left: Tensor, right: Tensor) -> Tensor:
            pairs = left[:, None] * right[None]
            return torch.einsum("ijds,dsw->ijdw", pairs, resolvent) + torch.einsum(
                "ijds,dsw->ijdw", pairs.conj(), mirrored
            )

        Q, rank = P.conj(), len(P)
        core = between(P, Q).permute(2, 3, 1, 0) * half[:, None, None]
        core = core + torch.eye(rank, dtype=core.dtype, device=core.device)  # (d, w, r of Q, r of P)
        through = torch.linalg.solve(core, between(B, Q).permute(2, 3, 1, 0))  # (d, w, r, 1 + b)
        correction = torch.einsum("rcdw,dwrb->bcdw", between(P, C), through) * half
        return between(B, C) - correction

    def _dense(self, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        *system, dt = self._system(rate)
        A, B, P, C = (torch.cat([x, x.conj()], -1) for x in system)
        dt = dt[..., None]
        matrix = torch.diag_embed(A) - torch.einsum("rdn,rdm->dnm", P, P.conj())
        identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        backward = identity - dt / 2 * matrix
        A_bar = torch.linalg.solve(backward, identity + dt / 2 * matrix)
        return A_bar, torch.linalg.solve(backward, dt * B[..., None])[..., 0], C

    @torch.no_grad()
    def _convert_C(self, length: int) -> None:
        """Bring C into the form for at least `length` tokens."""
        while (done := int(self.l_kernel.item())) < length:
            total = torch.matrix_power(self._dense(1.0)[0].to(torch.complex128), done or length)
            C = as_complex(self.C).to(total)
            full = torch.cat([C, C.conj()], -1)
            change = torch.einsum("cdn,dnm->cdm", full, total)
            converted = full + change if done else full - change
            self.C.copy_(torch.view_as_real(converted[..., : C.shape[-1]].contiguous()))
            self.l_kernel.fill_(2 * done or length)


class S4Conv(nn.Module):
    """Convolution with an SSM's kernel, skip connection and activation (official FFTConv).

    Args:
        dim: Channels.
        channels: Outputs per channel.
        bidirectional: Half of the kernel's outputs look at the tokens that follow.
        activation: One of `ACTIVATIONS`, or None.
        l_max: Longest kernel; None for that of the sequence. `step`, without an end, equals `forward` up to there.
        dropout: Rate after the activation; whole channels.
        mode: "dplr" for `S4Kernel`, "s4d" or "diag" for `S4DKernel`.
        swap_channels: Outputs of one channel lie together, not those of one kernel.
        **kernel: Of the kernel.
    """

    own_options = undecayed("D")

    def __init__(
        self,
        dim: int,
        channels: int = 1,
        bidirectional: bool = False,
        activation: Optional[str] = "gelu",
        l_max: Optional[int] = None,
        dropout: float = 0.0,
        mode: str = "dplr",
        swap_channels: bool = False,
        **kernel: Any,
    ) -> None:
        super().__init__()
        if mode not in ("dplr", "s4d", "diag"):
            raise ValueError(f"mode {mode!r} is not 'dplr', 's4d' or 'diag'")
        self.channels, self.bidirectional, self.l_max, self.swap_channels = (
            channels,
            bidirectional,
            l_max,
            swap_channels,
        )
        dd = {name: kernel.get(name) for name in ("device", "dtype")}
        self.D = nn.Parameter(torch.empty(channels, dim, **dd))
        make = S4Kernel if mode == "dplr" else S4DKernel
        self.kernel = make(dim, channels=channels * (1 + bidirectional), **kernel)
        self.activation = make_activation(activation)
        self.drop = nn.Dropout1d(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """D is normal; the kernel initializes itself."""
        nn.init.normal_(self.D)

    def forward(
        self, u: Tensor, rate: float = 1.0, state: Optional[Tensor] = None, reset: Optional[Tensor] = None
    ) -> Tensor:
        """(b, dim, l) → (b, channels * dim, l).

        Args:
            u: Tokens.
            rate: Factor of the step size.
            state: (b, dim, s): the state before the first token.
            reset: Boolean, (b, l): True where a packed sequence starts.

        Raises:
            ValueError: A state or resets with disc="dss".
        """
        if reset is not None and getattr(self.kernel, "disc", None) == "dss":
            raise ValueError("a layer with disc='dss' takes no resets: its kernel is normalized over the length")
        length = u.shape[-1] if self.l_max is None else min(u.shape[-1], round(self.l_max / rate))
        kernel, from_state = self.kernel(length, rate, state)
        if self.bidirectional:
            y = packed_conv(u, kernel[: self.channels], self.D, kernel[self.channels :], reset)
        else:
            y = packed_conv(u, kernel, self.D, reset=reset)
        if from_state is not None:
            from_state = F.pad(from_state[:, : self.channels], (0, u.shape[-1] - length))
            y = y + (from_state if reset is None else from_state * (reset.cumsum(1) == 0)[:, None, None])
        # Channels last, as the map over channels reads it: gradients of mixed layouts are computed number by number.
        return self.drop(self.activation(self._join(y).mT.contiguous().mT))

    def step(self, u: Tensor, state: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """One token (b, dim) after `state` (b, dim, s): the outputs (b, channels * dim) and the next state."""
        if self.bidirectional:
            raise ValueError("a bidirectional layer cannot run step by step")
        y, state = self.kernel.step(u, state, rate)
        return self.activation(self._join((y + self.D * u[:, None]).to(u.dtype))), state

    def _join(self, y: Tensor) -> Tensor:
        return (y.transpose(1, 2) if self.swap_channels else y).flatten(1, 2)


class S4Block(nn.Module):
    """`S4Conv` and a linear map over channels (official S4Block, without gate and bottleneck).

    Args:
        dim: Channels.
        final_act: Activation after the linear map: "glu" (which doubles and halves the channels), one of
            `ACTIVATIONS`, or None to leave out the map.
        transposed: Tokens are (b, dim, l), else (b, l, dim).
        dropout: Rate after either activation.
        **layer: Of `S4Conv` and its kernel, such as `mode`, `init`, `d_state`, `bidirectional`, `channels`.
    """

    def __init__(
        self, dim: int, final_act: Optional[str] = "glu", transposed: bool = True, dropout: float = 0.0, **layer: Any
    ) -> None:
        super().__init__()
        dd = {name: layer.get(name) for name in ("device", "dtype")}
        self.transposed = transposed
        self.layer = S4Conv(dim, dropout=dropout, **layer)
        self.output_linear = channel_map(dim * self.layer.channels, dim, final_act, **dd)
        self.drop = nn.Dropout1d(dropout)

    def forward(
        self, x: Tensor, rate: float = 1.0, state: Optional[Tensor] = None, reset: Optional[Tensor] = None
    ) -> Tensor:
        """(b, dim, l) → the same; (b, l, dim) if not `transposed`. Other arguments as of `S4Conv.forward`."""
        y = self.layer(x if self.transposed else x.transpose(1, 2), rate, state, reset)
        y = self.output_linear(y.transpose(1, 2))
        return self.drop(y.transpose(1, 2)) if self.transposed else self.drop(y.transpose(1, 2)).transpose(1, 2)

    def step(self, x: Tensor, state: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """One token (b, dim) after `state` (see `initial_state`): its output (b, dim) and the next state."""
        y, state = self.layer.step(x, state, rate)
        return self.output_linear(y), state

    def initial_state(self, batch: int) -> Tensor:
        """What precedes a sequence: zeros (b, dim, s), complex."""
        return self.layer.kernel.initial_state(batch)


def recur(u: Tensor, state: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One token (b, d) of the dense recurrence: the outputs (b, c, d) and the next half state (b, d, s)."""
    full = torch.cat([state, state.conj()], -1)
    full = torch.einsum("dnm,bdm->bdn", A_bar, full) + B_bar * u[..., None]
    return torch.einsum("cdn,bdn->bcd", C, full).real, full[..., : state.shape[-1]]


def channel_map(dim: int, out: int, activation: Optional[str], **dd: Any) -> nn.Module:
    """A linear map over the last axis and its activation; identity without one."""
    if activation is None:
        return nn.Identity()
    if activation == "glu":
        return nn.Sequential(nn.Linear(dim, 2 * out, **dd), nn.GLU(dim=-1))
    return nn.Sequential(nn.Linear(dim, out, **dd), make_activation(activation))


def make_activation(name: Optional[str]) -> nn.Module:
    """One of `ACTIVATIONS` by its name."""
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"there is no activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return nn.Identity() if name is None else ACTIVATIONS[name]()


def _solve_right(matrix: Tensor, C: Tensor) -> Tensor:
    """C (c, d, n) times the inverse of `matrix` (d, n, n)."""
    return torch.linalg.solve(matrix.mT, C.permute(1, 2, 0)).permute(2, 0, 1)
