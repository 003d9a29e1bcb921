"""A causal Transformer over tokens, with or without a cache of keys and values: what ConvS5 is measured against.

Letters: b batch, l tokens given, m tokens before them, d channels, n heads.
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

__all__ = ["CausalTransformer", "KeyValueCache"]

KeyValueCache = list[tuple[Tensor, Tensor]]


class CausalAttention(nn.Module):
    """Attention of each token to those before it and itself.

    Args:
        dim: Channels.
        num_heads: Heads.
        dropout: Rate at which attention weights are dropped.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, cache: Optional[tuple[Tensor, Tensor]] = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(b, l, d) after the keys and values (b, n, m, d / n) in the cache → (b, l, d), and those of all m + l."""
        q, k, v = (project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for project in self._projections())
        if cache is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(cache, (k, v), strict=True))
        length, total = q.shape[2], k.shape[2]
        mask = None
        if 1 < length < total:
            mask = torch.ones(length, total, dtype=torch.bool, device=x.device).tril(total - length)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=1 < length == total
        )
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.query, self.key, self.value


class CausalBlock(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CausalAttention(dim, num_heads, attention_dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_dim, act_layer=GELUTanh, drop=dropout)

    def forward(self, x: Tensor, cache: Optional[tuple[Tensor, Tensor]] = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(b, l, d) → the same, and the keys and values of all tokens so far."""
        y, cache = self.attn(self.norm1(x), cache)
        x = x + y
        return x + self.mlp(self.norm2(x)), cache


class CausalTransformer(nn.Module):
    """Projection, sinusoidal positions, pre-norm blocks, norm and projection.

    Args:
        dim: Channels; even.
        depth: Blocks.
        num_heads: Heads of attention.
        mlp_dim: Inner channels of the MLPs.
        dropout: Dropout rate of the MLPs.
        attention_dropout: Dropout rate of attention weights.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, dim)
        self.layers = nn.ModuleList(
            CausalBlock(dim, num_heads, mlp_dim, dropout, attention_dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cache: Optional[KeyValueCache] = None) -> tuple[Tensor, KeyValueCache]:
        """Tokens (b, l, d) after those in the cache → (b, l, d), and the cache of all so far."""
        start = 0 if cache is None else cache[0][0].shape[2]
        x = self.proj_in(x)
        x = x + _positions(start, x)
        caches = []
        for index, layer in enumerate(self.layers):
            x, after = layer(x, None if cache is None else cache[index])
            caches.append(after)
        return self.proj_out(self.norm(x)), caches


def _positions(start: int, x: Tensor) -> Tensor:
    """Sines and cosines (l, d) of positions from `start` on (arXiv:1706.03762, section 3.5)."""
    length, dim = x.shape[1:]
    position = torch.arange(start, start + length, device=x.device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, dim, 2, device=x.device) * (-math.log(10000.0) / dim))
    return torch.cat([(position * frequency).sin(), (position * frequency).cos()], dim=-1).to(x.dtype)
