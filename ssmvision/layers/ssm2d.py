"""The 2-D SSM of "A 2-Dimensional State Space Layer for Spatial Inductive Bias" (arXiv:2306.06635, section 4).

Parameter names are those of github:ethanbar11/ssm_2d.

Letters: b batch, d channels, s places along a side, k kernels (copies of the dynamics), n states.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ssmvision.layers._complex import as_complex, wide
from ssmvision.layers._optimizer_options import undecayed
from ssmvision.ops import linear_scan_2d

FLIPS: dict[int, tuple[tuple[int, ...], ...]] = {1: ((),), 2: ((), (-2, -1)), 4: ((), (-2,), (-1,), (-2, -1))}
_MATRICES = ("A_1", "A_2", "A_3", "A_4")
_STATES = [f"{group}.{name}" for group in ("A", "A_angle", "A_radius") for name in _MATRICES]


class SSM2D(nn.Module):
    """Convolution of an image with kernels that two coupled states, one along rows and one along columns, draw.

        xh[i, j] = f (A_1 xh[i, j-1] + A_2 xv[i, j-1]) + B_1 u[i, j]
        xv[i, j] = f (A_3 xh[i-1, j] + A_4 xv[i-1, j]) + B_2 u[i, j]
        y[i, j] = (C_1 xh[i, j] + C_2 xv[i, j]) / sqrt(n)

    f is 1/2 where both states that enter can differ from zero after one impulse, else 1. The kernel, y after an
    impulse, is doubled in its first row and column, except at their corner.

    Args:
        dim: Channels.
        side: Places along a side of the kernel; images may be larger or smaller.
        d_state: States n of either kind.
        n_ssm: Copies of the dynamics, in turn for the channels.
        directions: Corners that the recurrence starts from: 1, 2 (opposite) or 4.
        complex_ssm: Complex states, whose real part is used.
        use_residual: Add a multiple of the input.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed(*_STATES, "B_1", "B_2", "omega")

    def __init__(
        self,
        dim: int,
        side: int,
        d_state: int = 16,
        n_ssm: int = 2,
        directions: int = 4,
        complex_ssm: bool = False,
        use_residual: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if directions not in FLIPS:
            raise ValueError(f"directions {directions} is not 1, 2 or 4")
        if dim % n_ssm:
            raise ValueError(f"{dim} channels cannot share {n_ssm} copies of the dynamics evenly")
        dd = {"device": device, "dtype": dtype}
        kernels, pair = directions * n_ssm, [2] * complex_ssm
        self.dim, self.side, self.d_state, self.directions, self.complex_ssm = (
            dim,
            side,
            d_state,
            directions,
            complex_ssm,
        )
        for group in ("A_angle", "A_radius") if complex_ssm else ("A",):
            matrices = {name: nn.Parameter(torch.empty(kernels, d_state, **dd)) for name in _MATRICES}
            self.register_module(group, nn.ParameterDict(matrices))
        self.B_1 = nn.Parameter(torch.empty(kernels, d_state, *pair, **dd))
        self.B_2 = nn.Parameter(torch.empty(kernels, d_state, *pair, **dd))
        self.C_1 = nn.Parameter(torch.empty(dim * directions, d_state, *pair, **dd))
        self.C_2 = nn.Parameter(torch.empty(dim * directions, d_state, *pair, **dd))
        self.omega = nn.Parameter(torch.empty(dim, **dd)) if use_residual else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All normal; before the sigmoid, in the case of A and B."""
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, height, width) → the same."""
        kernel = self.kernel().permute(2, 0, 1).unflatten(0, (self.directions, self.dim))
        image = wide(x)
        y = torch.zeros_like(image)
        for flips, own in zip(FLIPS[self.directions], kernel, strict=True):
            y = y + _convolve(image.flip(flips), own).flip(flips)
        return (y if self.omega is None else y + self.omega[:, None, None] * image).to(x.dtype)

    def kernel(self) -> Tensor:
        """(side, side, directions * dim), direction by direction."""
        A, (B_1, B_2, C_1, C_2) = self._system()
        h, v = self._states(A, B_1, B_2)
        h, v = (x.repeat(1, 1, len(C_1) // h.shape[2], 1) for x in (h, v))
        y = ((C_1 * h + C_2 * v).sum(-1) / math.sqrt(self.d_state)).real
        weight = y.new_full((self.side, self.side, 1), 1.0)
        weight[0] = weight[:, 0] = 2
        weight[0, 0] = 1
        return weight * y

    def _states(self, A: list[Tensor], B_1: Tensor, B_2: Tensor) -> tuple[Tensor, Tensor]:
        """Both states (s, s, k, n) after an impulse at the corner."""
        side = self.side
        row, column = torch.arange(side, device=B_1.device)[:, None], torch.arange(side, device=B_1.device)
        # Which states an impulse reaches: along rows all but the first column, along columns all but the first row.
        into_h = ((row == 0) & (column == 1)) | ((row >= 1) & (column >= 2))
        halves = [torch.where(both, 0.5, 1.0)[..., None, None] for both in (into_h, into_h.T)]
        a1, a2, a3, a4 = ((halves[i // 2] * A[i])[None].expand(1, side, side, *B_1.shape) for i in range(4))
        impulse = ((row == 0) & (column == 0))[..., None, None]
        h, v = linear_scan_2d(a1, a2, a3, a4, (impulse * B_1)[None], (impulse * B_2)[None])
        return h[0], v[0]

    def _system(self) -> tuple[list[Tensor], list[Tensor]]:
        """A_1 to A_4 and B_1, B_2 (k, n), C_1 and C_2 (directions * dim, n)."""
        inputs, outputs = [wide(x).sigmoid() for x in (self.B_1, self.B_2)], [self.C_1, self.C_2]
        if not self.complex_ssm:
            return [wide(x).sigmoid() for x in self._matrices("A")], inputs + [wide(C) for C in outputs]
        A = [
            torch.polar(wide(radius).sigmoid(), 2 * math.pi * wide(angle).sigmoid())
            for radius, angle in zip(self._matrices("A_radius"), self._matrices("A_angle"), strict=True)
        ]
        return A, [as_complex(x) for x in inputs + outputs]

    def _matrices(self, group: str) -> list[Tensor]:
        return [self.get_parameter(f"{group}.{name}") for name in _MATRICES]


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution of (b, d, height, width) with (d, side, side), by FFT."""
    sizes = [extent + kernel.shape[-1] for extent in x.shape[-2:]]
    y = torch.fft.irfft2(torch.fft.rfft2(x, sizes) * torch.fft.rfft2(kernel, sizes), sizes)
    return y[..., : x.shape[-2], : x.shape[-1]]
