"""`causal_conv1d` as standard operators. Letters: b batch, k route, d channel, l token, w width of the kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference._routes import along_routes, back_to_tokens


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, reset: Tensor | None, silu: bool
) -> Tensor:
    """What `reference.causal_conv1d.definition` computes."""
    k, d, width = weight.shape
    ordered = along_routes(x.to(weight.dtype), k, routes)
    if reset is None:
        kernel = weight.reshape(k * d, 1, width)
        y = F.conv1d(F.pad(ordered.flatten(1, 2), (width - 1, 0)), kernel, groups=k * d).unflatten(1, (k, d))
    else:
        y = _within_sequences(ordered, weight, along_routes(reset, k, routes))
    if bias is not None:
        y = y + bias[..., None]
    return back_to_tokens(F.silu(y) if silu else y, routes, x.shape[-1])


def _within_sequences(x: Tensor, weight: Tensor, reset: Tensor) -> Tensor:
    """The convolution tap by tap, each only where it reads the sequence of its own step."""
    width, length = weight.shape[-1], x.shape[-1]
    sequence = reset.to(torch.int64).cumsum(-1).unsqueeze(2)
    y = torch.zeros_like(x)
    for shift in range(width):
        earlier, of = (F.pad(t, (shift, 0))[..., :length] for t in (x, sequence))
        y = y + torch.where(of == sequence, earlier, 0) * weight[..., width - 1 - shift, None]
    return y
