"""`causal_conv1d`, the short depthwise convolution in front of a scan, along the same routes.

Letters: b batch, k route, d channel, l token, t step along a route, w width of the kernel.
"""

from typing import Optional

import torch
from torch import Tensor

from . import reference


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    silu: bool = False,
    routes: Optional[Tensor] = None,
) -> Tensor:
    """Depthwise causal convolution (Mamba, arXiv:2312.00752, figure 3) along one or several routes.

        y[route[t]] = bias + sum_j weight[j] x[route[t - w + 1 + j]], zero before the first step

    Args:
        x: Tokens (b, d, l), shared by all routes.
        weight: (k, d, w), or (d, w) for one pass over the tokens in order.
        bias: (k, d) or (d,).
        silu: Apply SiLU to the result.
        routes: int64 (k, l), permutations; see `ssmvision.ops.routes`. None goes 0, 1, 2, ...

    Returns:
        (b, k, d, l), or (b, d, l) if weight is (d, w); tokens stay in their places.
    """
    return torch.ops.ssmvision.causal_conv1d(x, weight, bias, silu, routes)


def _composite(
    x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, silu: bool = False, routes: Optional[Tensor] = None
) -> Tensor:
    single = weight.dim() == 2
    if single:
        weight = weight.unsqueeze(0)
        bias = None if bias is None else bias.unsqueeze(0)
    y = reference.causal_conv1d(x, weight, bias, silu, routes)
    return y.squeeze(1) if single else y


_library = torch.library.Library("ssmvision", "FRAGMENT")
_library.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, bool silu=False, Tensor? routes=None) -> Tensor"
)
_library.impl("causal_conv1d", _composite, "CompositeImplicitAutograd")
