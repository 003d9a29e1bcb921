"""S4ND: a state space model along each axis of an image or a volume (arXiv:2210.06583), under the official names.

The kernel of a grid is the outer product of one kernel per axis. A layer is made once and run at any resolution:
`rate` rescales its step sizes, and `bandlimit` drops the states that would alias at the lower one.

Letters: b batch, c outputs per channel, d channels, r rank, l places along one axis.
"""

from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._complex import wide
from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.s4 import S4Kernel, channel_map, make_activation
from ssmvision.layers.s4d import S4DKernel


class S4ND(nn.Module):
    """Convolution with a separable kernel over a grid, skip connection, activation and a map over channels.

    Args:
        dim: Channels.
        spatial_dims: Axes: 1 to 3.
        d_state: Real state size.
        channels: Outputs per channel.
        bidirectional: Look both ways along every axis.
        trank: Outer products of which the kernel is the mean.
        linear: Neither activation nor map over channels.
        activation: Before the map; one of `s4.ACTIVATIONS`, or None.
        final_act: After the map, as in `S4Block`.
        out_chans: Channels of the output; None for `dim`.
        l_max: Longest kernel along every axis, or along each; None for the extent of the grid.
        mode: "dplr" for `S4Kernel`, "s4d" or "diag" for `S4DKernel`.
        transposed: The grid is (b, dim, ...), else (b, ..., dim).
        dropout: Rate after the activation; whole channels.
        **kernel: Of the kernels, such as `init`, `disc`, `bandlimit`.
    """

    own_options = undecayed("D")

    def __init__(
        self,
        dim: int,
        spatial_dims: int = 2,
        d_state: int = 64,
        channels: int = 1,
        bidirectional: bool = True,
        trank: int = 1,
        linear: bool = False,
        activation: Optional[str] = "gelu",
        final_act: Optional[str] = "glu",
        out_chans: Optional[int] = None,
        l_max: Union[int, Sequence[int], None] = None,
        mode: str = "dplr",
        transposed: bool = True,
        dropout: float = 0.0,
        **kernel: Any,
    ) -> None:
        super().__init__()
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims {spatial_dims} is not 1, 2 or 3")
        if mode not in ("dplr", "s4d", "diag"):
            raise ValueError(f"mode {mode!r} is not 'dplr', 's4d' or 'diag'")
        dd = {name: kernel.get(name) for name in ("device", "dtype")}
        self.spatial_dims, self.channels, self.bidirectional, self.trank = spatial_dims, channels, bidirectional, trank
        self.l_max = tuple(l_max) if isinstance(l_max, Sequence) else (l_max,) * spatial_dims
        if len(self.l_max) != spatial_dims:
            raise ValueError(f"l_max {self.l_max} is not one length for each of {spatial_dims} axes")
        self.transposed = transposed
        self.D = nn.Parameter(torch.empty(channels, dim, **dd))
        make = S4Kernel if mode == "dplr" else S4DKernel
        outputs = channels * trank * (1 + bidirectional)
        self.kernel = nn.ModuleList(make(dim, d_state, outputs, **kernel) for _ in range(spatial_dims))
        self.activation = nn.Identity() if linear else make_activation(activation)
        self.drop = nn.Identity() if linear else nn.Dropout(dropout)
        self.output_linear = (
            nn.Identity()
            if linear
            else channel_map(dim * channels, dim if out_chans is None else out_chans, final_act, **dd)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """D is normal; kernels and the linear map initialize themselves."""
        nn.init.normal_(self.D)

    def forward(self, x: Tensor, rate: Union[float, tuple[float, ...]] = 1.0) -> Tensor:
        """(b, dim, ...) → (b, out_chans, ...), or channels last if not `transposed`.

        Args:
            x: A grid with `spatial_dims` axes.
            rate: Factor of the step sizes, of all axes or of each: 2 for a grid half as fine as in training.

        Raises:
            RuntimeError: A grid with another number of axes.
        """
        u = x if self.transposed else x.movedim(-1, 1)
        if u.dim() != 2 + self.spatial_dims:
            raise RuntimeError(f"S4ND: x has shape {tuple(x.shape)}, expected {self.spatial_dims} spatial axes")
        rates = rate if isinstance(rate, tuple) else (rate,) * self.spatial_dims
        y = self._convolve(wide(u), rates) + self.D.view(*self.D.shape, *[1] * self.spatial_dims) * u[:, None]
        y = self.drop(self.activation(y.to(u.dtype).flatten(1, 2)))
        y = self.output_linear(y.movedim(1, -1))
        return y.movedim(-1, 1) if self.transposed else y

    def _convolve(self, u: Tensor, rates: tuple[float, ...]) -> Tensor:
        """(b, d, ...) → (b, c, d, ...), on a torus so large that no kernel reaches around it into the grid."""
        if not u.numel():  # which transforms refuse
            return u[:, None].expand(-1, self.channels, *u.shape[1:])
        axes = range(self.spatial_dims)
        extents = u.shape[2:]
        kernels = [self._kernel(axis, extents[axis], rates[axis]) for axis in axes]
        sizes = [kernel.shape[-1] for kernel in kernels]
        spectrum = torch.ones((), device=u.device)
        for axis, kernel in enumerate(kernels):
            transformed = (torch.fft.rfft if axis == axes[-1] else torch.fft.fft)(kernel)
            others = [1] * axis, [1] * (axes[-1] - axis)
            spectrum = spectrum * transformed.view(*kernel.shape[:-1], *others[0], -1, *others[1])
        where = tuple(range(-self.spatial_dims, 0))
        y = torch.fft.rfftn(u, sizes, where)[:, None] * spectrum.mean(0)
        y = torch.fft.irfftn(y, sizes, where)
        for axis, extent in zip(where, extents, strict=True):
            y = y.narrow(axis, 0, extent)
        return y

    def _kernel(self, axis: int, extent: int, rate: float) -> Tensor:
        """(r, c, d, l) around a circle: backwards from its end if `bidirectional`."""
        longest = self.l_max[axis]
        length = extent if longest is None else min(extent, round(longest / rate))
        kernel, _ = self.kernel[axis](length, rate)
        kernel = F.pad(kernel.unflatten(0, (-1, self.trank, self.channels)), (0, extent))
        if not self.bidirectional:
            return kernel[0]
        return kernel[0] + kernel[1].flip(-1)
