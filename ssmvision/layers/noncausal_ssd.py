"""Non-causal state space duality (VSSD, arXiv:2407.18559, section 3)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.s6 import init_dt_bias_, state_matrix


class NonCausalSSD(nn.Module):
    """Mamba-2 without its order: every token reads one state, to which every token contributed by its step size.

    With step sizes delta = softplus(dt + dt_bias) and one A < 0 per head,

        y_i = |A| C_i · sum_j B_j delta_j u_jᵀ + D u_i

    and out_proj(norm(y) * z), where z has no activation. No scan is left, only two matrix products.

    Args:
        dim: Channels of input and output.
        num_heads: Heads, each with one A, D and step size.
        d_state: Size of the state per channel.
        expand: Inner channels / dim.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed("A_log", "D", "dt_bias")

    def __init__(
        self, dim: int, num_heads: int, d_state: int = 64, expand: int = 2, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        d = self.d_inner = expand * dim
        if d % num_heads:
            raise ValueError(f"NonCausalSSD: {d} inner channels do not divide into {num_heads} heads")
        dd = {"device": device, "dtype": dtype}
        self.d_state, self.num_heads = d_state, num_heads
        conv_dim = d + 2 * d_state
        self.in_proj = nn.Linear(dim, d + conv_dim + num_heads, bias=False, **dd)
        self.conv2d = nn.Conv2d(conv_dim, conv_dim, 3, padding=1, groups=conv_dim, **dd)
        self.dt_bias = nn.Parameter(torch.empty(num_heads, **dd))
        self.A_log = nn.Parameter(torch.empty(num_heads, **dd))
        self.D = nn.Parameter(torch.empty(num_heads, **dd))
        self.norm = nn.LayerNorm(d, eps=1e-5, **dd)
        self.out_proj = nn.Linear(d, dim, bias=False, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as Mamba-2 does (arXiv:2405.21060): -A uniform in [1, 16]."""
        init_dt_bias_(self.dt_bias)
        with torch.no_grad():
            self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → (b, h, w, dim)."""
        B, H, W, _ = x.shape
        heads, d = self.num_heads, self.d_inner
        z, u, dt = self.in_proj(x).split([d, d + 2 * self.d_state, heads], dim=3)
        u = F.silu(self.conv2d(u.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)
        u, b, c = u.split([d, self.d_state, self.d_state], dim=2)  # (b, l, d | n | n)
        u = u.reshape(B, H * W, heads, d // heads)
        delta = F.softplus(dt.flatten(1, 2) + self.dt_bias).to(u.dtype).unsqueeze(3)
        state = b.transpose(1, 2) @ (u * delta).flatten(2)  # (b, n, d)
        # A waits until the state is read. The norm below all but cancels its gradient, which comes out five times more
        # exact from one sum over y than through two matrix products.
        decay = -state_matrix(self.A_log).to(u.dtype)
        y = (c @ state).reshape(u.shape) * decay.unsqueeze(1) + u * self.D.unsqueeze(1)
        return self.out_proj(self.norm(y.flatten(2)).reshape(B, H, W, d) * z)
