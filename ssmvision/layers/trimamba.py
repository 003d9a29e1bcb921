"""The Mamba mixer of volumes: forward, backward and across slices (SegMamba, arXiv:2401.13560, section 2.2)."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.bimamba import BiMamba
from ssmvision.layers.s6 import bidirectional_routes, init_A_log_, init_dt_, inter_slice_route


class TriMamba(BiMamba):
    """Three Mamba branches with a shared gate and projections; the third (`_s`) visits the same place of every slice.

    The sequence is cut into `nslices` pieces of equal length: slices of the volume only if that is its depth.

    Args:
        dim: Channels of input and output.
        nslices: Pieces of the third branch; the number of tokens must be a multiple of it.
        d_state: Size of the state per channel.
        d_conv: Width of the causal convolution.
        expand: Inner channels / dim.
        dt_rank: Rank of the step-size projection; None for ceil(dim / 16).
        merge: "sum" of the branches (SegMamba) or their "mean" (Vivim).
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = BiMamba.own_options | undecayed("A_s_log", "D_s", "dt_proj_s.bias")

    def __init__(
        self,
        dim: int,
        nslices: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: Optional[int] = None,
        merge: str = "sum",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(dim, d_state, d_conv, expand, dt_rank, merge, device=device, dtype=dtype)
        dd = {"device": device, "dtype": dtype}
        d, r = self.d_inner, self.dt_rank
        self.nslices = nslices
        self.scale = 1 / 3 if merge == "mean" else 1.0
        self.conv1d_s = nn.Conv1d(d, d, d_conv, groups=d, **dd)
        self.x_proj_s = nn.Linear(d, r + 2 * d_state, bias=False, **dd)
        self.dt_proj_s = nn.Linear(r, d, **dd)
        self.A_s_log = nn.Parameter(torch.empty(d, d_state, **dd))
        self.D_s = nn.Parameter(torch.empty(d, **dd))
        for dt_proj in (self.dt_proj_b, self.dt_proj_s):
            init_dt_(dt_proj.weight, dt_proj.bias)
        init_A_log_(self.A_s_log)
        nn.init.ones_(self.D_s)

    def routes(self, x: Tensor) -> Tensor:
        """The routes of the branches over the tokens of x (b, l, dim): (3, l)."""
        if x.shape[1] % self.nslices:
            raise ValueError(f"TriMamba: {x.shape[1]} tokens cannot be cut into nslices={self.nslices} equal pieces")
        return torch.cat([bidirectional_routes(x), inter_slice_route(x, self.nslices)])

    def branches(self) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Weights of the three branches: convolution and its bias, x_proj, dt_proj and its bias, A_log, D; (3, ...)."""
        conv, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = super().branches()
        bias = self.conv1d_s.bias
        assert bias is not None
        return (
            torch.cat([conv, self.conv1d_s.weight.squeeze(1)[None]]),
            torch.cat([conv_bias, bias[None]]),
            torch.cat([x_proj, self.x_proj_s.weight[None]]),
            torch.cat([dt_proj, self.dt_proj_s.weight[None]]),
            torch.cat([dt_bias, self.dt_proj_s.bias[None]]),
            torch.cat([A_log, self.A_s_log[None]]),
            torch.cat([D, self.D_s[None]]),
        )
