"""SS2D, the 2-D selective scan of VMamba (arXiv:2401.10166, section 4.2 and figure 3), and what others made of it.

They share a module since fx keeps functions whole only where the traced `forward` is defined, here that of `SS2D`.
"""

from typing import Any, List, Optional, Sequence

import torch
import torch.nn.functional as F
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.channel_attention import ChannelAttention
from ssmvision.layers.s6 import (
    atrous_routes,
    auto_dt_rank,
    checked_directions,
    crop_tokens,
    cross_routes,
    init_A_log_,
    init_dt_,
    init_dt_bias_,
    local_routes,
    pad_tokens,
    state_matrix,
)
from ssmvision.ops import selective_scan


class SS2D(nn.Module):
    """Four selective scans over a feature map, along rows, columns and both reversed, summed at every pixel.

    The projections to delta, B and C act on single pixels, so they commute with any scan order: one matrix product in
    raster order serves all routes, and the scan follows the routes by index.

    Args:
        dim: Channels of input and output.
        d_state: Size of the state per channel.
        ssm_ratio: Inner channels / dim.
        dt_rank: Rank of the step-size projection; None for ceil(dim / 16).
        d_conv: Kernel of the depthwise convolution before the scan; 1 for none.
        conv_bias: Give that convolution a bias.
        gate: Multiply the scan's output by a second, activated projection of the input (v0).
        act_layer: Activation after the convolution and of the gate.
        routes: Number of scans.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed("A_logs", "Ds", "dt_projs_bias")

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ssm_ratio: float = 2.0,
        dt_rank: Optional[int] = None,
        d_conv: int = 3,
        conv_bias: bool = False,
        gate: bool = False,
        act_layer: type[nn.Module] = nn.SiLU,
        routes: int = 4,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.routes = routes
        self.d_state = d_state
        self.d_inner = int(ssm_ratio * dim)
        self.dt_rank = dt_rank or auto_dt_rank(dim)
        self.gate = gate
        self.in_proj = nn.Linear(dim, self.d_inner * (2 if gate else 1), bias=False, **dd)
        d = self.d_inner
        conv2d = nn.Conv2d(d, d, d_conv, padding=d_conv // 2, groups=d, bias=conv_bias, **dd) if d_conv > 1 else None
        self.conv2d = conv2d or nn.Identity()
        self.act = act_layer()
        self.x_proj_weight = nn.Parameter(torch.empty(routes, self.dt_rank + 2 * d_state, self.d_inner, **dd))
        self._make_scan_parameters(dd)
        self.out_norm = nn.LayerNorm(self.d_inner, eps=1e-5, **dd)
        self.out_proj = nn.Linear(self.d_inner, dim, bias=False, **dd)
        self.reset_parameters()

    def _make_scan_parameters(self, dd: dict[str, Any]) -> None:
        self.dt_projs_weight = nn.Parameter(torch.empty(self.routes, self.d_inner, self.dt_rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(self.routes, self.d_inner, **dd))
        self.A_logs = nn.Parameter(torch.empty(self.routes * self.d_inner, self.d_state, **dd))
        self.Ds = nn.Parameter(torch.empty(self.routes * self.d_inner, **dd))

    def reset_parameters(self) -> None:
        """Initialize the scan's own parameters; linear and convolution layers initialize themselves."""
        bound = self.d_inner**-0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        init_dt_(self.dt_projs_weight, self.dt_projs_bias)
        init_A_log_(self.A_logs)
        nn.init.ones_(self.Ds)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → (b, h, w, dim)."""
        # Two products instead of one and a split: each half comes out dense, ready for the convolution.
        u = F.linear(x, self.in_proj.weight[: self.d_inner])
        u = self.act(self.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        y = self.out_norm(self.scan(u))
        if self.gate:
            y = y * self.act(F.linear(x, self.in_proj.weight[self.d_inner :]))
        return self.out_proj(y)

    def scan(self, u: Tensor) -> Tensor:
        """The four scans alone, (b, h, w, d_inner) → the same."""
        B, H, W, D = u.shape
        y = self.scan_tokens(u.reshape(B, H * W, D), cross_routes(u))
        return y.transpose(1, 2).reshape(B, H, W, D)

    def scan_tokens(self, tokens: Tensor, routes: Tensor, merge: bool = True) -> Tensor:
        """Scans of tokens (b, l, d_inner) along routes (k, t), summed: (b, d_inner, l); or each: (b, k, d_inner, l)."""
        projected = F.linear(tokens, self.x_proj_weight.flatten(0, 1)).unflatten(2, (self.routes, -1))
        # (b, l, k, r + 2n) → (b, k, ·, l): a view, nothing moves.
        delta, b, c = projected.permute(0, 2, 3, 1).split([self.dt_rank, self.d_state, self.d_state], dim=2)
        A, skip, dt_bias, dt_proj = self.scan_parameters()
        y, _ = selective_scan(
            tokens.transpose(1, 2), delta, A, b, c, D=skip, delta_bias=dt_bias, delta_softplus=True, dt_proj=dt_proj,
            routes=routes, merge=merge,
        )  # fmt: skip
        return y

    def scan_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A (k, d, n), D (k, d), delta_bias (k, d) and dt_proj (k, d, r)."""
        A = state_matrix(self.A_logs).view(self.routes, self.d_inner, self.d_state)
        return A, self.Ds.view(self.routes, self.d_inner), self.dt_projs_bias, self.dt_projs_weight


class AtrousSS2D(SS2D):
    """SS2D in which every pixel is scanned once: each of the four routes goes over every second row and column.

    That is the efficient 2-D scan of EfficientVMamba (arXiv:2403.09977).
    """

    def scan(self, u: Tensor) -> Tensor:
        """The four scans alone, (b, h, w, d_inner) → the same."""
        B, H, W, D = u.shape
        routes = atrous_routes(u)
        y = self.scan_tokens(pad_tokens(u.reshape(B, H * W, D), 4 * routes.shape[1]), routes)
        return crop_tokens(y.transpose(1, 2), H * W).reshape(B, H, W, D)


class LocalSS2D(SS2D):
    """LocalVMamba's mixer: SS2D with searched directions, each weighed by channel attention before the sum.

    Args:
        dim: Channels of input and output.
        directions: Scan order of each route; see `ssmvision.ops.routes.local`.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: Arguments of `SS2D`.
    """

    def __init__(
        self, dim: int, directions: Sequence[str], device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(dim, routes=len(directions), device=device, dtype=dtype, **kwargs)
        self.directions: List[str] = checked_directions(directions)
        self.attn = ChannelAttention(self.d_inner, device=device, dtype=dtype)

    def scan(self, u: Tensor) -> Tensor:
        """The weighed scans alone, (b, h, w, d_inner) → the same."""
        B, H, W, D = u.shape
        routes = local_routes(u, [H, W], self.directions)
        y = self.scan_tokens(pad_tokens(u.reshape(B, H * W, D), routes.shape[1]), routes, merge=False)
        return self.attn(crop_tokens(y.transpose(2, 3), H * W)).sum(1).reshape(B, H, W, D)


class MultiScaleSS2D(SS2D):
    """MSVMamba's mixer: one scan at full resolution, by rows, and three at half, then enlarged.

    As in the official code of arXiv:2405.14174, the three (rows backward, columns, columns backward) are one scan:
    where one ends, its state goes on to the next. They share parameters, the first of two sets.

    Args:
        dim: Channels of input and output.
        conv_bias: Give the convolutions before the scans a bias.
        squeeze_excite: Weigh the channels of the sum by their means.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: `d_state`, `ssm_ratio`, `dt_rank`, `d_conv` and `act_layer` of `SS2D`.
    """

    def __init__(
        self,
        dim: int,
        conv_bias: bool = False,
        squeeze_excite: bool = True,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, conv_bias=conv_bias, gate=True, routes=2, **dd, **kwargs)
        d = self.d_inner
        self.conv2d_b1 = nn.Conv2d(d, d, 7, stride=2, padding=3, groups=d, bias=conv_bias, **dd)
        self.se = SqueezeExcite(d, rd_channels=d // 8, bias=False, **dd) if squeeze_excite else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → (b, h, w, dim)."""
        u = F.linear(x, self.in_proj.weight[: self.d_inner]).permute(0, 3, 1, 2)
        fine = self.scan_in_turn(self.act(self.conv2d(u)).permute(0, 2, 3, 1), 1, [0])
        coarse = self.scan_in_turn(self.act(self.conv2d_b1(u)).permute(0, 2, 3, 1), 0, [2, 1, 3])
        size = [x.shape[1], x.shape[2]]
        coarse = F.interpolate(coarse.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
        y = self.se(fine.permute(0, 3, 1, 2) + coarse).permute(0, 2, 3, 1)
        return self.out_proj(y * self.act(F.linear(x, self.in_proj.weight[self.d_inner :])))

    def scan_in_turn(self, u: Tensor, scale: int, order: List[int]) -> Tensor:
        """Scans that go on from each other, each normalised, then summed: (b, h, w, d_inner) → the same.

        Args:
            u: Map.
            scale: Whose parameters, 0 at half and 1 at full resolution.
            order: Rows of `cross_routes`.
        """
        B, H, W, D = u.shape
        tokens, routes = u.reshape(B, H * W, D), cross_routes(u)
        projected = F.linear(tokens, self.x_proj_weight[scale]).transpose(1, 2).unsqueeze(1)
        delta, b, c = projected.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        A, skip, dt_bias, dt_proj = [p[scale : scale + 1] for p in self.scan_parameters()]
        state: Optional[Tensor] = None
        y = torch.zeros_like(tokens)
        for route in order:
            part, state = selective_scan(
                tokens.transpose(1, 2), delta, A, b, c, D=skip, delta_bias=dt_bias, delta_softplus=True,
                dt_proj=dt_proj, initial_state=state, routes=routes[route : route + 1],
            )  # fmt: skip
            y = y + self.out_norm(part.transpose(1, 2))
        return y.reshape(B, H, W, D)


class ScalarSS2D(SS2D):
    """SS2D in Mamba-2 form (VMamba "m0"): `dt_rank` heads, each with one scalar decay and one step size per pixel.

    It is the same recurrence with A, step and bias shared within a head (Mamba-2, arXiv:2405.21060, section 5).
    """

    def _make_scan_parameters(self, dd: dict[str, Any]) -> None:
        heads = self.dt_rank
        self.dt_projs_bias = nn.Parameter(torch.empty(self.routes, heads, **dd))
        self.A_logs = nn.Parameter(torch.empty(self.routes, heads, **dd))
        self.Ds = nn.Parameter(torch.empty(self.routes, heads, self.d_inner // heads, **dd))

    def reset_parameters(self) -> None:
        """As in `SS2D`, without a step-size projection."""
        bound = self.d_inner**-0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        init_dt_bias_(self.dt_projs_bias)
        nn.init.zeros_(self.A_logs)
        nn.init.ones_(self.Ds)

    def scan_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A (k, d, n), D (k, d), delta_bias (k, d) and dt_proj (k, d, heads), which hands each channel its head."""
        width = self.d_inner // self.dt_rank
        A = state_matrix(self.A_logs).repeat_interleave(width, dim=1).unsqueeze(-1).expand(-1, -1, self.d_state)
        head = torch.eye(self.dt_rank, device=A.device, dtype=A.dtype).repeat_interleave(width, dim=0)
        bias = self.dt_projs_bias.repeat_interleave(width, dim=1)
        return A, self.Ds.flatten(1), bias, head.unsqueeze(0).expand(self.routes, -1, -1)
