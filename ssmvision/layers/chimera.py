"""The two-dimensional selective scan of Chimera (arXiv:2406.04320, section 3) as a layer for maps; experimental.

No code of the paper is published: this is our reading of its equations, in the shape of `SS2D`, and no weights exist
that could prove it. The paper scans variates and times; here these are rows and columns.

Letters: b batch, h row, w column, k corner that the recurrence starts from, d channel, n state.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._complex import wide
from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.ss2d import SS2D
from ssmvision.layers.ssm2d import FLIPS
from ssmvision.ops import linear_scan_2d


class Chimera(SS2D):
    """`SS2D` whose scan along rows and scan along columns are coupled, so that two dimensions meet in the state.

        h1[i, j] = a1 h1[i, j-1] + a2 h2[i, j-1] + dt1 B1 u[i, j],    a1 = exp(dt1 A1),    a2 = (1 - a1) K2
        h2[i, j] = a3 h1[i-1, j] + a4 h2[i-1, j] + dt2 B2 u[i, j],    a4 = exp(dt2 A4),    a3 = (1 - a4) K3
        y[i, j]  = C1 h1[i, j] + C2 h2[i, j] + D u[i, j]

    with step sizes, B and C of the pixel (i, j). The paper leaves the discretization of the cross terms open: here the
    other state is held over the step (zero-order hold of A2 = -A1 K2), and K = tanh(couplings). So |a1| + |a2| and
    |a3| + |a4| never exceed 1, and no parameters make the recurrence grow; with the Euler steps of `selective_scan_2d`
    some do.

    From one corner, a pixel reads what lies above it and to its left; from four, the whole map. The states of all
    pixels are materialized.

    Args:
        dim: Channels of input and output.
        d_state: Size of either state per channel.
        directions: Corners that the recurrence starts from, each with parameters of its own: 1, 2 (opposite) or 4.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: `ssm_ratio`, `dt_rank`, `d_conv`, `conv_bias`, `gate` and `act_layer` of `SS2D`.

    Raises:
        ValueError: Another number of corners, or an input that is no map.
    """

    own_options = SS2D.own_options | undecayed("couplings")

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        directions: int = 4,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        if directions not in FLIPS:
            raise ValueError(f"Chimera: directions must be 1, 2 or 4, not {directions}")
        super().__init__(dim, d_state, routes=2 * directions, device=device, dtype=dtype, **kwargs)
        self.directions = directions

    def _make_scan_parameters(self, dd: dict[str, Any]) -> None:
        """Those of `SS2D`, for h1 and h2 of every corner in turn, and the couplings."""
        super()._make_scan_parameters(dd)
        self.couplings = nn.Parameter(torch.empty(self.routes, self.d_inner, self.d_state, **dd))

    def reset_parameters(self) -> None:
        """As in `SS2D`; without couplings at first, so that training starts from scans along rows and columns."""
        super().reset_parameters()
        nn.init.zeros_(self.couplings)

    def forward(self, x: Tensor) -> Tensor:
        """(b, ..., h, w, dim) → the same; each map along further axes (a slice of a volume) is scanned alone."""
        if x.dim() < 4:
            raise ValueError(f"Chimera: x has shape {tuple(x.shape)}, expected (b, ..., h, w, dim)")
        return super().forward(x.flatten(0, -4)).reshape(x.shape)

    def scan(self, u: Tensor) -> Tensor:
        """The coupled scans alone, (b, h, w, d_inner) → the same."""
        delta, B, C = self.coefficients(u)
        y = self.recurrence(u, delta, B, C)
        return (y + self.scan_parameters()[1].sum(0) * wide(u)).to(u.dtype)

    def coefficients(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (b, h, w, 2k, d), B (b, h, w, 2k, n) and C of h1 and h2 from every corner, in raster order."""
        projected = F.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (self.routes, -1))
        delta, B, C = wide(projected).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        _, _, dt_bias, dt_proj = self.scan_parameters()
        return F.softplus(torch.einsum("bhwkr,kdr->bhwkd", delta, dt_proj) + dt_bias), B, C

    def recurrence(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """What the scans read, without D: linear in u (b, h, w, d) if the coefficients are given; in float32 or wider.

        Pixel by pixel, every corner is an entry of one batch.
        """
        a = torch.exp(delta.unsqueeze(-1) * self.scan_parameters()[0])
        a1, a4 = self._from_corners(a)
        a2, a3 = self._from_corners((1 - a) * torch.tanh(wide(self.couplings)))
        x1, x2 = self._from_corners((delta * wide(u).unsqueeze(-2)).unsqueeze(-1) * B.unsqueeze(-2))
        h = torch.stack(linear_scan_2d(a1, a2, a3, a4, x1, x2))
        y = (self._from_corners(C).unsqueeze(-2) * h).sum((0, -1)).unflatten(0, (self.directions, -1))
        return torch.stack([part.flip(axes) for part, axes in zip(y, self._flips(), strict=True)]).sum(0)

    def _from_corners(self, x: Tensor) -> Tensor:
        """(b, h, w, 2k, ...) in raster order → (2, k b, h, w, ...), for h1 and h2, each corner first in its maps."""
        parts = x.unflatten(3, (self.directions, 2)).unbind(3)
        turned = [part.flip(axes) for part, axes in zip(parts, self._flips(), strict=True)]
        return torch.cat(turned).movedim(3, 0)

    def _flips(self) -> list[tuple[int, ...]]:
        """The axes of (b, h, w, ...) to flip for each corner."""
        return [tuple(axis + 3 for axis in axes) for axes in FLIPS[self.directions]]
