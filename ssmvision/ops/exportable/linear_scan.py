"""`linear_scan` as a loop of standard operators. Letters: b batch, l step, p and q state."""

from torch import Tensor

from ._loop import loop


def forward(
    a: Tensor, x: Tensor, initial_state: Tensor | None, reset: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What `reference.linear_scan.definition` computes for finite decays."""
    b, length, p, q = x.shape
    x = x.to(a.dtype)
    a = a.expand(b, length, *a.shape[2:])
    if reset is not None:
        a = a.masked_fill(reset[..., None, None], 0)
    inputs = [m.flip(1) if reverse else m for m in (a, x)]

    def advance(h: Tensor, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = a * h + x
        return h, h

    start = x.new_zeros(b, p, q) if initial_state is None else initial_state
    h, last = loop(advance, start, [m.transpose(0, 1) for m in inputs])
    h = h.transpose(0, 1)
    return h.flip(1) if reverse else h, last
