"""What needs a process of its own: another instruction set, and peaks of memory."""

import os
import subprocess
import sys

_SCAN = """
import torch
from ssmvision.engine.benchmark import interleaved
from ssmvision.engine.benchmark.operators import OPS, _forward, _inputs, _native
torch.set_num_threads(1)
call = _forward(_native, _inputs(OPS[{shape!r}]))
print(interleaved({{"scan": call}}, {repeats})["scan"])
"""

_TRAIN = """
import torch
from ssmvision.engine.benchmark import OpShape, resident
from ssmvision.engine.benchmark.operators import _inputs, _native, _train
torch.set_num_threads(1)
_train(_native, _inputs(OpShape(1, 1, 96, 16, 256)))()  # libraries allocate for themselves on first use
run = _train(_native, _inputs(OpShape(1, 1, 96, 16, {tokens})))
open("/proc/self/clear_refs", "w").write("5")  # forget earlier peaks
before = resident("VmRSS")
run()
print((resident("VmHWM") - before) / 1024)
"""

_CONVS5 = """
import torch
from ssmvision.engine.benchmark import resident
from ssmvision.ops import linear_scan
torch.set_num_threads(1)
a = (0.9 * torch.exp(1j * torch.rand(64))).requires_grad_()
def run(frames):
    x = torch.randn(1, frames, 16, 16, 64, dtype=torch.complex64, requires_grad=True)
    upstream = torch.ones_like(x)
    open("/proc/self/clear_refs", "w").write("5")  # forget earlier peaks
    before = resident("VmRSS")
    torch.autograd.backward(linear_scan(a, x)[0], upstream)
    return 1024 * (resident("VmHWM") - before) / x.nbytes
run(8)  # libraries allocate for themselves on first use
print(run(96))
"""


def run_alone(code: str, **environment: str) -> float | None:
    """The number that a program prints last, run in a process of its own; None where it fails."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | environment
    )
    return float(result.stdout.split()[-1]) if result.returncode == 0 else None


def instruction_set_ratio(narrow: str, wide: str, shape: str, repeats: int = 200, turns: int = 3) -> float | None:
    """Forward time with kernels for one instruction set over that with another; the best of processes in turn."""
    times: dict[str, list[float]] = {narrow: [], wide: []}
    for _ in range(turns):
        for isa, found in times.items():
            time = run_alone(_SCAN.format(shape=shape, repeats=repeats), SSMVISION_ISA=isa)
            if time is None:
                return None
            found.append(time)
    return min(times[narrow]) / min(times[wide])


def training_memory(tokens: int) -> float | None:
    """MiB beyond its inputs that forward and backward of one scan (d 96, n 16) need; None where that is not measured.

    The output and the gradients are counted. Large blocks are made to return to the system when they are freed.
    """
    return run_alone(_TRAIN.format(tokens=tokens), MALLOC_MMAP_THRESHOLD_="65536")


def convs5_memory() -> float | None:
    """What forward and backward of a ConvS5's scan need at their peak beyond inputs and the gradient given, in states.

    Of 96 frames of 16 x 16 with 64 complex states; None where that is not measured.
    """
    return run_alone(_CONVS5, MALLOC_MMAP_THRESHOLD_="65536")
