"""Linear attention in the shape of a Mamba block (MLLA, arXiv:2405.16605, section 4)."""

from typing import Any

import torch.nn.functional as F
from timm.layers import apply_rot_embed
from torch import Tensor, nn

from ssmvision.layers.pos_embed import rotary_table


class MambaLikeLinearAttention(nn.Module):
    """Linear attention with what makes Mamba work but its recurrence: a gate, a convolution and positions.

    q, k = elu(qk(v)) + 1, and with R the rotation by 2-D position and means over all n tokens,

        y_i = R q_i · mean_j(R k_j v_jᵀ) / (q_i · mean_j(k_j) + 1e-6) + lepe(v)_i

    Args:
        dim: Channels of input and output, a multiple of 4 and of num_heads.
        num_heads: Heads.
        qk_bias: Bias in the projection to queries and keys.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, num_heads: int, qk_bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if dim % 4 or dim % num_heads:
            raise ValueError(f"MambaLikeLinearAttention: dim {dim} must be a multiple of 4 and of {num_heads} heads")
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, dim, **dd)
        self.act_proj = nn.Linear(dim, dim, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.qk = nn.Linear(dim, 2 * dim, bias=qk_bias, **dd)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.out_proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) → (b, h, w, dim)."""
        B, H, W, D = x.shape
        v = F.silu(self.dwc(self.in_proj(x).permute(0, 3, 1, 2)))
        values = v.permute(0, 2, 3, 1)
        qk = (F.elu(self.qk(values)) + 1).reshape(B, H, W, 2, D)
        sin, cos = rotary_table(x).unbind(0)
        q, k = self._heads(qk).unbind(0)
        rotated_q, rotated_k = self._heads(apply_rot_embed(qk, sin, cos)).unbind(0)
        # Half of the 1 / n on either side, so that the sum over tokens stays small in half precision.
        scale = (H * W) ** -0.5
        state = (rotated_k.transpose(2, 3) * scale) @ (self._heads(values.reshape(B, H, W, 1, D)).squeeze(0) * scale)
        y = rotated_q @ state / (q @ k.mean(2).unsqueeze(3) + 1e-6)  # (b, heads, l, dim / heads)
        y = y.transpose(1, 2).reshape(B, H, W, D) + self.lepe(v).permute(0, 2, 3, 1)
        return self.out_proj(y * F.silu(self.act_proj(x)))

    def _heads(self, x: Tensor) -> Tensor:
        """(b, h, w, parts, dim) → (parts, b, heads, h * w, dim / heads)."""
        B, H, W, P, D = x.shape
        return x.reshape(B, H * W, P, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
