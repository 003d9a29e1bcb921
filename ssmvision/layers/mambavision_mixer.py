"""The mixer of MambaVision (arXiv:2407.08083, section 3.2): a scan beside a branch without one, concatenated."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers.s6 import S6, auto_dt_rank, state_matrix
from ssmvision.ops import selective_scan


class MambaVisionMixer(S6):
    """Half of the channels are scanned; the other half, only convolved, is concatenated instead of gating.

    Both halves pass a depthwise convolution that looks both ways. The scan goes over the tokens in order, once.

    Args:
        dim: Channels of input and output, even.
        d_state: Size of the state per channel.
        d_conv: Width of the convolutions.
        dt_rank: Rank of the step-size projection; None for ceil(dim / 16).
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 8,
        d_conv: int = 3,
        dt_rank: Optional[int] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if dim % 2:
            raise ValueError(f"MambaVisionMixer: dim must be even, not {dim}")
        dd = {"device": device, "dtype": dtype}
        d = dim // 2
        super().__init__(d, d_state, dt_rank or auto_dt_rank(dim), **dd)
        self.in_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.conv1d_x = nn.Conv1d(d, d, d_conv, padding="same", groups=d, bias=False, **dd)
        self.conv1d_z = nn.Conv1d(d, d, d_conv, padding="same", groups=d, bias=False, **dd)
        self.out_proj = nn.Linear(dim, dim, bias=False, **dd)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, dim) → (b, l, dim)."""
        u, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (b, d, l) each
        u = F.silu(self.conv1d_x(u))
        z = F.silu(self.conv1d_z(z))
        projected = self.x_proj(u.transpose(1, 2)).transpose(1, 2)
        delta, b, c = projected.split([self.dt_rank, self.d_state, self.d_state], dim=1)
        # The official code adds the bias in the projection and again as the scan's delta_bias; weights rely on both.
        dt_bias = 2 * self.dt_proj.bias
        y, _ = selective_scan(
            u, delta, state_matrix(self.A_log), b, c, D=self.D, delta_bias=dt_bias, delta_softplus=True,
            dt_proj=self.dt_proj.weight,
        )  # fmt: skip
        return self.out_proj(torch.cat([y, z], dim=1).transpose(1, 2))
