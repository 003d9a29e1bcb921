"""One oscillation added to sequences, and the frequency of it that a network amplifies most.

Letters: n sequences, l steps, d channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ssmvision.layers import S5, Level, S4DKernel, S4Kernel

_FINER = 8  # a spike is narrower than the distance of Fourier modes


def fourier_noise(x: Tensor, omega: float, level: float, seed: int = 0) -> Tensor:
    """Sequences (n, l, 1) and one oscillation each, of `level` times their norm, with random phase.

    Args:
        x: The sequences.
        omega: Angular frequency, radians per step, up to pi.
        level: Norm of the oscillation over that of its sequence.
        seed: Of the phases.
    """
    phase = 2 * math.pi * torch.rand(len(x), 1, 1, generator=torch.Generator().manual_seed(seed))
    wave = torch.sin(omega * torch.arange(x.shape[1])[:, None] + phase)
    return x + level * x.norm(dim=1, keepdim=True) * wave / wave.norm(dim=1, keepdim=True)


@torch.inference_mode()
def spike(net: nn.Module, length: int) -> float | None:
    """The angular frequency, radians per step, that the first time-invariant layer of `net` amplifies most.

    Gains are summed over channels by their squares; what oscillates less than once in `length` steps does not count.
    None without such a layer.
    """
    response = _impulse_response(net, length)
    if response is None:
        return None
    gain = torch.fft.rfft(response.double(), n=_FINER * length).abs().square().sum(0)
    return 2 * math.pi * (_FINER + int(gain[_FINER:].argmax())) / (_FINER * length)


def _impulse_response(net: nn.Module, length: int) -> Tensor | None:
    """What the first layer answers to an impulse of the input, without its skip connection: (d, l)."""
    embed = next(level.embed for level in net.modules() if isinstance(level, Level))
    weight = embed.get_parameter("weight")[:, 0]
    for layer in net.modules():
        if isinstance(layer, S4DKernel | S4Kernel):
            return (layer(length)[0] * weight[:, None]).flatten(0, 1)
        if isinstance(layer, S5):
            impulse = weight.new_zeros(length, len(weight))
            impulse[0] = weight
            return (layer(impulse[None])[0] - layer.D * impulse).T
    return None
