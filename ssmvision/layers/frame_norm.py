"""Group normalization that keeps up with convolutions on many channels-last pictures.

Letters: n pictures, c channels, g groups, h height, w width.
"""

from typing import Any

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
        rows, _, _ = _Normalize.apply(rows, self.weight, self.bias, self.num_groups, self.eps)
        return rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def _statistics(rows: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Rows (n, h w, c) → the mean of each group and the inverse of its standard deviation, (n, 1, g, 1)."""
    mean, square = (_sums(moment, groups).mean(3, keepdim=True) / rows.shape[1] for moment in (rows, rows * rows))
    return mean, ((square - mean * mean).clamp(min=0) + eps).rsqrt()


def _sums(rows: Tensor, groups: int) -> Tensor:
    """Rows (n, h w, c) → the sum over the picture, (n, 1, g, c / g)."""
    return rows.sum(1, keepdim=True).unflatten(2, (groups, -1))


class _Normalize(torch.autograd.Function):
    """Normalized rows and their statistics. The gradient takes half as many passes over the rows as autograd's would.

    With y = a x + s, a = weight / std, it is a dy + k x + t: the last two are numbers of a group.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, inverse = _statistics(rows, groups, eps)
        scale = inverse * weight.view(groups, -1)
        shift = bias.view(groups, -1) - mean * scale
        return torch.addcmul(shift.flatten(2), rows, scale.flatten(2)), mean, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        rows, weight, _, ctx.groups, ctx.eps = inputs
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(rows, weight, *statistics)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        rows, weight, mean, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the statistics have gradients, too
            mean, inverse = _statistics(rows, ctx.groups, ctx.eps)
        by_channel = weight.view(ctx.groups, -1)
        total, product = _sums(dy, ctx.groups), _sums(dy * rows, ctx.groups)
        product = (product - mean * total) * inverse  # of dy with the normalized rows
        slope, along = ((by_channel * x).mean(3, keepdim=True) / rows.shape[1] for x in (total, product))
        k = -inverse.square() * along
        t = -inverse * slope - mean * k
        k, t = (x.expand_as(total).flatten(2) for x in (k, t))
        drows = torch.addcmul(torch.addcmul(t, rows, k), dy, (inverse * by_channel).flatten(2))
        return drows, product.sum(0).flatten(), total.sum(0).flatten(), None, None
