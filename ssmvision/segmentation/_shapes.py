"""What networks demand of their arguments and inputs, in one sentence each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["check_input", "check_spatial_dims"]


def check_spatial_dims(network: str, given: int, *right: int) -> None:
    """Raise a ValueError where a network of some kinds of input is asked for another."""
    if given not in right:
        raise ValueError(f"{network}: spatial_dims must be {_either(right)}, not {given}")


def check_input(network: str, x: Tensor, channels: int | tuple[int, ...], divisors: Sequence[int]) -> None:
    """Raise a ValueError that names the rule which an input (b, c, *size) breaks.

    Args:
        network: Name for the error.
        x: The input.
        channels: Numbers of channels that are right.
        divisors: Of what each side must be a multiple; there are as many sides.
    """
    size, right = tuple(x.shape[2:]), (channels,) if isinstance(channels, int) else channels
    if len(size) != len(divisors):
        axes = "depth, " * (len(divisors) - 2) + "height, width"
        raise ValueError(f"{network} takes (batch, channels, {axes}), not {tuple(x.shape)}")
    if x.shape[1] not in right:
        raise ValueError(f"{network} was built for {_either(right)} input channels, not {x.shape[1]}")
    if any(side % divisor or not side for side, divisor in zip(size, divisors, strict=True)):
        rule = divisors[0] if len(set(divisors)) == 1 else tuple(divisors)
        raise ValueError(f"{network} needs sides that are multiples of {rule}, not {size}")


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
