"""What the Triton kernels share: arithmetic that is finite everywhere, and launches that can also be compiled unseen.

Letters: b batch, k route, d channel, n state, g group, l token, t step along a route, r rank of delta.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)  # folded into exponents: the hardware has exp2, not exp


@triton.jit
def combine(decay: tl.tensor, state: tl.tensor, next_decay: tl.tensor, next_state: tl.tensor) -> Any:
    """Two stretches of h -> decay h + state as one, for `tl.associative_scan`."""
    return decay * next_decay, next_decay * state + next_state


@triton.jit
def softplus(x: tl.tensor) -> Any:
    """log(1 + exp(x)) to float32's relative precision at any x.

    log1p is the series of 2 atanh(e / (2 + e)): the hardware's log(1 + e) loses the small steps that models begin with.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2 + e)
    q = s * s
    p = q * (1 / 13) + 1 / 11
    p = p * q + 1 / 9
    p = p * q + 1 / 7
    p = p * q + 1 / 5
    p = p * q + 1 / 3
    return tl.maximum(x, 0.0) + 2 * (s + s * q * p)


@triton.jit
def sigmoid(x: tl.tensor) -> Any:
    """1 / (1 + exp(-x)), the slope of softplus, without overflow."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0, 1.0, e) / (1 + e)


class Launch(NamedTuple):
    """One call of a kernel, complete but not yet made.

    Launchers build it and run it; the kernel report builds the same from meta tensors and compiles it for machines that
    are not there, so that what is examined is what would run.

    Args:
        kernel: The `triton.jit` function.
        grid: Programs per axis.
        arguments: Tensors, numbers and absent (None) arguments by name.
        constants: Compile-time arguments by name.
        num_warps: Warps per program.
        registers: What the assembler may use per thread, which otherwise takes all that there are for a lone warp.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    registers: int | None = None

    def run(self) -> None:
        """Launch on the device of the tensors; nothing happens where there is nothing to do."""
        if 0 in self.grid:
            return
        with _device_of(self.arguments):
            options = self.options("hip" if torch.version.hip else "cuda")
            self.kernel[self.grid](**self.arguments, **self.constants, **options)

    def options(self, backend: str) -> dict[str, int]:
        """What else the compiler is told, on "cuda" or "hip"."""
        # One stage: software pipelining of such recurrences is miscompiled on Blackwell by some versions of Triton.
        limit = {}
        if self.registers and backend == "cuda":
            limit = {"maxnreg": self.registers}
        elif self.registers and self.num_warps == 1:
            limit = {"waves_per_eu": 512 // self.registers}
        if backend == "hip":
            limit["matrix_instr_nonkdim"] = 16  # of 16 x 16: those of 32 x 32 take more registers
        return {"num_warps": self.num_warps, "num_stages": 1, **limit}


class Variant(NamedTuple):
    """A launch of typical size, for `ssmvision.engine.kernel_report`.

    Args:
        name: As the report prints it.
        launch: What the launcher would run, on meta tensors.
        bulk: Names of the pointer arguments of what is as large as the tokens. The kernel reads each by a `tl.load`
            whose first line names the pointer, so that the report can find the load's width in the machine code.
        registers: At most so many per thread.
    """

    name: str
    launch: Launch
    bulk: tuple[str, ...]
    registers: int


def _device_of(arguments: dict[str, Any]) -> AbstractContextManager[Any]:
    """Kernels start on the current device, which need not be that of the tensors."""
    tensor = next(x for x in arguments.values() if isinstance(x, Tensor))
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def warp_size(x: Tensor) -> int:
    """Lanes of a warp on the device of `x`: 64 on AMD's CDNA, 32 elsewhere."""
    return torch.cuda.get_device_properties(x.device).warp_size if x.is_cuda else 32


def strides(name: str, x: Tensor | None, *axes: str) -> dict[str, int]:
    """Launch arguments `<name>_<axis>`: strides of the leading dimensions of `x`, 0 if it repeats or is absent."""
    if x is None:
        return {f"{name}_{axis}": 0 for axis in axes}
    return {f"{name}_{axis}": 0 if x.shape[i] == 1 else x.stride(i) for i, axis in enumerate(axes)}


def power_of_two(size: int, at_least: int = 1) -> int:
    """The least power of two that is not less than either: sizes of tiles."""
    return max(at_least, 1 << max(0, size - 1).bit_length())
