"""Whole models beside timm's: time, the scan's share, memory."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmvision.registry import create_model


def build(name: str, image_size: int, train: bool) -> tuple[nn.Module, Tensor]:
    """A model with random weights and one image."""
    kwargs: Any = {"img_size": image_size} if name.startswith(("vit_", "deit_", "vim_")) and image_size != 224 else {}
    model = create_model(name, **kwargs).train(train)
    return model, torch.randn(1, 3, image_size, image_size)


def model_call(model: nn.Module, image: Tensor, train: bool) -> Callable[[], object]:
    """One forward pass, or one forward and backward pass."""

    def run() -> object:
        if not train:
            with torch.inference_mode():
                return model(image)
        model.zero_grad(set_to_none=True)
        return model(image).sum().backward()

    return run


def scan_share(model: nn.Module, image: Tensor) -> float:
    """The scan operator's fraction of a forward pass, from torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model_call(model, image, train=False)()
    events = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return sum(e.self_cpu_time_total for e in events if "selective_scan" in e.key) / total


_PEAK = """
import torch
from ssmvision.engine.benchmark import build, model_call, resident
torch.set_num_threads(1)
model_call(*build({name!r}, 224, False), False)()  # libraries allocate for themselves on first use
model, image = build({name!r}, {size}, False)
open("/proc/self/clear_refs", "w").write("5")  # forget earlier peaks
before = resident("VmRSS")
model_call(model, image, False)()
print(resident("VmHWM") - before)
"""


def resident(field: str) -> int:
    """A memory figure of this process from the kernel, in KiB (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def peak_memory(name: str, image_size: int) -> float | None:
    """MiB that one forward pass at batch 1 needs at its peak, in a fresh process; None where that is not measured.

    Weights and the image are not counted. Large blocks are made to return to the system when they are freed, so that
    the resident set follows what is alive.
    """
    code = _PEAK.format(name=name, size=image_size)
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    return int(result.stdout.split()[-1]) / 1024 if result.returncode == 0 else None
