"""The structure-aware SSM of Spatial-Mamba (arXiv:2410.15091, section 4)."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.s6 import auto_dt_rank, init_A_log_, init_dt_, state_matrix
from ssmvision.ops import selective_scan


class StateFusion(nn.Module):
    """Adds to every state those of its neighbours: three depthwise convolutions, dilated by 1, 3 and 5.

    Args:
        dim: Channels.
        padding: What lies outside the map: "zeros", "replicate" (its border), or "official", which replicates in
            training and takes zeros in evaluation, as the official code does.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, padding: str = "official", device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if padding not in ("official", "zeros", "replicate"):
            raise ValueError(f"StateFusion: padding must be 'official', 'zeros' or 'replicate', not {padding!r}")
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.padding = padding
        self.kernel_3 = nn.Parameter(torch.empty(dim, 1, 3, 3, **dd))
        self.kernel_3_1 = nn.Parameter(torch.empty(dim, 1, 3, 3, **dd))
        self.kernel_3_2 = nn.Parameter(torch.empty(dim, 1, 3, 3, **dd))
        self.alpha = nn.Parameter(torch.empty(3, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as the official code does: every neighbour counts the same."""
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, h, w) → (b, dim, h, w)."""
        y = self._neighbours(x, self.kernel_3 * self.alpha[0], 1)
        y = y + self._neighbours(x, self.kernel_3_1 * self.alpha[1], 3)
        return y + self._neighbours(x, self.kernel_3_2 * self.alpha[2], 5)

    def _neighbours(self, x: Tensor, kernel: Tensor, dilation: int) -> Tensor:
        if self.padding == "replicate" or (self.padding == "official" and self.training):
            x = F.pad(x, [dilation, dilation, dilation, dilation], mode="replicate")
            return F.conv2d(x, kernel, dilation=dilation, groups=self.dim)
        return F.conv2d(x, kernel, padding=dilation, dilation=dilation, groups=self.dim)


class StructureAwareSSM(nn.Module):
    """One selective scan in raster order whose states, one per channel, are fused over the map before they are read.

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,    y = C * fuse(h) + D u

    and out_proj(norm(y) * silu(z)): what one route leaves apart, the fusion brings back together.

    Args:
        dim: Channels of input and output.
        expand: Inner channels / dim.
        dt_rank: Rank of the step-size projection; None for ceil(dim / 16).
        fusion_padding: What the fusion sees outside the map; see `StateFusion`.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed("A_logs", "Ds", "dt_projs_bias")

    def __init__(
        self,
        dim: int,
        expand: int = 2,
        dt_rank: Optional[int] = None,
        fusion_padding: str = "official",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d = self.d_inner = expand * dim
        r = self.dt_rank = dt_rank or auto_dt_rank(dim)
        self.in_proj = nn.Linear(dim, 2 * d, bias=False, **dd)
        self.conv2d = nn.Conv2d(d, d, 3, padding=1, groups=d, **dd)
        self.x_proj_weight = nn.Parameter(torch.empty(r + 2, d, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(d, r, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(d, **dd))
        self.A_logs = nn.Parameter(torch.empty(d, 1, **dd))
        self.Ds = nn.Parameter(torch.empty(d, **dd))
        self.state_fusion = StateFusion(d, fusion_padding, **dd)
        self.out_norm = nn.LayerNorm(d, eps=1e-5, **dd)
        self.out_proj = nn.Linear(d, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the scan's own parameters; the layers initialize themselves."""
        bound = self.d_inner**-0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        init_dt_(self.dt_projs_weight, self.dt_projs_bias)
        init_A_log_(self.A_logs)
        nn.init.ones_(self.Ds)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → (b, h, w, dim)."""
        B, H, W, _ = x.shape
        # Two products instead of one and a split: each half comes out dense, ready for the convolution.
        u = F.linear(x, self.in_proj.weight[: self.d_inner])
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        tokens = u.reshape(B, H * W, self.d_inner)
        delta, b, c = F.linear(tokens, self.x_proj_weight).transpose(1, 2).split([self.dt_rank, 1, 1], dim=1)
        # Read with C = 1 and no skip, the scan gives the states themselves.
        h, _ = selective_scan(
            tokens.transpose(1, 2), delta, state_matrix(self.A_logs), b, torch.ones_like(b),
            delta_bias=self.dt_projs_bias, delta_softplus=True, dt_proj=self.dt_projs_weight,
        )  # fmt: skip
        h = self.state_fusion(h.reshape(B, self.d_inner, H, W)).permute(0, 2, 3, 1)
        y = h * c.reshape(B, H, W, 1) + u * self.Ds
        z = F.silu(F.linear(x, self.in_proj.weight[self.d_inner :]))
        return self.out_proj(self.out_norm(y) * z)
