"""The quasiseparable mixer of Hydra (arXiv:2407.09941, section 3)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.mamba2 import RMSNormGated
from ssmvision.layers.s6 import init_dt_bias_, state_matrix
from ssmvision.ops import ssd_scan


class Hydra(nn.Module):
    """Mamba-2 in both directions: each token reads what precedes it, what follows it, and itself through a diagonal.

    The two scans share A and the bias of the step sizes and have B, C and step sizes of their own. Their outputs are
    shifted by one token, so that neither contains the token itself, which is weighed by D + fc_D(u) instead. The
    convolution looks both ways. There is no order in which tokens could stream.

    Args:
        dim: Channels of input and output.
        d_state: Size of the state per channel.
        d_conv: Width of the centred convolution, odd.
        expand: Inner channels / dim.
        headdim: Channels of a head.
        ngroups: Groups of heads, each with one B and C per direction.
        dt_limit: Smallest and largest step size.
        learnable_init_states: Start both scans from one learned state instead of zero.
        bias: Give the input and output projections a bias.
        conv_bias: Give the convolution a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed("A_log", "D", "dt_bias", "init_states")

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        bias: bool = False,
        conv_bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d = self.d_inner = int(expand * dim)
        if d % headdim:
            raise ValueError(f"Hydra: {d} inner channels do not divide into heads of {headdim}")
        if not d_conv % 2:
            raise ValueError(f"Hydra: d_conv must be odd, not {d_conv}")
        h = self.num_heads = d // headdim
        self.d_state, self.ngroups = d_state, ngroups
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        conv_dim = self.conv_dim = d + 4 * ngroups * d_state
        self.in_proj = nn.Linear(dim, d + conv_dim + 2 * h, bias=bias, **dd)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, padding=d_conv // 2, groups=conv_dim, bias=conv_bias, **dd)
        shape = (h, headdim, d_state)
        self.init_states = nn.Parameter(torch.empty(shape, **dd)) if learnable_init_states else None
        self.dt_bias = nn.Parameter(torch.empty(h, **dd))
        self.A_log = nn.Parameter(torch.empty(h, **dd))
        self.D = nn.Parameter(torch.empty(h, **dd))
        self.fc_D = nn.Linear(d, h, bias=False, **dd)
        self.norm = RMSNormGated(d, norm_before_gate=True, **dd)
        self.out_proj = nn.Linear(d, dim, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize what belongs to the scan; linear and convolution layers initialize themselves."""
        init_dt_bias_(self.dt_bias)
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.D)
        if self.init_states is not None:
            nn.init.zeros_(self.init_states)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, dim) → (b, l, dim)."""
        z, xbc, dt = self.in_proj(x).split([self.d_inner, self.conv_dim, 2 * self.num_heads], dim=-1)
        xbc = F.silu(self.conv1d(xbc.transpose(1, 2))).transpose(1, 2)
        width = 2 * self.ngroups * self.d_state
        u, forth, back = xbc.split([self.d_inner, width, width], dim=-1)
        heads = u.unflatten(-1, (self.num_heads, -1))
        y = self._scan(heads, forth, back, dt) + heads * (self.fc_D(u) + self.D).unsqueeze(-1)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _scan(self, u: Tensor, forth: Tensor, back: Tensor, dt: Tensor) -> Tensor:
        """Both scans as one with twice the batch, without what tokens say to themselves: (b, l, h, p)."""
        bc = torch.cat([forth, back.flip(1)]).unflatten(-1, (2, self.ngroups, self.d_state))
        dt_forth, dt_back = dt.chunk(2, dim=-1)
        state = self.init_states
        y, _ = ssd_scan(
            torch.cat([u, u.flip(1)]), torch.cat([dt_forth, dt_back.flip(1)]), state_matrix(self.A_log), bc[:, :, 0],
            bc[:, :, 1], dt_bias=self.dt_bias, dt_softplus=True, dt_limit=self.dt_limit,
            initial_state=None if state is None else state.expand(2 * u.shape[0], -1, -1, -1),
        )  # fmt: skip
        before, after = F.pad(y, [0, 0, 0, 0, 1, -1]).chunk(2)
        return before + after.flip(1)
