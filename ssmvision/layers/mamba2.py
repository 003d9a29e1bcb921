"""The Mamba-2 mixer (SSD; arXiv:2405.21060, sections 6 and 7)."""

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.s6 import init_dt_bias_, state_matrix
from ssmvision.ops import causal_conv1d_run, causal_conv1d_step, ssd_scan, ssd_scan_step


class RMSNormGated(nn.Module):
    """Root mean square norm with a gate, over groups of channels (Mamba-2, arXiv:2405.21060, section 7.1).

    Args:
        dim: Channels.
        groups: Groups of channels, each normalized by its own mean square.
        norm_before_gate: norm(x) * silu(z) instead of norm(x * silu(z)).
        eps: Added to the mean square.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        groups: int = 1,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"RMSNormGated: {dim} channels do not divide into {groups} groups")
        self.groups, self.norm_before_gate, self.eps = groups, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """X (..., dim) normalized and gated by z (..., dim); in float32 or wider inside."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        y, gate = x.to(dtype), F.silu(z.to(dtype))
        y = self._norm(y) * gate if self.norm_before_gate else self._norm(y * gate)
        return y.to(x.dtype)

    def _norm(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (self.groups, -1))
        scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.eps)
        return (grouped * scale).flatten(-2) * self.weight.to(x.dtype)


class Mamba2(nn.Module):
    """A gated scan with one decay per head, under the official parameter names.

    Args:
        dim: Channels of input and output.
        d_state: Size of the state per channel.
        d_conv: Width of the causal convolution.
        expand: Inner channels / dim.
        headdim: Channels of a head.
        d_ssm: Inner channels that are scanned; the others form a gated MLP beside the scan. None for all.
        ngroups: Groups of heads, each with one B and C.
        D_has_hdim: A skip weight per channel instead of one per head.
        rmsnorm: Gate within `RMSNormGated`; otherwise y * silu(z) without norm.
        norm_before_gate: See `RMSNormGated`.
        dt_limit: Smallest and largest step size.
        bias: Give the input and output projections a bias.
        conv_bias: Give the convolution a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed("A_log", "D", "dt_bias")

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: Optional[int] = None,
        ngroups: int = 1,
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d_inner = int(expand * dim)
        d = self.d_ssm = d_ssm or d_inner
        if d % headdim:
            raise ValueError(f"Mamba2: {d} scanned channels do not divide into heads of {headdim}")
        self.d_mlp = d_inner - d
        h = self.num_heads = d // headdim
        self.d_state, self.ngroups = d_state, ngroups
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        conv_dim = self.conv_dim = d + 2 * ngroups * d_state
        self.in_proj = nn.Linear(dim, 2 * self.d_mlp + d + conv_dim + h, bias=bias, **dd)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, bias=conv_bias, **dd)
        self.dt_bias = nn.Parameter(torch.empty(h, **dd))
        self.A_log = nn.Parameter(torch.empty(h, **dd))
        self.D = nn.Parameter(torch.empty(d if D_has_hdim else h, **dd))
        self.norm = RMSNormGated(d, ngroups, norm_before_gate, **dd) if rmsnorm else None
        self.out_proj = nn.Linear(d_inner, dim, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize what belongs to the scan: -A uniform in [1, 16], steps log-uniform in [1e-3, 0.1]."""
        init_dt_bias_(self.dt_bias)
        with torch.no_grad():
            self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())
        nn.init.ones_(self.D)

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, dim) → the same; `reset` (b, l) is True where a packed sequence starts."""
        return self.run(x, None, reset)[0]

    def run(
        self, x: Tensor, state: Optional[tuple[Tensor, Tensor]] = None, reset: Optional[Tensor] = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `forward`, after `state` (see `initial_state`); also returns the state after the last token."""
        window, s = (None, None) if state is None else state
        mlp, z, xbc, dt = self._project(x)
        xbc, window = causal_conv1d_run(
            xbc.transpose(1, 2), window, self.conv1d.weight.squeeze(1), self.conv1d.bias, silu=True, reset=reset
        )
        u, b, c = self._heads(xbc.transpose(1, 2))
        y, s = ssd_scan(
            u, dt, state_matrix(self.A_log), b, c, D=self._skip(), z=self._scan_gate(z), dt_bias=self.dt_bias,
            dt_softplus=True, dt_limit=self.dt_limit, initial_state=s, reset=reset,
        )  # fmt: skip
        return self._output(mlp, y, z), (window, s)

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One token (b, dim) after `state` (see `initial_state`): its output (b, dim) and the next state."""
        window, s = state
        mlp, z, xbc, dt = self._project(x)
        xbc, window = causal_conv1d_step(xbc, window, self.conv1d.weight.squeeze(1), self.conv1d.bias, silu=True)
        u, b, c = self._heads(xbc)
        y, s = ssd_scan_step(
            u, dt, state_matrix(self.A_log), b, c, s, D=self._skip(), z=self._scan_gate(z), dt_bias=self.dt_bias,
            dt_softplus=True, dt_limit=self.dt_limit,
        )  # fmt: skip
        return self._output(mlp, y, z), (window, s)

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """What precedes a sequence: the window of the convolution (b, c, w - 1) and the scan's state (b, h, p, n)."""
        width, heads = self.conv1d.weight.shape[-1], self.num_heads
        window = self.conv1d.weight.new_zeros(batch, self.conv_dim, width - 1)
        return window, state_matrix(self.A_log).new_zeros(batch, heads, self.d_ssm // heads, self.d_state)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both halves of the MLP, gate, channels of the convolution, step sizes."""
        widths = [2 * self.d_mlp, self.d_ssm, self.conv_dim, self.num_heads]
        mlp, z, xbc, dt = self.in_proj(x).split(widths, dim=-1)
        return mlp, z, xbc, dt

    def _heads(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Channels (..., c) as u (..., h, p), B (..., g, n) and C (..., g, n)."""
        width = self.ngroups * self.d_state
        u, b, c = xbc.split([self.d_ssm, width, width], dim=-1)
        groups = [self.ngroups, self.d_state]
        return u.unflatten(-1, (self.num_heads, -1)), b.unflatten(-1, groups), c.unflatten(-1, groups)

    def _skip(self) -> Tensor:
        return self.D if self.D.shape[0] == self.num_heads else self.D.unflatten(0, (self.num_heads, -1))

    def _scan_gate(self, z: Tensor) -> Optional[Tensor]:
        return z.unflatten(-1, (self.num_heads, -1)) if self.norm is None else None

    def _output(self, mlp: Tensor, y: Tensor, z: Tensor) -> Tensor:
        y = y.flatten(-2)
        if self.norm is not None:
            y = self.norm(y, z)
        if self.d_mlp:
            gate, value = mlp.chunk(2, dim=-1)
            y = torch.cat([F.silu(gate) * value, y], dim=-1)
        return self.out_proj(y)
