"""The Mamba-1 mixer (arXiv:2312.00752, section 3.4 and figure 3)."""

from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers.s6 import S6, auto_dt_rank, state_matrix
from ssmvision.ops import causal_conv1d_run, causal_conv1d_step, selective_scan, selective_scan_step

S6State = tuple[Tensor, Tensor]  # window of the convolution (b, d, w - 1) and state of the scan (b, d, n)
S6States = list[S6State]  # of several layers or scans


class S6Branch(S6):
    """What a Mamba-1 mixer does between its projections: causal convolution, coefficients and scan of d channels.

    Args:
        d: Channels.
        d_state: Size of the state per channel.
        d_conv: Width of the causal convolution.
        dt_rank: Rank of the step-size projection.
        conv_bias: Give the convolution a bias.
        input_output: Sign of the input-output matrix; see `make_x_proj`.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        d: int,
        d_state: int,
        d_conv: int,
        dt_rank: int,
        conv_bias: bool = True,
        input_output: str = "free",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(d, d_state, dt_rank, input_output, device, dtype)
        self.conv1d = nn.Conv1d(d, d, d_conv, groups=d, bias=conv_bias, device=device, dtype=dtype)
        self.reset_parameters()

    def convolve(
        self, u: Tensor, window: Optional[Tensor] = None, reset: Optional[Tensor] = None
    ) -> tuple[Tensor, Tensor]:
        """The causal convolution with its activation, (b, d, l) → the same; and the next window (b, d, w - 1)."""
        return causal_conv1d_run(u, window, self.conv1d.weight.squeeze(1), self.conv1d.bias, silu=True, reset=reset)

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Low-rank delta (..., r), B (..., n) and C (..., n) of convolved tokens (..., d)."""
        delta, b, c = F.linear(u, self.x_proj.weight).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return delta, b, c

    def mix(self, u: Tensor, z: Optional[Tensor] = None) -> Tensor:
        """Tokens and their gate, (b, d, l) each → (b, d, l)."""
        return self.mix_run(u, z)[0]

    def mix_run(
        self,
        u: Tensor,
        z: Optional[Tensor] = None,
        state: Optional[S6State] = None,
        reset: Optional[Tensor] = None,
    ) -> tuple[Tensor, S6State]:
        """As `mix`, after `state` and with `reset` (b, l) as `Mamba` takes it; and the state after the last token."""
        window, h = (None, None) if state is None else state
        u, window = self.convolve(u, window, reset)
        delta, b, c = self.coefficients(u.transpose(1, 2))
        y, h = selective_scan(
            u, delta.transpose(1, 2), state_matrix(self.A_log), b.transpose(1, 2), c.transpose(1, 2), D=self.D, z=z,
            delta_bias=self.dt_proj.bias, delta_softplus=True, dt_proj=self.dt_proj.weight, initial_state=h,
            reset=reset,
        )  # fmt: skip
        return y, (window, h)

    def mix_step(self, u: Tensor, z: Optional[Tensor], state: S6State) -> tuple[Tensor, S6State]:
        """One token (b, d) and its gate after `state` (see `initial_state`): its output (b, d) and the next state."""
        window, h = state
        u, window = causal_conv1d_step(u, window, self.conv1d.weight.squeeze(1), self.conv1d.bias, silu=True)
        delta, b, c = self.coefficients(u)
        y, h = selective_scan_step(
            u, delta, state_matrix(self.A_log), b, c, h, D=self.D, z=z,
            delta_bias=self.dt_proj.bias, delta_softplus=True, dt_proj=self.dt_proj.weight,
        )  # fmt: skip
        return y, (window, h)

    def initial_state(self, batch: int) -> S6State:
        """What precedes a sequence: the window of the convolution (b, d, w - 1) and the scan's state (b, d, n)."""
        width = self.conv1d.weight.shape[-1]
        window = self.conv1d.weight.new_zeros(batch, self.d_inner, width - 1)
        return window, state_matrix(self.A_log).new_zeros(batch, self.d_inner, self.d_state)


class Mamba(S6Branch):
    """A gated selective scan over tokens in order, under the official parameter names.

    Args:
        dim: Channels of input and output.
        d_state: Size of the state per channel.
        d_conv: Width of the causal convolution.
        expand: Inner channels / dim.
        dt_rank: Rank of the step-size projection; None for ceil(dim / 16).
        bias: Give the input and output projections a bias.
        conv_bias: Give the convolution a bias.
        input_output: Sign of the input-output matrix; see `make_x_proj`.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: Optional[int] = None,
        bias: bool = False,
        conv_bias: bool = True,
        input_output: str = "free",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        d = int(expand * dim)
        super().__init__(d, d_state, d_conv, dt_rank or auto_dt_rank(dim), conv_bias, input_output, **dd)
        self.in_proj = nn.Linear(dim, 2 * d, bias=bias, **dd)
        self.out_proj = nn.Linear(d, dim, bias=bias, **dd)

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, dim) → the same; `reset` (b, l) is True where a packed sequence starts."""
        return self.run(x, None, reset)[0]

    def run(self, x: Tensor, state: Optional[S6State] = None, reset: Optional[Tensor] = None) -> tuple[Tensor, S6State]:
        """As `forward`, after `state` (see `initial_state`); also returns the state after the last token."""
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        y, state = self.mix_run(u, z, state, reset)
        return self.out_proj(y.transpose(1, 2)), state

    def step(self, x: Tensor, state: S6State) -> tuple[Tensor, S6State]:
        """One token (b, dim) after `state` (see `initial_state`): its output (b, dim) and the next state."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        y, state = self.mix_step(u, z, state)
        return self.out_proj(y), state
