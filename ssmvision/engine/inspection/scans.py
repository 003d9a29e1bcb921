"""The one watcher of scans: which operator ran, in which layer, on what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ScanCall", "watch_scans"]

_SCANS: dict[Callable[..., Any], str] = {
    torch.ops.ssmvision.selective_scan_forward.default: "selective_scan",
    torch.ops.ssmvision.ssd_scan_forward.default: "ssd_scan",
}


@dataclass(frozen=True)
class ScanCall:
    """One call of an operator in its canonical form, `<operator>_forward` of `ssmvision.ops`, which has no gate.

    Attributes:
        operator: "selective_scan" or "ssd_scan".
        layer: Name of the innermost module that made the call; empty for the watched model itself.
        module: That module.
        arguments: By name, in the operator's order; tokens are the first.
    """

    operator: str
    layer: str
    module: nn.Module
    arguments: dict[str, Any]

    @torch.no_grad()
    def again(self, **changes: Any) -> Tensor:
        """The output of the same call with other arguments: (b, 1 or k, d, l); (b, l, h, p) of `ssd_scan`."""
        forward = getattr(torch.ops.ssmvision, f"{self.operator}_forward")
        y: Tensor = forward(**self.arguments | changes)[0]
        return y


@torch.no_grad()
def watch_scans(model: nn.Module, *inputs: Tensor) -> list[ScanCall]:
    """The calls of `selective_scan` and `ssd_scan` by which a model, or a layer, answers inputs, in order."""
    watch = _Watch(model)
    enter, leave = register_module_forward_pre_hook(watch.enter), register_module_forward_hook(watch.leave)
    with enter, leave, watch:
        model(*inputs)
    return watch.calls


class _Watch(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {module: name for name, module in model.named_modules()}
        self.running: list[nn.Module] = []
        self.calls: list[ScanCall] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running.append(module)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator := _SCANS.get(func):
            names = (argument.name for argument in func._schema.arguments)
            module = self.running[-1]
            call = ScanCall(operator, self.names.get(module, ""), module, dict(zip(names, args, strict=True)))
            self.calls.append(call)
        return func(*args, **(kwargs or {}))
