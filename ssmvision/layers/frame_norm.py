"""Group normalization that keeps up with convolutions on many channels-last pictures.

Letters: n pictures, c channels, g groups, h height, w width.
"""

import torch
from torch import Tensor, nn

__all__ = ["FrameNorm"]

_FEW = 8  # pictures for which one call of torch's kernel costs less than several vectorized ones


class FrameNorm(nn.GroupNorm):
    """nn.GroupNorm, whose channels-last kernel takes numbers one by one where a group is narrower than a vector.

    The videos of this package have groups of one to eight channels and hundreds of frames. For those, statistics are
    sums over whole rows of channels; the rest is one multiplication and addition.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) → the same, channels-last in memory for many pictures."""
        plain = len(x) <= _FEW or not x.is_cpu or x.dtype not in (torch.float32, torch.float64)
        if plain or self.weight.dtype != x.dtype:
            return super().forward(x)
        rows = x.permute(0, 2, 3, 1).flatten(1, 2)
        mean, square = (self._by_group(moment) for moment in (rows, rows * rows))
        scale = ((square - mean * mean).clamp(min=0) + self.eps).rsqrt() * self.weight.view(self.num_groups, -1)
        shift = self.bias.view(self.num_groups, -1) - mean * scale
        rows = torch.addcmul(shift.flatten(2), rows, scale.flatten(2))
        return rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _by_group(self, rows: Tensor) -> Tensor:
        """(n, h w, c) → the mean of each group, (n, 1, g, 1)."""
        # Sums, then a division: the gradient of a mean would divide every number of the picture.
        sums = rows.sum(1, keepdim=True).unflatten(2, (self.num_groups, -1))
        return sums.mean(3, keepdim=True) / rows.shape[1]
