"""A Mamba block without its SSM: what the twins of our networks have in its place."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.ops import causal_conv1d


class GatedConv(nn.Module):
    """Projections, a short depthwise convolution and a gate, and no scan (MambaOut, arXiv:2405.07992, figure 1).

    Over tokens (`spatial_dims=1`) the convolution is causal, as in Mamba; over maps it is centred, as in VMamba.

    Args:
        dim: Channels of input and output.
        d_inner: Channels of the convolution and the gate.
        d_conv: Side of the convolution's kernel, odd for maps.
        spatial_dims: 1 for tokens (b, l, dim), 2 or 3 for maps (b, h, w, dim), (b, d, h, w, dim).
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self, dim: int, d_inner: int, d_conv: int = 4, spatial_dims: int = 1, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial_dims - 1]
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=False, **dd)
        self.conv = conv(d_inner, d_inner, d_conv, padding=d_conv // 2, groups=d_inner, **dd)
        self.out_proj = nn.Linear(d_inner, dim, bias=False, **dd)

    @classmethod
    def matching(cls, mixer: nn.Module, dim: int, d_conv: int = 4, spatial_dims: int = 1, **dd: Any) -> "GatedConv":
        """One with as many parameters as `mixer`, which may be on the meta device, to within one inner channel."""
        wanted = sum(p.numel() for p in mixer.parameters())
        return cls(dim, max(1, round(wanted / (3 * dim + d_conv**spatial_dims + 1))), d_conv, spatial_dims, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, ..., dim) → the same."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = u.movedim(-1, 1)
        if u.dim() == 3:
            u = causal_conv1d(u, self.conv.weight.squeeze(1), self.conv.bias, silu=True)
        else:
            u = F.silu(self.conv(u))
        return self.out_proj(u.movedim(1, -1) * F.silu(z))
