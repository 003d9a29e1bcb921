"""Routes as the definitions follow them: by gathering tokens into the order of the steps, and scattering them back."""

import torch
from torch import Tensor


def along_routes(x: Tensor, k: int, routes: Tensor | None) -> Tensor:
    """Tokens (b, 1|k, ..., l) in the order in which each route visits them: (b, k, ..., t)."""
    x = x.expand(-1, k, *x.shape[2:])
    if routes is None:
        return x
    index = routes.view(1, k, *[1] * (x.dim() - 3), -1)
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


def back_to_tokens(y: Tensor, routes: Tensor | None, tokens: int) -> Tensor:
    """The inverse of `along_routes` for (b, k, ..., t); tokens that a route does not visit get zero."""
    if routes is None:
        return y
    index = routes.view(1, routes.shape[0], *[1] * (y.dim() - 3), -1)
    return y.new_zeros(*y.shape[:-1], tokens).scatter(-1, index.expand_as(y), y)


def stack(states: list[Tensor], like: Tensor) -> Tensor:
    """States of consecutive steps, (t, ...); there may be none."""
    return torch.stack(states) if states else like.new_empty(0, *like.shape)
