"""The modulated group mixer of GroupMamba (arXiv:2407.13772)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.s6 import auto_dt_rank, cross_routes, init_A_log_, init_dt_, state_matrix
from ssmvision.ops import selective_scan

GROUPS = 4


class GroupedSS2D(nn.Module):
    """Four gated scans over a feature map, each of its own quarter of the channels and in its own direction.

    Args:
        dim: Channels of input and output.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed("A_logs", "Ds", "dt_projs_bias", "out_norm_weight", "out_norm_bias")

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if dim % GROUPS:
            raise ValueError(f"GroupedSS2D: {dim} channels do not divide into {GROUPS} groups")
        dd = {"device": device, "dtype": dtype}
        k = self.groups = GROUPS
        d = dim // k
        self.dt_rank = auto_dt_rank(d)
        self.in_proj_weight = nn.Parameter(torch.empty(k, 2 * d, d, **dd))
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.x_proj_weight = nn.Parameter(torch.empty(k, self.dt_rank + 2, d, **dd))
        self.dt_projs_weight = nn.Parameter(torch.empty(k, d, self.dt_rank, **dd))
        self.dt_projs_bias = nn.Parameter(torch.empty(k, d, **dd))
        self.A_logs = nn.Parameter(torch.empty(k, d, 1, **dd))
        self.Ds = nn.Parameter(torch.empty(k, d, **dd))
        self.out_norm_weight = nn.Parameter(torch.empty(k, d, **dd))
        self.out_norm_bias = nn.Parameter(torch.empty(k, d, **dd))
        self.out_proj_weight = nn.Parameter(torch.empty(k, d, d, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize all but the convolution, which initializes itself."""
        bound = self.x_proj_weight.shape[2] ** -0.5
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        init_dt_(self.dt_projs_weight, self.dt_projs_bias)
        init_A_log_(self.A_logs)
        for weight in (self.Ds, self.out_norm_weight):
            nn.init.ones_(weight)
        nn.init.zeros_(self.out_norm_bias)
        for weight in (self.in_proj_weight, self.out_proj_weight):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → (b, h, w, dim)."""
        B, H, W, C = x.shape
        groups = x.reshape(B, H * W, self.groups, C // self.groups).transpose(1, 2)  # (b, k, l, d)
        u, z = torch.matmul(groups, self.in_proj_weight.transpose(1, 2)).chunk(2, dim=3)
        u = u.transpose(1, 2).reshape(B, H, W, C).permute(0, 3, 1, 2)
        u = F.silu(self.conv2d(u)).permute(0, 2, 3, 1).reshape(B, H * W, self.groups, -1).transpose(1, 2)
        delta, b, c = (
            torch.matmul(u, self.x_proj_weight.transpose(1, 2)).transpose(2, 3).split([self.dt_rank, 1, 1], dim=2)
        )
        y, _ = selective_scan(
            u.transpose(2, 3), delta, state_matrix(self.A_logs), b, c, D=self.Ds, delta_bias=self.dt_projs_bias,
            delta_softplus=True, dt_proj=self.dt_projs_weight, routes=cross_routes(x), merge=False,
        )  # fmt: skip
        y = F.layer_norm(y.transpose(2, 3), [C // self.groups], eps=1e-5)
        y = (y * self.out_norm_weight.unsqueeze(1) + self.out_norm_bias.unsqueeze(1)) * F.silu(z)
        y = torch.matmul(y, self.out_proj_weight.transpose(1, 2))
        return y.transpose(1, 2).reshape(B, H, W, C)


class ModulatedGroupMamba(nn.Module):
    """`GroupedSS2D`, whose output is multiplied with its input and with a gate of all channels (the paper's affinity).

    The same norm stands before and after, as in the official code.

    Args:
        dim: Channels of input and output.
        reduction: Channels / hidden channels of the gate.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, reduction: int = 16, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.fc1 = nn.Linear(dim, dim // reduction, **dd)
        self.fc2 = nn.Linear(dim // reduction, dim, **dd)
        self.mixer = GroupedSS2D(dim, **dd)
        self.skip_scale = nn.Parameter(torch.empty(1, **dd))
        self.proj = nn.Linear(dim, dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the scale; the layers initialize themselves."""
        nn.init.ones_(self.skip_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → (b, h, w, dim)."""
        x = self.norm(x)
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((1, 2), keepdim=True)))))
        return self.proj(self.norm(self.mixer(x) * self.skip_scale * x * gate))
