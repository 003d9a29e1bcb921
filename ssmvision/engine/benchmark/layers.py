"""Whole layers against what bounds them: S4D and its FFT, S5 and memory, packed clips and the same clips as one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.engine.benchmark.timing import Bar, interleaved
from ssmvision.layers import S4D, S5, ConvS5, Mamba, Mamba2
from ssmvision.ops import fft_conv, linear_scan

__all__ = ["BARS", "packed", "s4d", "s5", "scan_share"]

BARS = {
    "S4D / bare FFT convolution": Bar(1.2, at_least=False),
    "S5's scan / copy of its bytes": Bar(2, at_least=False),
    "with / without resets": Bar(1.15, at_least=False),
    "scan share of ConvS5": Bar(0.05, at_least=False),
}


@torch.no_grad()
def s4d(repeats: int, batch: int = 8, dim: int = 256, length: int = 4096) -> dict[str, float]:
    """S4D's state space (its kernel, the convolution, the skip connection) beside a convolution with a given kernel.

    Returns:
        Milliseconds of the "state space", of its "kernel" alone, of the "bare FFT" and of the "whole layer", which
        mixes channels after it; and "S4D / bare FFT convolution".
    """
    layer, u, kernel = S4D(dim).eval(), torch.randn(batch, dim, length), torch.randn(dim, length) / 50

    def bare() -> Tensor:
        circle = 2 * length
        return torch.fft.irfft(torch.fft.rfft(u, circle) * torch.fft.rfft(kernel, circle), circle)[..., :length]

    found = interleaved(
        {
            "state space": lambda: fft_conv(u, layer.kernel(length), D=layer.D),
            "kernel": lambda: layer.kernel(length),
            "bare FFT": bare,
            "whole layer": lambda: layer(u),
        },
        repeats,
    )
    return found | {"S4D / bare FFT convolution": found["state space"] / found["bare FFT"]}


@torch.no_grad()
def s5(repeats: int, batch: int = 4, dim: int = 256, length: int = 4096) -> dict[str, float]:
    """S5's scan beside a copy that reads and writes as many bytes, and the layer beside its two matrix products.

    Returns:
        Milliseconds of "scan", "copy", "matrices" and "whole layer"; "S5's scan / copy of its bytes", and "S5 / its
        matrix products".
    """
    layer, u = S5(dim, d_state=dim).eval(), torch.randn(batch, length, dim)
    A, _ = layer.discrete()
    x = torch.randn(batch, length, len(A), dtype=torch.complex64)
    rows, weight = torch.view_as_real(x).flatten(-2), torch.randn(2 * len(A), dim)
    found = interleaved(
        {
            "scan": lambda: linear_scan(A, x),
            "copy": lambda: x.clone(),
            "matrices": lambda: (F.linear(u, weight), F.linear(rows, weight.T)),
            "whole layer": lambda: layer(u),
        },
        repeats,
    )
    return found | {
        "S5's scan / copy of its bytes": found["scan"] / found["copy"],
        "S5 / its matrix products": found["whole layer"] / found["matrices"],
    }


def packed(repeats: int) -> dict[str, float]:
    """The forward pass of recurrent layers over packed clips by that over the same tokens without resets, by layer."""
    layers: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "S5": (S5(192), (2, 2048, 192)),
        "Mamba": (Mamba(192), (2, 1024, 192)),
        "Mamba-2": (Mamba2(192), (2, 1024, 192)),
        "ConvS5": (ConvS5(32, ssm_size=32), (2, 300, 32, 8, 8)),
    }
    calls: dict[str, Callable[[], object]] = {}
    for name, (layer, shape) in layers.items():
        x, reset = torch.randn(shape), torch.arange(shape[1]).expand(shape[:2]) % 100 == 0
        calls[name], calls[f"{name}, packed"] = _forward(layer, x, None), _forward(layer, x, reset)
    ms = interleaved(calls, repeats)
    return {name: ms[f"{name}, packed"] / ms[name] for name in layers}


def _forward(layer: nn.Module, x: Tensor, reset: Tensor | None) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return layer(x, reset=reset)

    return run


@torch.no_grad()
def scan_share() -> float:
    """The scan's fraction of a ConvS5 layer's forward pass (96 frames, 128 channels and states, 16 x 16), profiled."""
    layer, u = ConvS5(128, ssm_size=128).eval(), torch.randn(1, 96, 128, 16, 16)
    layer(u)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(u)
    events = profile.key_averages()
    spent = sum(event.self_cpu_time_total for event in events if "linear_scan" in event.key)
    return spent / sum(event.self_cpu_time_total for event in events)
