"""The matrices M(x) by which layers mix tokens, y = M(x) v, read off real layers; see docs/one_framework.md."""

from __future__ import annotations

import torch
from torch import Tensor

from .scans import ScanCall

__all__ = ["mixing_matrix", "toeplitz"]


def mixing_matrix(scan: ScanCall, sample: int = 0) -> Tensor:
    """What token i reads of token j if the coefficients stay and only the values change: answers to impulses.

    Args:
        scan: Of `watch_scans`. Routes that it merges are summed; skip connection and gate are left out.
        sample: Entry of the batch.

    Returns:
        (d, l, l) for `selective_scan`, a matrix per channel; (h, l, l) for `ssd_scan`, one per head.
    """
    selective = scan.operator == "selective_scan"
    tokens: Tensor = scan.arguments["u" if selective else "x"]
    columns = []
    for j in range(tokens.shape[-1 if selective else 1]):
        impulse = torch.zeros_like(tokens)
        (impulse[..., j] if selective else impulse[:, j]).fill_(1)
        if selective:
            columns.append(scan.again(u=impulse, D=None)[sample].squeeze(0))
        else:
            columns.append(scan.again(x=impulse)[sample, ..., 0].T)
    return torch.stack(columns, -1)


def toeplitz(kernel: Tensor) -> Tensor:
    """The lower triangular matrices (..., l, l) of causal convolutions with kernels (..., l)."""
    step = torch.arange(kernel.shape[-1], device=kernel.device)
    return kernel[..., (step[:, None] - step).clamp(min=0)].tril()
