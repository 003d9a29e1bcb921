"""A loop over a dynamic number of steps, as torch.export and ONNX know it.

The one place that uses torch's prototype of such a loop, a private interface: it is one node of an exported program,
and one `Scan` node in ONNX. Unrolled or parallel forms of a scan need the number of steps when they are traced.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan


def loop(step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Runs `state, y_t = step(state, *inputs_t)` over the first dimension of the inputs.

    Returns:
        The y_t, stacked along the first dimension, and the last state.
    """

    def body(state: Tensor, inputs_t: list[Tensor]) -> Any:
        state, y_t = step(state, *inputs_t)
        return _own(state), y_t

    last, y = scan(body, _own(state), inputs)
    return y, last


def _own(state: Tensor) -> Tensor:
    """The state in memory of its own and always in the same order, which the loop insists on."""
    return state.clone(memory_format=torch.contiguous_format)
