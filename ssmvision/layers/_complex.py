"""Complex numbers of parameters that are stored as pairs of real ones, in at least single precision."""

import torch
from torch import Tensor


def as_complex(x: Tensor) -> Tensor:
    """(..., 2) as complex64 or wider."""
    return torch.view_as_complex(wide(x).contiguous())


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x if x.dtype == torch.float64 else x.float()
