"""The matrices M(x) by which layers mix tokens, y = M(x) v, read off real layers; see docs/one_framework.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Scan", "mixing_matrix", "recorded_scans", "toeplitz"]

_SKIP, _GATE = 5, 6  # the places of D and z among the arguments of either operator


class Scan(NamedTuple):
    """One call of an operator.

    Attributes:
        operator: "selective_scan" or "ssd_scan".
        arguments: In the order of the operator.
    """

    operator: str
    arguments: tuple[Any, ...]


def recorded_scans(layer: nn.Module, *inputs: Tensor) -> list[Scan]:
    """The calls of `selective_scan` and `ssd_scan` by which a layer answers an input, in order."""
    with _Recorder() as recorder, torch.no_grad():
        layer(*inputs)
    return recorder.scans


def mixing_matrix(scan: Scan, sample: int = 0) -> Tensor:
    """What token i reads of token j if the coefficients stay and only the values change: answers to impulses.

    Args:
        scan: Of `recorded_scans`. Routes that it merges are summed; skip connection and gate are left out.
        sample: Entry of the batch.

    Returns:
        (d, l, l) for `selective_scan`, a matrix per channel; (h, l, l) for `ssd_scan`, one per head.
    """
    tokens: Tensor = scan.arguments[0]
    coefficients = [None if i in (_SKIP, _GATE) else x for i, x in enumerate(scan.arguments)][1:]
    operator = getattr(torch.ops.ssmvision, scan.operator)
    selective = scan.operator == "selective_scan"
    columns = []
    for j in range(tokens.shape[-1 if selective else 1]):
        impulse = torch.zeros_like(tokens)
        (impulse[..., j] if selective else impulse[:, j]).fill_(1)
        y = operator(impulse, *coefficients)[0][sample]
        columns.append(y if selective else y[..., 0].T)
    return torch.stack(columns, -1)


def toeplitz(kernel: Tensor) -> Tensor:
    """The lower triangular matrices (..., l, l) of causal convolutions with kernels (..., l)."""
    step = torch.arange(kernel.shape[-1], device=kernel.device)
    return kernel[..., (step[:, None] - step).clamp(min=0)].tril()


class _Recorder(TorchFunctionMode):
    """Sees every call of an operator that is made from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.scans: list[Scan] = []

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        package, _, name = str(func).partition(".")
        if package == "ssmvision" and name in ("selective_scan", "ssd_scan"):
            self.scans.append(Scan(name, args))
        return func(*args, **(kwargs or {}))
