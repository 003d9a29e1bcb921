"""Time-invariant layers: kernels over time, eigenvalues, transfer functions."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ssmvision.layers import S4ND, S5, S4DKernel, S4Kernel
from ssmvision.layers.hippo import diagonal_init, hippo, nplr
from ssmvision.layers.ptd import PTD, ptd, transfer_function

from .panels import FAINT, INK, LINES, SIGNED, SOFT, bare, heading, lines, plain, sheet, unit_circle

_STATES = 64
_DIAGONAL = ("legs", "lin", "inv", "inv2", "quad", "foud")


def draw_hippo() -> Figure:
    """Bases that a state remembers by, and the eigenvalues of every initialization."""
    figure, grid = sheet(2, 6, 5.2, wspace=0.9)
    for i, (measure, told, end, states) in enumerate(
        (
            ("legs", "all of the past, ever coarser", 4.0, range(4)),
            ("legt", "a window, in polynomials", 2.6, range(4)),
            ("fourier", "a window, in sines and cosines", 2.6, (0, 2, 3, 4)),
        )
    ):
        axes = figure.add_subplot(grid[0, 2 * i : 2 * i + 2])
        time = torch.linspace(0, end, 161, dtype=torch.float64)
        heading(axes, told, f'exp(t A) B of hippo("{measure}", {_STATES})')
        basis = _basis(measure, time)
        lines(axes, time, {f"_{n}": basis[:, n] for n in states})
        plain(axes, "time into the past")
    axes = figure.add_subplot(grid[1, :3])
    heading(axes, "how fast states oscillate", f"|Im A| of diagonal_init(init, {_STATES})")
    for color, init in zip(LINES, _DIAGONAL, strict=False):
        A, _ = diagonal_init(init, _STATES)
        axes.plot(A.imag.abs().sort().values.numpy(), color=color, linewidth=1.4, label=init)
    axes.plot(ptd(_STATES).Lambda.imag.abs().sort().values.numpy(), color=INK, linewidth=1, linestyle=":", label="ptd")
    axes.set_yscale("symlog", linthresh=1)
    axes.legend(fontsize=7.5, frameon=False, ncols=4, loc="lower right", labelcolor=INK)
    plain(axes, "state, slowest first", "frequency")
    axes = figure.add_subplot(grid[1, 3:])
    heading(axes, "how fast states fade", "eigenvalues: one of each conjugate pair; a random matrix to compare")
    _eigenvalues(axes)
    return figure


def _basis(measure: str, time: Tensor) -> Tensor:
    A, B = hippo(measure, _STATES)
    return torch.linalg.matrix_exp(time[:, None, None] * A) @ B


def _eigenvalues(axes: Axes) -> None:
    """In the complex plane, both axes logarithmic."""
    random = torch.linalg.eigvals(torch.randn(_STATES, _STATES, dtype=torch.float64))
    random = random[random.imag < 0]
    shown = {
        "legs, lin, inv, quad, foud": diagonal_init("legs", _STATES)[0], "real": diagonal_init("real", _STATES)[0],
        "ptd": ptd(_STATES).Lambda, "random": random,
    }  # fmt: skip
    for color, (name, A) in zip([*LINES[:3], "#8c959f"], shown.items(), strict=True):
        marker = "x" if name == "random" else "o"
        axes.scatter(A.real.numpy(), A.imag.abs().numpy(), s=11, color=color, marker=marker, linewidths=0.9, label=name)
    axes.set_xscale("symlog", linthresh=0.5)
    axes.set_yscale("symlog", linthresh=1)
    axes.axvspan(0, 40, color="#fbe9e5", zorder=0, linewidth=0)
    axes.text(0.3, 1200, "grows", fontsize=8, color="#b0422a")
    axes.set(xlim=(-250, 20), ylim=(-0.4, 6e4), xticks=[-100, -10, -1, 0, 1, 10], yticks=[0, 1, 10, 100, 1000])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=7.5, frameon=False, loc="upper left", labelcolor=INK, ncols=5, columnspacing=1)
    plain(axes, "Re A", "|Im A|")


def draw_s4() -> Figure:
    """Kernels of S4 and S4D by initialization, what diagonalization costs, and a kernel in two dimensions."""
    figure, grid = sheet(3, 4, 7.2)
    length, dt = 160, 0.015
    options: dict[str, Any] = {"d_state": _STATES, "dt_min": dt, "dt_max": dt}
    made = {
        'S4Kernel(init="legs")': S4Kernel(1, init="legs", **options),
        **{f'S4DKernel(init="{init}")': S4DKernel(1, init=init, **options) for init in
           ("legs", "ptd", "lin", "inv", "quad", "real")},
        'S4Kernel(init="fourier")': S4Kernel(1, init="fourier", **options),
    }  # fmt: skip
    names = ["S4, LegS", "S4D, LegS", "S4D, PTD", "S4D, Lin", "S4D, Inv", "S4D, Quad", "S4D, Real", "S4, Fourier"]
    for i, (name, (call, kernel)) in enumerate(zip(names, made.items(), strict=True)):
        axes = figure.add_subplot(grid[i // 4, i % 4])
        heading(axes, name, call)
        k = kernel.double()(length)[0][0, 0]
        lines(axes, torch.arange(length), {"": k / k.abs().max()}, width=0.9)
        plain(axes, "token" if i > 3 else "")
        axes.set(yticks=[-1, 0, 1], ylim=(-1.15, 1.15))
    _draw_transfer(figure.add_subplot(grid[2, :2]))
    axes = figure.add_subplot(grid[2, 2])
    heading(axes, "S4ND, one way", "S4ND(..., bidirectional=False)")
    _draw_kernel_2d(axes, bidirectional=False)
    axes = figure.add_subplot(grid[2, 3])
    heading(axes, "S4ND, both ways", "S4ND(..., bidirectional=True)")
    _draw_kernel_2d(axes, bidirectional=True)
    return figure


def _draw_transfer(axes: Axes) -> None:
    """|G(i omega)| of one random output of LegS: exact, without its low-rank part (with B clipped, too), perturbed."""
    heading(axes, "what diagonalization changes", f"|transfer_function|, {_STATES} states, the same C")
    A, B = hippo("legs", _STATES)
    C = torch.randn(_STATES, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(torch.complex128)
    W, _, clipped, V = nplr("legs", _STATES)
    omega = torch.logspace(0, math.log10(2 * _STATES**2), 120, dtype=torch.float64)
    omega = torch.cat([omega, W.imag.abs()]).sort().values  # spikes are narrower than the rest of the grid
    identity = torch.eye(_STATES, dtype=torch.complex128)
    exact = torch.linalg.solve(1j * omega[:, None, None] * identity - A, B.to(C)) @ C
    # Half of B, as in hippo("legsd"): that approximates LegS once its low-rank part is gone.
    curves = {"S4D, LegS": _paired(W, (C @ V) * (V.mH @ B.to(V)) / 2, omega)}
    curves["S4D, B clipped"] = _paired(W, (C @ V) * clipped / 2, omega)
    system: PTD = ptd(_STATES)
    curves["PTD"] = _paired(system.Lambda, (C @ system.V) * (system.V_inv @ B.to(C)), omega)
    for color, (name, G) in zip((LINES[1], LINES[3], LINES[2]), curves.items(), strict=True):
        axes.loglog(omega.numpy(), G.abs().numpy(), color=color, linewidth=1.1, label=name)
    axes.loglog(omega.numpy(), exact.abs().numpy(), color=INK, linewidth=1.1, linestyle=":", label="LegS itself")
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)
    plain(axes, "frequency")


def _paired(Lambda: Tensor, CB: Tensor, omega: Tensor) -> Tensor:
    """The transfer function of a system of which one of each conjugate pair is given."""
    return transfer_function(torch.cat([Lambda, Lambda.conj()]), torch.cat([CB, CB.conj()]), omega)


def _draw_kernel_2d(axes: Axes, bidirectional: bool) -> None:
    layer = S4ND(1, mode="s4d", bidirectional=bidirectional, linear=True, init="legs", dt_min=0.015, dt_max=0.015)
    layer = layer.double()
    layer.D.zero_()
    impulse = torch.zeros(1, 1, 65, 65, dtype=torch.float64)
    impulse[0, 0, 32, 32] = 1
    kernel = layer(impulse)[0, 0]
    bound = kernel.abs().max().item() * 0.7
    axes.imshow(kernel.numpy(), cmap=SIGNED, vmin=-bound, vmax=bound, interpolation="none")
    bare(axes)


def draw_s5() -> Figure:
    """Discrete eigenvalues of S5 by step size, its impulse responses, and packed clips."""
    figure, grid = sheet(1, 3, 3.4, wspace=0.2)
    axes = figure.add_subplot(grid[0])
    heading(axes, "eigenvalues after discretization", "S5(8, d_state=64).discrete()[0]")
    unit_circle(axes)
    for color, dt in zip(LINES, (0.1, 0.01, 0.001), strict=False):
        Lambda_bar, _ = S5(8, d_state=_STATES, dt_min=dt, dt_max=dt).discrete()
        for part in (Lambda_bar, Lambda_bar.conj().resolve_conj()):
            axes.scatter(part.real.numpy(), part.imag.resolve_neg().numpy(), s=8, color=color, linewidths=0,
                         label=f"dt = {dt}" if part is Lambda_bar else None)  # fmt: skip
    axes.legend(fontsize=7.5, frameon=False, loc="center", bbox_to_anchor=(0.3, 0.5), labelcolor=INK)
    plain(axes, "Re", "Im")
    axes = figure.add_subplot(grid[1])
    heading(axes, "what an impulse leaves behind", "S5(3)(impulse)")
    layer = S5(3, d_state=_STATES, dt_min=0.01, dt_max=0.05)
    impulse = torch.zeros(1, 200, 3)
    impulse[0, 5, 0] = 1
    y = layer(impulse)[0]
    lines(axes, torch.arange(200), {f"channel {c}": y[:, c] for c in range(1, 3)}, width=1.0)
    plain(axes, "token")
    axes = figure.add_subplot(grid[2])
    heading(axes, "packed clips", "S5(3)(clips, reset) without D")
    layer.D.zero_()
    clips = torch.cat([torch.ones(1, 70, 3), -torch.ones(1, 70, 3), torch.zeros(1, 60, 3)], 1)
    reset = torch.isin(torch.arange(200), torch.tensor([0, 70, 140]))[None]
    lines(axes, torch.arange(200), {"reset": layer(clips, reset)[0, :, 1], "no reset": layer(clips)[0, :, 1]})
    for start in (70, 140):
        axes.axvline(start, color=FAINT, linewidth=1, zorder=0)
        axes.text(start + 2, axes.get_ylim()[0], "clip starts", fontsize=7, color=SOFT, va="bottom")
    plain(axes, "token")
    return figure
