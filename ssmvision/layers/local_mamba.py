"""The mixer of LocalVim (arXiv:2403.09338): Mamba branches in directions that were searched for each layer."""

from typing import Any, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.channel_attention import ChannelAttention
from ssmvision.layers.s6 import (
    auto_dt_rank,
    checked_directions,
    crop_tokens,
    init_A_log_,
    init_dt_,
    local_routes,
    pad_tokens,
    state_matrix,
)
from ssmvision.ops import causal_conv1d, selective_scan


class LocalMamba(nn.Module):
    """LocalVim's mixer: a Mamba branch for each direction, gated, weighed by channel attention, and summed.

    Each branch has its own causal convolution, projections and state matrix; in and out projections and the attention
    are shared. Tokens stay where they are, the branches run along routes. Maps that windows do not fill are padded
    with zeros, which the branches see.

    Args:
        dim: Channels of input and output.
        directions: Scan order of each branch; see `ssmvision.ops.routes.local`.
        d_state: Size of the state per channel.
        d_conv: Width of the causal convolutions.
        expand: Inner channels / dim.
        dt_rank: Rank of the step-size projections; None for ceil(dim / 16).
        cls_in_middle: There is a class token, after half of the patches, in the tokens as in every route.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed("A_logs", "Ds", "dt_projs_bias", "conv_bias")

    def __init__(
        self,
        dim: int,
        directions: Sequence[str],
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: Optional[int] = None,
        cls_in_middle: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.directions: List[str] = checked_directions(directions)
        self.cls_in_middle = cls_in_middle
        k, d = len(directions), expand * dim
        self.d_inner, self.d_state = d, d_state
        r = self.dt_rank = dt_rank or auto_dt_rank(dim)
        self.in_proj = nn.Linear(dim, 2 * d, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(k, d, d_conv, **dd))
        self.conv_bias = nn.Parameter(torch.empty(k, d, **dd))
        self.x_proj_weight = nn.Parameter(torch.empty(k, r + 2 * d_state, d, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, d, r, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, d, **dd))
        self.A_logs = nn.Parameter(torch.empty(k, d, d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(k, d, **dd))
        self.attn = ChannelAttention(d, **dd)
        self.out_proj = nn.Linear(d, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize what belongs to the branches; linear layers initialize themselves."""
        for parameter, fan_in in (
            (self.conv_weight, self.conv_weight.shape[2]),
            (self.conv_bias, self.conv_weight.shape[2]),
            (self.x_proj_weight, self.d_inner),
        ):
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        init_dt_(self.dt_projs_weight, self.dt_projs_bias)
        init_A_log_(self.A_logs)
        nn.init.ones_(self.Ds)

    def forward(self, x: Tensor, grid: List[int]) -> Tensor:
        """Tokens (b, l, dim) of a grid [height, width] → (b, l, dim)."""
        routes = local_routes(x, grid, self.directions, self.cls_in_middle)
        u = pad_tokens(F.linear(x, self.in_proj.weight[: self.d_inner]), routes.shape[1])
        u = causal_conv1d(u.transpose(1, 2), self.conv_weight, self.conv_bias, silu=True, routes=routes)  # (b, k, d, l)
        delta, b, c = (
            torch.matmul(u.transpose(2, 3), self.x_proj_weight.transpose(1, 2))
            .transpose(2, 3)
            .split([self.dt_rank, self.d_state, self.d_state], dim=2)
        )  # (b, k, r | n | n, l)
        y, _ = selective_scan(
            u, delta, state_matrix(self.A_logs), b, c, D=self.Ds, delta_bias=self.dt_projs_bias, delta_softplus=True,
            dt_proj=self.dt_projs_weight, routes=routes, merge=False,
        )  # fmt: skip
        z = F.silu(F.linear(x, self.in_proj.weight[self.d_inner :]))
        y = crop_tokens(y.transpose(2, 3), x.shape[1]) * z.unsqueeze(1)
        return self.out_proj(self.attn(y).sum(1))
