"""The mixer of PlainMamba (arXiv:2403.17695, section 3.3): continuous 2-D scans that know their direction."""

from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, trunc_normal_
from torch import Tensor, nn

from ssmvision.layers.s6 import S6, auto_dt_rank, state_matrix
from ssmvision.ops import routes, selective_scan

MOVES = 5


@register_notrace_function
def continuous_routes(x: Tensor, grid: List[int]) -> Tensor:
    """PlainMamba's four routes over a grid [h, w], on the device of x: (4, h * w)."""
    return routes.continuous(grid[0], grid[1], x.device)


@register_notrace_function
def moves(stack: Tensor, grid: List[int]) -> Tensor:
    """The move that leads into each step of routes (k, t): 0 for the first, 1 right, 2 left, 3 up, 4 down."""
    rows = torch.div(stack, grid[1], rounding_mode="floor")
    down = rows.diff(dim=1)
    right = (stack - rows * grid[1]).diff(dim=1)
    into = (right > 0) * 1 + (right < 0) * 2 + (down < 0) * 3 + (down > 0) * 4
    return F.pad(into, [1, 0])


class PlainMambaMixer(S6):
    """Four scans along serpentines over rows and columns, with shared parameters, summed and gated.

    As in the official code, whose weights rely on it: the step sizes get their bias twice, and only the tokens follow
    the routes. Step sizes, B and C belong to the steps: at step t of any route they are those of token t. To B is
    added a vector of the move that led into the step.

    Args:
        dim: Channels of input and output.
        d_state: Size of the state per channel.
        d_conv: Kernel of the depthwise convolution, odd.
        expand: Inner channels / dim.
        dt_rank: Rank of the step-size projection; None for ceil(dim / 16).
        bias: Give the in and out projections a bias.
        conv_bias: Give the convolution a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 7,
        expand: int = 2,
        dt_rank: Optional[int] = None,
        bias: bool = True,
        conv_bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        d = int(expand * dim)
        super().__init__(d, d_state, dt_rank or auto_dt_rank(dim), **dd)
        self.in_proj = nn.Linear(dim, 2 * d, bias=bias, **dd)
        self.conv2d = nn.Conv2d(d, d, d_conv, padding=d_conv // 2, groups=d, bias=conv_bias, **dd)
        self.direction_Bs = nn.Parameter(torch.empty(MOVES, d_state, **dd))
        self.out_proj = nn.Linear(d, dim, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize what belongs to the scan; linear and convolution layers initialize themselves."""
        super().reset_parameters()
        trunc_normal_(self.direction_Bs, std=0.02)

    def forward(self, x: Tensor, grid: List[int]) -> Tensor:
        """(b, h * w, dim) of a grid [h, w] → the same."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.conv2d(u.transpose(1, 2).unflatten(2, [grid[0], grid[1]]))).flatten(2)  # (b, d, l)
        stack = continuous_routes(x, grid)
        k = stack.shape[0]
        # What belongs to step t is brought to the token visited then: few channels move, the tokens none.
        steps = torch.argsort(stack, dim=1)
        projected = self.x_proj(u.transpose(1, 2))[:, steps].transpose(2, 3)  # (b, k, r + 2n, l)
        delta, b, c = projected.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        b = b + self.direction_Bs[moves(stack, grid).gather(1, steps)].transpose(1, 2)
        y, _ = selective_scan(
            u, delta, state_matrix(self.A_log).expand(k, -1, -1), b, c, D=self.D.expand(k, -1),
            delta_bias=(2 * self.dt_proj.bias).expand(k, -1), delta_softplus=True,
            dt_proj=self.dt_proj.weight.expand(k, -1, -1), routes=stack,
        )  # fmt: skip
        return self.out_proj(y.transpose(1, 2) * F.silu(z))
