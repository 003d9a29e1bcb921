"""What outputs of layers read: over maps, over frames, and over levels of a hierarchy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ssmvision.layers import (
    SS2D,
    SSM2D,
    AtrousSS2D,
    BidirectionalSpatialMamba,
    Chimera,
    ConvS5,
    Hierarchical,
    HierarchicalTemporalMamba,
    Level,
    LocalSS2D,
    MambaStack,
)

from .panels import heading, lines, matrix, plain, scale_of, sheet

_SIDE, _DECADES = 15, 4.0


def draw_two_d() -> Figure:
    """What the centre of a map reads, by layer."""
    figure, grid = sheet(2, 4, 6.3, left=0.015, wspace=0.06, hspace=0.28, bottom=0.1)
    local = ["h", "v", "w3", "w3_flip"]
    options: dict[str, Any] = {"ssm_ratio": 1, "d_state": 4}
    corner = Chimera(8, directions=1, **options)
    panels: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "SSM2D, one corner": ("SSM2D(8, 15, directions=1)", _channels_last(SSM2D(8, _SIDE, directions=1))),
        "SSM2D, four corners": ("SSM2D(8, 15, directions=4)", _channels_last(SSM2D(8, _SIDE, directions=4))),
        "SS2D": ("SS2D(8).scan", _scan(SS2D(8, **options))),
        "LocalSS2D": (f"LocalSS2D(8, {local})".replace("'", ""), _scan(LocalSS2D(8, local, **options))),
        "AtrousSS2D": ("AtrousSS2D(8).scan", _scan(AtrousSS2D(8, **options))),
        "Chimera, new": ("Chimera(8): couplings 0", _scan(Chimera(8, **options))),
        "Chimera, one corner": (
            "Chimera(8, directions=1), coupled",
            _scan(corner, coupled=True),
        ),
        "Chimera, four corners": ("Chimera(8), coupled", _scan(Chimera(8, **options), coupled=True)),
    }
    for i, (title, (call, function)) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[i // 4, i % 4])
        heading(axes, title, call)
        matrix(axes, _read_by_the_centre(function), _DECADES)
    scale_of(figure, (0.015, 0.04, 0.3, 0.017), _DECADES, "gradient of the centre, mean of 8 random maps")
    return figure


def _channels_last(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda u: layer(u.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _scan(layer: SS2D, coupled: bool = False) -> Callable[[Tensor], Tensor]:
    """The scan alone, without the skip connection, which would outshine it."""
    layer.Ds.zero_()
    if coupled:
        nn.init.normal_(layer.get_parameter("couplings"))
    return layer.scan


@torch.enable_grad()
def _read_by_the_centre(function: Callable[[Tensor], Tensor]) -> Tensor:
    u = torch.randn(8, _SIDE, _SIDE, 8, requires_grad=True)
    total = torch.zeros(_SIDE, _SIDE)
    y = function(u)[:, _SIDE // 2, _SIDE // 2]
    for channel in range(8):
        (gradient,) = torch.autograd.grad(y[:, channel].sum(), u, retain_graph=True)
        total += gradient.abs().mean((0, 3))
    return total


class _Bare(nn.Module):
    """No feedthrough: the output of the states alone."""

    def forward(self, y: Tensor, u: Tensor) -> Tensor:
        """Its first argument."""
        return y


def draw_convs5() -> Figure:
    """What one pixel of frame 0 leaves in later frames, for one layer and for three."""
    figure, grid = sheet(2, 6, 4.4, left=0.015, wspace=0.3, hspace=0.4, bottom=0.17)
    frames, side = (0, 1, 4, 16, 64), 15
    curves = {}
    for row, depth in enumerate((1, 3)):
        x = torch.zeros(1, 65, 8, side, side)
        x[0, 0, :, side // 2, side // 2] = torch.randn(8)
        for _ in range(depth):
            layer = ConvS5(8, ssm_size=32, num_groups=2, dt_min=0.02, dt_max=0.1)
            layer.feedthrough = _Bare()
            x = layer(x)
        energy = x[0].norm(dim=1)
        for column, frame in enumerate(frames):
            axes = figure.add_subplot(grid[row, column])
            heading(axes, f"frame {frame}", f"{depth} x ConvS5(8)")
            matrix(axes, energy[frame] / energy.max() if energy[frame].any() else energy[frame], _DECADES)
        curves[f"{depth} x ConvS5"] = energy.flatten(1).norm(dim=1) / energy.flatten(1).norm(dim=1).max()
    axes = figure.add_subplot(grid[:, 5])
    heading(axes, "norm", "of all pixels")
    lines(axes, torch.arange(65), curves)
    axes.set_yscale("log")
    plain(axes, "frame")
    scale_of(figure, (0.015, 0.07, 0.25, 0.022), _DECADES, "of the frame's largest value")
    return figure


def draw_hierarchical() -> Figure:
    """Jacobians of a flat and of a hierarchical sequence model, and of Motion Mamba's two blocks."""
    figure, grid = sheet(1, 4, 3.3, left=0.03, wspace=0.22, bottom=0.2)
    dim, length, ratio = 4, 32, 8
    x = torch.randn(1, length, dim)
    low, high = (Level(MambaStack(dim, 1, d_state=4), dim) for _ in range(2))
    time, channels = HierarchicalTemporalMamba(dim, 3), BidirectionalSpatialMamba(8)
    panels: dict[str, tuple[str, str, str, Tensor]] = {
        "flat": ("MambaStack", "step", "step", _jacobian(MambaStack(dim, 1, d_state=4), x, (1, 3))),
        "Hierarchical": (f"ratio={ratio}", "step", "chunk", _jacobian(Hierarchical(low, high, ratio), x, (1, 3))),
        "over time": ("HierarchicalTemporalMamba", "frame", "frame", _jacobian(time, x, (1, 3))),
        "over channels": ("BidirectionalSpatialMamba", "channel", "channel",
                          _jacobian(channels, torch.randn(1, 8, 16), (0, 2))),
    }  # fmt: skip
    for i, (title, (call, read, written, jacobian)) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[i])
        heading(axes, title, call)
        matrix(axes, jacobian, _DECADES)
        axes.set_aspect("auto")
        axes.set_xlabel(read, fontsize=8)
        axes.set_ylabel(written, fontsize=8)
    scale_of(figure, (0.03, 0.08, 0.25, 0.025), _DECADES, "norm of the Jacobian")
    return figure


@torch.enable_grad()
def _jacobian(layer: nn.Module, x: Tensor, over: tuple[int, int]) -> Tensor:
    """Norms of d layer(x) / d x over the given axes of both, which leaves a matrix."""
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)[:, :, 0]
    return jacobian.square().sum(over).sqrt()
