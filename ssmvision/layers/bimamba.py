"""The bidirectional Mamba mixer of Vim (arXiv:2401.09417, algorithm 1)."""

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.s6 import auto_dt_rank, bidirectional_routes, init_A_log_, init_dt_, state_matrix
from ssmvision.layers.token_dynamics import make_x_proj
from ssmvision.ops import causal_conv1d, selective_scan


class BiMamba(nn.Module):
    """Two Mamba branches, forward and backward over the tokens, with a shared gate and output projection.

    Each branch has its own causal convolution, projections and state matrix (those of the backward branch end in `_b`);
    in and out projections are shared. Tokens stay where they are: the backward branch runs along the reversed route.

    Args:
        dim: Channels of input and output.
        d_state: Size of the state per channel.
        d_conv: Width of the causal convolution.
        expand: Inner channels / dim.
        dt_rank: Rank of the step-size projection; None for ceil(dim / 16).
        merge: "mean" of both branches (Vim) or their "sum" (VideoMamba).
        input_output: Sign of the input-output matrices; see `make_x_proj`.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed("A_log", "D", "dt_proj.bias", "A_b_log", "D_b", "dt_proj_b.bias")

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: Optional[int] = None,
        merge: str = "mean",
        input_output: str = "free",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if merge not in ("mean", "sum"):
            raise ValueError(f"BiMamba: merge must be 'mean' or 'sum', not {merge!r}")
        dd = {"device": device, "dtype": dtype}
        d = self.d_inner = expand * dim
        self.d_state = d_state
        r = self.dt_rank = dt_rank or auto_dt_rank(dim)
        self.scale = 0.5 if merge == "mean" else 1.0
        self.in_proj = nn.Linear(dim, 2 * d, bias=False, **dd)
        self.conv1d = nn.Conv1d(d, d, d_conv, groups=d, **dd)
        self.x_proj = make_x_proj(d, r, d_state, input_output, **dd)
        self.dt_proj = nn.Linear(r, d, **dd)
        self.A_log = nn.Parameter(torch.empty(d, d_state, **dd))
        self.D = nn.Parameter(torch.empty(d, **dd))
        self.conv1d_b = nn.Conv1d(d, d, d_conv, groups=d, **dd)
        self.x_proj_b = make_x_proj(d, r, d_state, input_output, **dd)
        self.dt_proj_b = nn.Linear(r, d, **dd)
        self.A_b_log = nn.Parameter(torch.empty(d, d_state, **dd))
        self.D_b = nn.Parameter(torch.empty(d, **dd))
        self.out_proj = nn.Linear(d, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize what belongs to the scan; linear and convolution layers initialize themselves.

        As in the official code, only the forward branch gets the special step-size initialization; the bias of the
        backward one starts at zero.
        """
        for A_log, D in ((self.A_log, self.D), (self.A_b_log, self.D_b)):
            init_A_log_(A_log)
            nn.init.ones_(D)
        init_dt_(self.dt_proj.weight, self.dt_proj.bias)
        nn.init.zeros_(self.dt_proj_b.bias)

    def routes(self, x: Tensor) -> Tensor:
        """The routes of the branches over the tokens of x (b, l, dim): (k, l)."""
        return bidirectional_routes(x)

    def branches(self) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Weights of the k branches: convolution and its bias, x_proj, dt_proj and its bias, A_log, D; (k, ...)."""
        return (
            torch.stack([self.conv1d.weight, self.conv1d_b.weight]).squeeze(2),
            _stack(self.conv1d.bias, self.conv1d_b.bias),
            torch.stack([self.x_proj.weight, self.x_proj_b.weight]),
            torch.stack([self.dt_proj.weight, self.dt_proj_b.weight]),
            _stack(self.dt_proj.bias, self.dt_proj_b.bias),
            torch.stack([self.A_log, self.A_b_log]),
            torch.stack([self.D, self.D_b]),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, dim) → (b, l, dim)."""
        routes = self.routes(x)
        conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = self.branches()
        u = F.linear(x, self.in_proj.weight[: self.d_inner])
        u = causal_conv1d(u.transpose(1, 2), conv, conv_bias, silu=True, routes=routes)  # (b, k, d, l)
        delta, b, c = (
            torch.matmul(u.transpose(2, 3), x_proj.transpose(1, 2))
            .transpose(2, 3)
            .split([self.dt_rank, self.d_state, self.d_state], dim=2)
        )  # (b, k, r | n | n, l)
        y, _ = selective_scan(
            u, delta, state_matrix(A_log), b, c, D=D, delta_bias=dt_bias, delta_softplus=True, dt_proj=dt_proj,
            routes=routes,
        )  # fmt: skip
        del u, delta, b, c
        # Projected only now, so that the gate does not wait in memory; it commutes with the sum of the routes.
        z = F.silu(F.linear(x, self.in_proj.weight[self.d_inner :]), inplace=True)
        return self.out_proj(y.transpose(1, 2) * z) * self.scale


def _stack(a: Optional[Tensor], b: Optional[Tensor]) -> Tensor:
    assert a is not None
    assert b is not None
    return torch.stack([a, b])
