"""Side-by-side timings: everything that is compared runs in turn, in one process, on the same inputs.

A ratio of medians of interleaved runs survives a machine whose speed drifts; a single absolute time does not.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.ops import backend_info, routes, selective_scan
from ssmvision.registry import create_model

__all__ = ["OPS", "OpShape", "hardware", "interleaved", "measure_op", "peak_memory", "published_scan", "scan_share"]


@dataclass(frozen=True)
class OpShape:
    """One selective scan: batch, routes, channels, states and tokens; a square image where there are routes."""

    batch: int
    routes: int
    channels: int
    states: int
    tokens: int
    train: bool = True  # whether the sequential reference can be asked for gradients in reasonable time

    @property
    def elements(self) -> int:
        """State updates of one forward pass."""
        return self.batch * self.routes * self.channels * self.states * self.tokens


OPS = {
    "Vim-T": OpShape(1, 1, 384, 16, 197),
    "Vim-S": OpShape(1, 1, 768, 16, 197),
    "VMamba stage 1": OpShape(1, 4, 192, 1, 3136, train=False),
    "VMamba stage 3": OpShape(1, 4, 768, 1, 196),
    "volume": OpShape(1, 1, 96, 16, 32768, train=False),
}


def hardware() -> str:
    """One line about the machine: processor, instruction set of the kernels, threads, versions."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    info = backend_info()["cpu"]
    return (
        f"{name}, {os.cpu_count()} CPUs, {torch.get_num_threads()} thread(s), "
        f"scan backend {info['backend']} ({info['detail']}), torch {torch.__version__}"
    )


def interleaved(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call; the calls take turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def published_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """The sequential scan in the form in which reference implementations publish it: one time step after the other.

    Shapes as in `selective_scan` with one route; grouped B and C.
    """
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    if B.shape[1] == 1:  # shared by all channels: never repeated
        drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B[:, 0], u)
    else:
        drive = torch.einsum("bdl,bdnl,bdl->bdln", delta, B.repeat_interleave(u.shape[1] // B.shape[1], dim=1), u)
    C = C.repeat_interleave(u.shape[1] // C.shape[1], dim=1) if C.shape[1] > 1 else C.expand(-1, u.shape[1], -1, -1)
    state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.einsum("bdn,bdn->bd", state, C[:, :, :, t]))
    return torch.stack(outputs, dim=2) + u * D[:, None]


def _inputs(shape: OpShape) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias in the layouts of our layers, routes folded into channels as in the papers."""
    b, k, d, n, length = shape.batch, shape.routes, shape.channels, shape.states, shape.tokens
    generator = torch.Generator().manual_seed(0)

    def tokens(*sizes: int) -> Tensor:
        return torch.randn(b, length, *sizes, generator=generator).movedim(1, -1)

    A = -torch.arange(1.0, n + 1).repeat(k * d, 1)
    delta_bias = torch.randn(k * d, generator=generator) - 4
    return [tokens(k * d), 0.1 * tokens(k * d), A, tokens(k, n), tokens(k, n), torch.ones(k * d), delta_bias]


def measure_op(shape: OpShape, repeats: int, slow_repeats: int = 3) -> dict[str, float]:
    """Milliseconds of native and sequential scans, checked against each other first.

    Returns:
        "forward", "forward, published form", "forward, our reference", the same three for "train" (forward and
        backward) where the shape allows it, "routes" and "no routes" for image shapes, and "error", the largest
        difference of the native output from the published form relative to its largest value.
    """
    inputs = _inputs(shape)
    results: dict[str, float] = {}

    def native(*args: Tensor, backend: str = "cpu") -> Tensor:
        u, delta, A, B, C, D, bias = args
        return selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, backend=backend)[0]

    # Each side gets the memory layout that suits it: channels-last the native scan, channels-first the sequential ones.
    def own_layout(call: Callable[..., Tensor]) -> list[Tensor]:
        return inputs if call is native else [x.contiguous() for x in inputs]

    def forward(call: Callable[..., Tensor]) -> Callable[[], object]:
        tensors = own_layout(call)

        def run() -> object:
            with torch.no_grad():
                return call(*tensors)

        return run

    def train(call: Callable[..., Tensor]) -> Callable[[], object]:
        leaves = [x.detach().requires_grad_() for x in own_layout(call)]

        def run() -> object:
            y = call(*leaves)
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

        return run

    with torch.no_grad():
        expected, found = published_scan(*inputs), native(*inputs)
    results["error"] = ((expected - found).abs().max() / expected.abs().max()).item()
    slow = {"published form": published_scan, "our reference": lambda *args: native(*args, backend="reference")}
    for kind, wrap in (("forward", forward), ("train", train)):
        results[kind] = interleaved({kind: wrap(native)}, repeats)[kind]
        if kind == "train" and not shape.train:
            continue
        for name, call in slow.items():
            # In turn with the native scan, so that a change of the machine's speed touches both.
            pair = interleaved({kind: wrap(native), name: wrap(call)}, slow_repeats)
            results[f"{kind}, {name}"] = pair[name] * results[kind] / pair[kind]
    if shape.routes == 4:
        results |= _measure_routes(shape, repeats)
    return results


def _measure_routes(shape: OpShape, repeats: int) -> dict[str, float]:
    """A scan along the four routes of an image, and the same four scans all in raster order."""
    u, delta, A, B, C, D, bias = _inputs(shape)
    k, side = shape.routes, int(shape.tokens**0.5)
    u = u[:, : shape.channels].transpose(1, 2).contiguous().transpose(1, 2)
    delta, A, D, bias = delta.unflatten(1, (k, -1)), A.unflatten(0, (k, -1)), D.view(k, -1), bias.view(k, -1)

    def scan(order: Tensor | None) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, routes=order)

        return run

    return interleaved({"routes": scan(routes.cross(side, side)), "no routes": scan(None)}, repeats)


def exp_limit(elements: int = 1 << 14, repeats: int = 200) -> float:
    """Exponentials per second that torch's own vectorised exp reaches on this machine, one thread, in cache."""
    x = -torch.rand(elements)
    out = torch.empty_like(x)
    return elements / (1e-3 * interleaved({"exp": lambda: torch.exp(x, out=out)}, repeats)["exp"])


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
