"""`selective_scan` with a complex state matrix, composed of tensor operations around `linear_scan`."""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear_scan import linear_scan
from .reference._routes import along_routes, back_to_tokens


def complex_selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], delta_bias: Optional[Tensor],
    dt_proj: Optional[Tensor], initial_state: Optional[Tensor], reset: Optional[Tensor], routes: Optional[Tensor],
    delta_softplus: bool, merge: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """S6 whose states stand for conjugate pairs: y_t = 2 Re(C_t h_t) + D u_t. Materialises (b, k, t, d, n).

    Shapes as in `reference.selective_scan.definition`: A is complex, B, C and initial_state may be.

    Returns:
        y (b, 1|k, d, l), summed over routes if `merge`, and the complex last state (b, k, d, n).
    """
    (b, _, _, tokens), (k, _, n) = u.shape, A.shape
    if dt_proj is not None:
        delta = torch.einsum("bkrl,kdr->bkdl", delta, dt_proj)
    if delta_bias is not None:
        delta = delta + delta_bias[..., None]
    step = along_routes(F.softplus(delta) if delta_softplus else delta, k, routes)  # (b, k, d, t)
    u_t = along_routes(u, k, routes)
    B_t, C_t = (along_routes(x, k, routes).permute(0, 1, 4, 2, 3) for x in (B, C))  # (b, k, t, g, n)
    reset_t = None if reset is None else along_routes(reset, k, routes).flatten(0, 1)

    def per_state(x: Tensor) -> Tensor:
        return x.transpose(-1, -2).unsqueeze(-1)  # (b, k, d, t) -> (b, k, t, d, 1)

    decay = torch.exp(per_state(step) * A[:, None])
    drive = _times(B_t, per_state(step * u_t).expand(-1, -1, -1, -1, n))
    h, last = linear_scan(
        decay.flatten(0, 1), drive.flatten(0, 1), None if initial_state is None else initial_state.flatten(0, 1),
        reset_t, backend=backend,
    )  # fmt: skip
    y = 2 * _times(C_t, h.unflatten(0, (b, k))).real.sum(-1).transpose(-1, -2)
    if D is not None:
        y = y + D[..., None] * u_t
    y = back_to_tokens(y, routes, tokens)
    return y.sum(1, keepdim=True) if merge else y, last.unflatten(0, (b, k))


def _times(coefficients: Tensor, x: Tensor) -> Tensor:
    """B or C (b, k, t, g, n) times x (b, k, t, d, n), whose consecutive channels share the groups."""
    grouped = x.unflatten(3, (coefficients.shape[3], -1))
    return (coefficients.unsqueeze(4) * grouped).flatten(3, 4)
