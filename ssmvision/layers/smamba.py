"""The encoder layer of S-Mamba (arXiv:2403.11144, section 3): Mamba over tokens that have no order."""

from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers.mamba import Mamba


class SMambaLayer(nn.Module):
    """Tokens without an order, such as the variates of a series or the leads of an ECG, mixed from both ends.

    x + mamba(x) + flip(mamba_r(flip(x))), norm, then a feed-forward network per token with a residual, norm.

    Args:
        dim: Channels of a token.
        d_state: Size of the state per channel.
        d_ff: Hidden channels of the feed-forward network; None for 4 dim.
        d_conv: Width of the causal convolutions.
        expand: Inner channels of the mixers / dim.
        dropout: Rate within the feed-forward network.
        act_layer: Activation of the feed-forward network.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_ff: Optional[int] = None,
        d_conv: int = 2,
        expand: float = 1,
        dropout: float = 0.0,
        act_layer: type[nn.Module] = nn.GELU,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = d_ff or 4 * dim
        self.attention = Mamba(dim, d_state, d_conv, expand, **dd)
        self.attention_r = Mamba(dim, d_state, d_conv, expand, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        # Convolutions of one token, as which the official checkpoints store them.
        self.conv1 = nn.Conv1d(dim, hidden, 1, **dd)
        self.conv2 = nn.Conv1d(hidden, dim, 1, **dd)
        self.act = act_layer()
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim, **dd)

    def reset_parameters(self) -> None:
        """Initialize the scans of both mixers."""
        self.attention.reset_parameters()
        self.attention_r.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(b, tokens, dim) → the same."""
        x = self.norm1(x + self.attention(x) + self.attention_r(x.flip(1)).flip(1))
        y = self.drop(self.act(F.linear(x, self.conv1.weight.squeeze(2), self.conv1.bias)))
        return self.norm2(x + self.drop(F.linear(y, self.conv2.weight.squeeze(2), self.conv2.bias)))
