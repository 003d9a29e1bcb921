"""What networks demand of an input, in one sentence each."""

from torch import Tensor

__all__ = ["check_input", "check_spatial_dims"]


def check_input(network: str, x: Tensor, channels: tuple[int, ...], spatial_dims: int, multiple: int) -> None:
    """Raise a ValueError that names the rule which an input (b, c, ...) breaks.

    Args:
        network: Name for the error.
        x: The input.
        channels: Numbers of channels that are right.
        spatial_dims: Axes after the channels.
        multiple: Of what every side must be a multiple.
    """
    shape = tuple(x.shape)
    if len(shape) != 2 + spatial_dims:
        raise ValueError(
            f"{network} takes (batch, channels, {'depth, ' * (spatial_dims - 2)}height, width), not {shape}"
        )
    if shape[1] not in channels:
        raise ValueError(f"{network} was built for {' or '.join(map(str, channels))} input channels, not {shape[1]}")
    if any(side % multiple or not side for side in shape[2:]):
        raise ValueError(f"{network} needs sides that are multiples of {multiple}, not {shape[2:]}")


def check_spatial_dims(network: str, given: int, wanted: int) -> None:
    """Raise a ValueError where a network of one kind of input is asked for another."""
    if given != wanted:
        raise ValueError(f"{network}: spatial_dims must be {wanted}, not {given}")
