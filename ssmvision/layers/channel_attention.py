"""The channel attention of LocalMamba (arXiv:2403.09338) and EfficientVMamba (arXiv:2403.09977)."""

from typing import Any

import torch
from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """Weighs channels by what all tokens have in common: x * sigmoid(MLP(mean of norm(x))).

    Args:
        dim: Channels of input and output.
        reduction: Channels / hidden channels of the MLP.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, reduction: int = 8, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.global_reduce = nn.Linear(dim, dim // reduction, **dd)
        self.act = nn.GELU()
        self.channel_select = nn.Linear(dim // reduction, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(..., l, dim) → (..., l, dim)."""
        common = self.norm(x).mean(-2, keepdim=True)
        return x * torch.sigmoid(self.channel_select(self.act(self.global_reduce(common))))
