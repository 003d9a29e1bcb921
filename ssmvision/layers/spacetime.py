"""SpaceTime: companion-matrix state space models for time series (arXiv:2303.09489), under the official names.

A companion matrix shifts its state and feeds its last entry back: it can express any autoregressive process, and a
closed loop, which predicts its own next input, forecasts from there. Tokens are (b, l, d) as in the official code.

The official kernel, by Woodbury's identity and FFT, loses accuracy in float32 (0.17 on a kernel of size 6); here powers
of the matrix are doubled in float64.

Letters: b batch, l token, d channels, k kernels, n states.
"""

import math
from typing import Any, Optional

import torch
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers._packed import packed_conv

_NEGLIGIBLE = 1e-4


class CompanionSSM(nn.Module):
    """y_t = c^T x_t + skip u_t, x_t = A x_{t-1} + b u_t; A has ones below its diagonal and `a` in its last column.

    Args:
        dim: Channels.
        n_kernels: Kernels; channels take them in turn, each for n_heads * head_dim consecutive channels.
        d_state: States n of a kernel.
        n_heads: Heads that share a kernel.
        head_dim: Channels of a head.
        norm_order: `a` is divided by its norm of this order, which bounds the growth of states; 0 for not at all.
        skip_connection: Add the input, weighed per channel.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed("a", "b", "skip")

    def __init__(
        self,
        dim: int,
        n_kernels: int,
        d_state: int,
        n_heads: int = 1,
        head_dim: int = 1,
        norm_order: float = 1,
        skip_connection: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim, self.n_kernels, self.d_state, self.span = dim, n_kernels, d_state, n_heads * head_dim
        if dim % (n_kernels * self.span):
            raise ValueError(f"{dim} channels are no multiple of {n_kernels} kernels for {self.span} channels each")
        self.norm_order, self.skip_connection = norm_order, skip_connection
        self.a = nn.Parameter(torch.empty(n_kernels, d_state, **dd))
        self.b = nn.Parameter(torch.empty(n_kernels, d_state, **dd))
        self.c = nn.Parameter(torch.empty(n_kernels, d_state, **dd))
        self.skip = nn.Parameter(torch.empty(dim, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All normal, scaled so that kernels start near unit size."""
        for parameter in (self.a, self.b, self.c):
            nn.init.normal_(parameter, std=1 / math.sqrt(self.d_state))
        nn.init.normal_(self.skip)

    def forward(self, u: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, dim) → the same; `reset` (b, l) is True where a packed sequence starts."""
        kernel = self.per_channel(self.kernel(u.shape[1]))
        return _convolve(u, kernel, self.skip if self.skip_connection else None, reset)

    def kernel(self, length: int) -> Tensor:
        """c^T A^l b for `length` tokens, (k, l)."""
        return _kernel(self.matrix(), *self.vectors(), length)

    def matrix(self) -> Tensor:
        """A (k, n, n), in float64."""
        shift = torch.diag(torch.ones(self.d_state - 1, dtype=torch.float64, device=self.a.device), -1)
        last = torch.zeros_like(shift[0])
        last[-1] = 1
        return shift + self.normalized(self.a)[..., None] * last

    def normalized(self, x: Tensor) -> Tensor:
        """(k, n) divided by its norms, unless these vanish; in float64."""
        x = x.double()
        if not self.norm_order:
            return x
        norm = torch.linalg.vector_norm(x, ord=self.norm_order, dim=-1, keepdim=True)
        return x / torch.where(norm.mean() > _NEGLIGIBLE, norm, 1)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """b, by which inputs drive the state, and c, by which outputs read it, (k, n), in float64."""
        return self.b.double(), self.c.double()

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token (b, dim) after `state` (see `initial_state`): its output (b, dim) and the next state."""
        A, b, c = (self.per_channel(x) for x in (self.matrix(), *self.vectors()))
        state = torch.einsum("dnm,bdm->bdn", A, state) + b * u.double()[..., None]
        y = (c * state).sum(-1)
        return (y + self.skip * u if self.skip_connection else y).to(u.dtype), state

    def initial_state(self, batch: int) -> Tensor:
        """What precedes a sequence: zeros (b, dim, n), in float64."""
        return self.a.new_zeros(batch, self.dim, self.d_state, dtype=torch.float64)

    def per_channel(self, x: Tensor) -> Tensor:
        """(k, ...) → (dim, ...)."""
        x = x.repeat_interleave(self.span, 0)
        return x.repeat(self.dim // len(x), *[1] * (x.dim() - 1))


class ShiftSSM(CompanionSSM):
    """A finite impulse response: the companion SSM with a = 0 and b = e_0, which are not trained."""

    def reset_parameters(self) -> None:
        """`a` and `b` fixed, `c` and `skip` as in `CompanionSSM`."""
        super().reset_parameters()
        nn.init.zeros_(self.a.requires_grad_(False))
        nn.init.zeros_(self.b.requires_grad_(False))
        with torch.no_grad():
            self.b[:, 0] = 1


class ClosedLoopSSM(CompanionSSM):
    """A companion SSM that also predicts its next input k^T x, and from it goes on by itself.

    b and c are normalized, as a is. Checkpoints have a `skip`, which is not used.

    Args:
        *args: Of `CompanionSSM`.
        **kwargs: Of `CompanionSSM`.
    """

    own_options = CompanionSSM.own_options | undecayed("k")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_connection = False
        self.k = nn.Parameter(torch.empty_like(self.a))
        nn.init.normal_(self.k, std=1 / math.sqrt(self.d_state))

    def vectors(self) -> tuple[Tensor, Tensor]:
        """As in `CompanionSSM`, normalized."""
        return self.normalized(self.b), self.normalized(self.c)

    def open_loop(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs for, and predictions of the inputs after, every token (b, l, dim); all vectors normalized."""
        kernel = _kernel(self.matrix(), self.normalized(self.b), self.normalized(self.k), u.shape[1])
        return self(u), _convolve(u, self.per_channel(kernel))

    def forecast(self, u: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
        """Outputs and predicted inputs (b, horizon, dim), c^T (A + b k^T)^h x and k^T (A + b k^T)^h x.

        x is the state after the last of the tokens u (b, l, dim). As in the official code it is driven by `b` as
        stored, and inputs are predicted by `k` as stored, where all else is normalized; and without normalization
        (`norm_order` 0) the loop feeds back b^T x instead of k^T x.
        """
        past = self.per_channel(_krylov(self.matrix(), self.b.double(), u.shape[1]))
        state = torch.einsum("dnl,bld->bdn", past.flip(-1), u.double())
        b = self.normalized(self.b)
        feedback = self.normalized(self.k) if self.norm_order else b
        loop = self.matrix() + b[:, :, None] * feedback[:, None]
        outputs = []
        for x in (self.normalized(self.c), self.k.double()):
            rows = self.per_channel(_krylov(loop.mT, x, horizon))
            outputs.append(torch.einsum("dnh,bdn->bhd", rows, state).to(u.dtype))
        return outputs[0], outputs[1]


class FixedKernelSSM(nn.Module):
    """Convolution with kernels that are not trained, such as `differencing_kernels`; channels take them in turn.

    Args:
        dim: Channels, a multiple of the kernels.
        kernels: (k, j).
    """

    kernels: Tensor

    def __init__(self, dim: int, kernels: Tensor) -> None:
        super().__init__()
        if dim % len(kernels):
            raise ValueError(f"{dim} channels are no multiple of {len(kernels)} kernels")
        self.dim = dim
        self.register_buffer("kernels", kernels, persistent=False)

    def forward(self, u: Tensor) -> Tensor:
        """(b, l, dim) → the same."""
        return _convolve(u, self.kernels.repeat(self.dim // len(self.kernels), 1))


def differencing_kernels(n_kernels: int, kernel_dim: int, max_order: int = 4) -> Tensor:
    """Differences of order 0 to max_order - 1 in turn, (n_kernels, kernel_dim): signed binomial coefficients."""
    if kernel_dim < max_order:
        raise ValueError(f"differences of order {max_order - 1} need kernels longer than {kernel_dim}")
    rows = [[(-1) ** j * math.comb(k % max_order, j) for j in range(kernel_dim)] for k in range(n_kernels)]
    return torch.tensor(rows, dtype=torch.float32)


def moving_average_residual_kernels(windows: list[int], kernel_dim: int) -> Tensor:
    """The input less its mean over the last `window` tokens, one kernel a window: (windows, kernel_dim)."""
    if max(windows) > kernel_dim:
        raise ValueError(f"a window of {max(windows)} tokens needs kernels longer than {kernel_dim}")
    place, window = torch.arange(kernel_dim), torch.tensor(windows)[:, None]
    return (place == 0).float() - (place < window) / window


def _krylov(A: Tensor, b: Tensor, length: int) -> Tensor:
    """(b, A b, A^2 b, ...), (k, n, length), by doubling: as many products as `length` has binary digits."""
    columns = b[..., None]
    while columns.shape[-1] < length:
        columns = torch.cat([columns, A @ columns], -1)
        A = A @ A
    return columns[..., :length]


def _kernel(A: Tensor, b: Tensor, c: Tensor, length: int) -> Tensor:
    return torch.einsum("kn,knl->kl", c.double(), _krylov(A, b.double(), length))


def _convolve(u: Tensor, kernel: Tensor, skip: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    return packed_conv(u.transpose(1, 2), kernel.to(u.dtype), skip, reset=reset).transpose(1, 2)
