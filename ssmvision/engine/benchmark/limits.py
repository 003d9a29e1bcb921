"""What one core of this machine can do at most: the two figures that bound every scan."""

from collections.abc import Callable

import torch

from ssmvision.ops import cpu

from .timing import interleaved

EXPONENTIALS = 1 << 19  # of one call of `exponentials`: about 0.1 ms


def exponentials() -> Callable[[], object]:
    """A call that computes the kernels' own 2^x (degree 5, `simd.h`) on data in L1, and does nothing else.

    Raises:
        NativeBuildError: There is no native library.
    """
    cpu.load()
    x = -torch.rand(1 << 11)
    out = torch.empty_like(x)
    return lambda: torch.ops.ssmvision_cpu.exp2(x, EXPONENTIALS >> 11, out)


def exp_limit(repeats: int = 200) -> float:
    """Exponentials per second of `exponentials`, one thread."""
    return 1e3 * EXPONENTIALS / interleaved({"exp2": exponentials()}, repeats)["exp2"]


def bandwidth_limit(repeats: int = 10) -> float:
    """Bytes per second, read and written, of a copy far larger than the caches, one thread."""
    x = torch.zeros(1 << 26)
    out = torch.zeros_like(x)
    return 1e3 * 2 * x.nbytes / interleaved({"copy": lambda: out.copy_(x)}, repeats)["copy"]
