"""`selective_scan` as a loop of standard operators. Letters: b batch, k route, d channel, n state, l token, t step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference._routes import along_routes, back_to_tokens
from ._loop import loop


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    dt_proj: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, routes: Tensor | None,
    delta_softplus: bool, merge: bool,
) -> tuple[Tensor, Tensor, None]:  # fmt: skip
    """What `reference.selective_scan.definition` computes; decays must not overflow, as with A < 0 they cannot."""
    k, d, n = A.shape
    u, delta, B, C = (x.to(A.dtype) for x in (u, delta, B, C))
    if dt_proj is not None:
        delta = torch.matmul(dt_proj, delta)
    if delta_bias is not None:
        delta = delta + delta_bias[..., None]
    step = along_routes(F.softplus(delta) if delta_softplus else delta, k, routes)
    u_t = along_routes(u, k, routes)
    B_t, C_t = (along_routes(_broadcastable(x, d), k, routes) for x in (B, C))
    inputs = [step, step * u_t, B_t, C_t]
    if reset is not None:
        inputs.append(along_routes(reset, k, routes))

    def advance(h: Tensor, step: Tensor, x: Tensor, B: Tensor, C: Tensor, *cut: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.exp(step.unsqueeze(-1) * A) * h
        for flags in cut:
            kept = torch.where(flags[..., None, None], torch.zeros_like(kept), kept)
        h = kept + x.unsqueeze(-1) * B
        return h, (h * C).sum(-1)

    start = A.new_zeros(u.shape[0], k, d, n) if initial_state is None else initial_state
    y, last = loop(advance, start, [x.movedim(-1, 0) for x in inputs])
    y = y.movedim(0, -1)
    if D is not None:
        y = y + D[..., None] * u_t
    y = back_to_tokens(y, routes, u.shape[-1])
    return y.sum(1, keepdim=True) if merge else y, last, None


def _broadcastable(x: Tensor, channels: int) -> Tensor:
    """B or C (b, k, g, n, l) with one group or one for every channel."""
    return x if x.shape[2] in (1, channels) else x.repeat_interleave(channels // x.shape[2], dim=2)
