"""How calls are timed, and how a figure is held against the bar it should meet."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ssmvision.ops import backend_info


class Bar(NamedTuple):
    """What a figure should be: at least, or at most, a limit."""

    limit: float
    at_least: bool = True

    def judge(self, value: float) -> str:
        """The bar, and "met" or "NOT met"."""
        sign, met = (">=", value >= self.limit) if self.at_least else ("<=", value <= self.limit)
        return f"bar {sign} {self.limit:g}: {'met' if met else 'NOT met'}"


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


def interleaved(calls: dict[str, Callable[[], object]], repeats: int, warm_up: bool = True) -> dict[str, float]:
    """Lower quartile of each call's milliseconds; the calls take turns.

    Other work on the machine only ever adds time, so the faster quarter tells more than the median, and unlike the
    minimum it does not hang on one lucky run. Taking turns keeps ratios right where the machine's speed drifts.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values() if warm_up else ():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * _lower_quartile(values) for name, values in times.items()}


def _lower_quartile(values: list[float]) -> float:
    return statistics.quantiles(values, n=4, method="inclusive")[0] if len(values) > 1 else values[0]
