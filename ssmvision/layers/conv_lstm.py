"""ConvLSTM (arXiv:1506.04214): what ConvS5 is measured against, an LSTM whose matrices are convolutions.

Letters: b batch, t frame, c channels, h height, w width.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor, nn

__all__ = ["ConvLSTM"]

State = tuple[Tensor, Tensor]
Step = Callable[[Tensor, State], tuple[Tensor, State]]


class ConvLSTM(nn.Module):
    """One convolution of input and output gives all gates; no biases, no peepholes, as in ConvS5's comparison.

    Each frame waits for the one before it.

    Args:
        dim: Channels of input and output.
        kernel_size: Side of the convolution.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(self, dim: int, kernel_size: int = 3, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.dim = dim
        dd = {"device": device, "dtype": dtype}
        self.gates = nn.Conv2d(2 * dim, 4 * dim, kernel_size, padding="same", bias=False, **dd)

    def forward(self, u: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """Frames (b, t, c, h, w), one after the other → the same; `reset` (b, t) is True where a packed clip starts."""
        return self.run(u, None, reset)[0]

    def run(self, u: Tensor, state: Optional[State] = None, reset: Optional[Tensor] = None) -> tuple[Tensor, State]:
        """As `forward`, after a state: outputs, and the state after the last frame.

        Args:
            u: (b, t, c, h, w).
            state: What precedes the first frame; zero if None.
            reset: (b, t), True where a packed clip starts.
        """
        b, _, _, *size = u.shape
        state = self.initial_state(b, *size) if state is None else state
        outputs = []
        for t, frame in enumerate(u.unbind(1)):
            if reset is not None:
                start = reset[:, t, None, None, None]
                state = state[0].masked_fill(start, 0), state[1].masked_fill(start, 0)
            y, state = self.step(frame, state)
            outputs.append(y)
        return torch.stack(outputs, dim=1) if outputs else u, state

    def step(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """One frame (b, c, h, w) after `state`: its output and the next state."""
        c, h = state
        i, f, o, g = self.gates(torch.cat([u, h], dim=1)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h, (c, h)

    def stepper(self) -> Step:
        """`step`: there is nothing to prepare."""
        return self.step

    def initial_state(self, batch: int, height: int, width: int) -> State:
        """The zeros that precede a sequence: cell and output, (b, c, h, w) each."""
        zeros = self.gates.weight.new_zeros(batch, self.dim, height, width)
        return zeros, zeros
