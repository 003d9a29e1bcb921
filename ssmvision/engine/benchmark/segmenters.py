"""Segmenters of volumes beside their twins: time of a forward pass, memory of a training step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssmvision.registry import create_model

from .models import model_call
from .processes import run_alone
from .timing import interleaved

VOLUME = (64, 128, 128)
# At VOLUME a training step of U-Mamba needs more than 8 GiB.
TRAINING_VOLUME = (32, 128, 128)

_TRAIN = """
import torch
from ssmvision.engine.benchmark import model_call, resident, segmenters
torch.set_num_threads(1)
model_call(*segmenters.build({name!r}, (16, 32, 64)), train=True)()  # libraries allocate for themselves on first use
model, volume = segmenters.build({name!r}, {size})
open("/proc/self/clear_refs", "w").write("5")  # forget earlier peaks
before = resident("VmRSS")
model_call(model.train(), volume, train=True)()
print((resident("VmHWM") - before) / 1024)
"""


def build(name: str, size: Sequence[int]) -> tuple[nn.Module, Tensor]:
    """A U-Mamba planned for volumes of one size, with random weights, and one volume (1, 1, *size)."""
    return create_model(name, patch_size=tuple(size)).eval(), torch.randn(1, 1, *size)


def forward_times(names: Sequence[str], size: Sequence[int], repeats: int) -> dict[str, float]:
    """Milliseconds of one forward pass of each network at batch 1; they take turns."""
    calls = {name: model_call(*build(name, size), train=False) for name in names}
    return interleaved(calls, repeats)


def training_memory(name: str, size: Sequence[int]) -> float | None:
    """MiB beyond weights and volume that forward and backward need at their peak, in a fresh process.

    The gradients are counted. Large blocks are made to return to the system when they are freed, so that the resident
    set follows what is alive. None where that is not measured.
    """
    return run_alone(_TRAIN.format(name=name, size=tuple(size)), MALLOC_MMAP_THRESHOLD_="65536")
