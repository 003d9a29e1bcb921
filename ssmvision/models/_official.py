"""How a family answers `tools/verify.py`: from the official constructor arguments to our model, and where to look."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


def _output(inputs: tuple[Any, ...], output: Any) -> Tensor:
    return output


def nhwc(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """Read an NCHW output as NHWC."""
    return output.permute(0, 2, 3, 1)


def nchw(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """Read an NHWC output as NCHW."""
    return output.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Tap:
    """One tensor of an official module's output, found in ours.

    Args:
        module: Name of our module to hook.
        read: Gets that module's inputs and output, returns the tensor as the official code lays it out.
    """

    module: str
    read: Callable[[tuple[Any, ...], Any], Tensor] = _output


@dataclass(frozen=True)
class OfficialModel:
    """Our model built from official arguments; `taps` gives the tensors of an official module by its name."""

    model: nn.Module
    taps: Callable[[str], list[Tap]]
