"""Mixing matrices M of layers, y = M(x) v, and what decides them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ssmvision.layers import SS2D, BiMamba, Chimera, Hydra, Mamba, Mamba2, NonCausalSSD, S4DKernel
from ssmvision.layers.mamba3 import trapezoidal_scan
from ssmvision.ops import ssd_scan

from ..mixing import mixing_matrix, toeplitz
from ..scans import watch_scans
from .panels import LINES, SOFT, heading, lines, matrix, plain, scale_of, sheet

_SIDE = 6  # maps of _SIDE x _SIDE tokens, so that matrices of sequences and maps are of one size
_TOKENS = _SIDE**2
_DECADES = 3.0


def draw_one_framework() -> Figure:
    """M of ten layers on random tokens."""
    figure, grid = sheet(2, 5, 5.2, left=0.015, right=0.985, wspace=0.1, hspace=0.3, bottom=0.13)
    panels: dict[str, tuple[str, Callable[[], Tensor]]] = {
        "long convolution": ("S4DKernel: Toeplitz", _s4d),
        "selective scan": ("Mamba, one channel", lambda: _recorded(Mamba(8))),
        "SSD": ("Mamba2, one head", lambda: _recorded(Mamba2(8, d_state=16, headdim=4))),
        "linear attention": ("ssd_scan, A = 0", _linear_attention),
        "softmax attention": ("not an SSM: full rank", _softmax),
        "two scans": ("BiMamba, one channel", lambda: _recorded(BiMamba(8))),
        "quasiseparable": ("Hydra, one head", _hydra),
        "no order": ("NonCausalSSD, one head", _noncausal),
        "four routes": (f"SS2D on {_SIDE} x {_SIDE}", lambda: _recorded(SS2D(8, d_state=16), _map())),
        "two coupled axes": (f"Chimera on {_SIDE} x {_SIDE}", _chimera),
    }
    for i, (title, (call, make)) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[i // 5, i % 5])
        heading(axes, title, call)
        matrix(axes, make(), _DECADES)
    scale_of(figure, (0.015, 0.045, 0.3, 0.02), _DECADES, "|M|, what token i (row) reads of token j (column)")
    return figure


def draw_mamba() -> Figure:
    """Memory of Mamba's states as they start, and M of its family."""
    figure, grid = sheet(2, 12, 5.9, wspace=1.6, hspace=0.5, bottom=0.12)
    layer, heads = Mamba(64), Mamba2(256, d_state=16, headdim=8)
    axes = figure.add_subplot(grid[0, :4])
    heading(axes, "memory at the start", "1 / (delta |A|), in tokens")
    reach = (F.softplus(layer.dt_proj.bias)[:, None] * layer.A_log.exp()).reciprocal()
    shown = {"Mamba, n = 1": reach[:, 0], "Mamba, n = 16": reach[:, -1],
             "Mamba2": (F.softplus(heads.dt_bias) * heads.A_log.exp()).reciprocal()}  # fmt: skip
    for color, (name, values) in zip(LINES, shown.items(), strict=False):
        axes.plot(torch.linspace(0, 1, len(values)).numpy(), values.sort().values.numpy(), color=color, label=name)
    axes.set_yscale("log")
    axes.legend(fontsize=7.5, frameon=False)
    plain(axes, "share of channels or heads", "tokens")
    axes = figure.add_subplot(grid[0, 4:8])
    heading(axes, "the states of one channel", "exp(-delta n t), delta = 0.01")
    time = torch.arange(0, 300, 3)
    lines(axes, time, {f"n = {n}": torch.exp(-0.01 * n * time) for n in (1, 2, 4, 8, 16)})
    plain(axes, "tokens since")
    _draw_selection(figure.add_subplot(grid[0, 8:]))
    panels: dict[str, Callable[[], Tensor]] = {
        "Mamba": lambda: _recorded(Mamba(8)),
        "Mamba-2": lambda: _recorded(Mamba2(8, d_state=16, headdim=4)),
        "Mamba-3": _mamba3,
        "BiMamba": lambda: _recorded(BiMamba(8)),
    }
    for i, (title, make) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[1, 3 * i : 3 * i + 3])
        heading(axes, title)
        matrix(axes, make(), _DECADES)
    scale_of(figure, (0.055, 0.05, 0.3, 0.018), _DECADES, "|M|, what token i (row) reads of token j (column)")
    return figure


def _draw_selection(axes: Axes) -> None:
    """A state that holds: between tokens that say so, delta is small and the scan forgets nothing."""
    heading(axes, "selection", "ssd_scan, delta = 1 at three tokens, else 0.01")
    length = 120
    delta = torch.full((1, length, 1), 0.01)
    delta[0, [15, 50, 90]] = 1.0
    values = torch.sin(torch.arange(length) / 6).view(1, length, 1, 1)
    one = torch.ones(1, length, 1, 1)
    held, _ = ssd_scan(values, delta, -torch.ones(1), one, one)
    lines(axes, torch.arange(length), {"tokens": values.flatten(), "output": held.flatten()})
    for t in (15, 50, 90):
        axes.axvline(t, color=SOFT, linewidth=0.6, linestyle=":")
    plain(axes, "token")


def _sequence() -> Tensor:
    return torch.randn(1, _TOKENS, 8)


def _map() -> Tensor:
    return torch.randn(1, _SIDE, _SIDE, 8)


def _recorded(layer: nn.Module, x: Tensor | None = None) -> Tensor:
    return mixing_matrix(watch_scans(layer, _sequence() if x is None else x)[0])[0]


def _s4d() -> Tensor:
    return toeplitz(S4DKernel(1, dt_min=0.05, dt_max=0.05)(_TOKENS)[0][0, 0])


def _linear_attention() -> Tensor:
    q, k = (F.elu(torch.randn(1, _TOKENS, 1, 16)) + 1 for _ in range(2))
    impulses = torch.eye(_TOKENS)[:, :, None, None]
    B, C = (m.expand(_TOKENS, -1, -1, -1) for m in (k, q))
    return ssd_scan(impulses, torch.ones(_TOKENS, _TOKENS, 1), torch.zeros(1), B, C)[0][..., 0, 0].T


def _softmax() -> Tensor:
    q, k = (torch.randn(_TOKENS, 16) for _ in range(2))
    return (2 * q @ k.T / 4).softmax(-1)


def _hydra() -> Tensor:
    """Both scans moved by one token, and the diagonal, as `Hydra.forward` adds them."""
    layer, x = Hydra(8, d_state=16, headdim=4), _sequence()
    scan = watch_scans(layer, x)[0]
    before, after = (F.pad(mixing_matrix(scan, sample)[0], (0, 0, 1, -1)) for sample in (0, 1))
    u = scan.arguments["x"][:1].flatten(2)
    return before + after.flip(0, 1) + torch.diag((layer.fc_D(u) + layer.D)[0, :, 0])


def _noncausal() -> Tensor:
    """|A| C (delta B)^T of one head, from the parts of a real layer."""
    layer, n = NonCausalSSD(8, 4, d_state=16), 16
    _, xbc, dt = layer.in_proj(_map()).split([16, 16 + 2 * n, 4], dim=-1)
    _, B, C = F.silu(layer.conv2d(xbc.permute(0, 3, 1, 2))).flatten(2)[0].T.split([16, n, n], dim=-1)
    delta = F.softplus(dt.flatten(1, 2) + layer.dt_bias)[0, :, :1]
    return layer.A_log[0].exp() * C @ (delta * B).T


def _chimera() -> Tensor:
    layer = Chimera(8, directions=1)
    nn.init.normal_(layer.couplings)
    u = torch.randn(1, _SIDE, _SIDE, layer.d_inner)
    coefficients = (m.expand(_TOKENS, *m.shape[1:]) for m in layer.coefficients(u))
    impulses = torch.eye(_TOKENS).view(-1, _SIDE, _SIDE, 1).expand(-1, -1, -1, layer.d_inner)
    return layer.recurrence(impulses, *coefficients)[..., 0].flatten(1).T


def _mamba3() -> Tensor:
    q, k = (torch.randn(1, _TOKENS, 1, 16) for _ in range(2))
    dt = F.softplus(torch.randn(1, _TOKENS, 1) - 2)
    decay, trap, angles = -dt, torch.randn(1, _TOKENS, 1), torch.randn(1, _TOKENS, 1, 4)
    bias = torch.ones(1, 16)
    given: dict[str, Any] = {"q": q, "k": k, "dt": dt, "a_dt": decay, "trap": trap, "angles": angles}
    given = {name: m.expand(_TOKENS, *m.shape[1:]) for name, m in given.items()}
    impulses = torch.eye(_TOKENS)[:, :, None, None]
    return trapezoidal_scan(v=impulses, q_bias=bias, k_bias=bias, **given)[0][..., 0, 0].T
