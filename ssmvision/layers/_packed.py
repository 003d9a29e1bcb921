"""Convolutions of packed sequences: what recurrent layers do with `reset`, by the kernels of convolutional ones.

Letters: b batch, c outputs per channel, d channels, l token, n clips of about the same length, m tokens of the longest.
"""

from typing import Optional

import torch
from torch import Tensor

from ssmvision.ops import fft_conv
from ssmvision.ops._library import expect_reset


def packed_conv(
    u: Tensor, kernel: Tensor, D: Tensor | None, backward_kernel: Tensor | None = None, reset: Optional[Tensor] = None
) -> Tensor:
    """`fft_conv` on each clip of packed sequences alone.

    Clips are padded to the longest among those at most twice as long, so that together they hold no more than twice
    the tokens; how many there are is read on the host.

    Args:
        u: Tokens (b, d, l).
        kernel: As in `fft_conv`.
        D: As in `fft_conv`.
        backward_kernel: As in `fft_conv`.
        reset: Boolean, (b, l): True where a clip starts; None for one clip a row.

    Returns:
        (b, d, l) or (b, c, d, l), in u's dtype.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    expect_reset("fft_conv", reset, (len(u), u.shape[-1]))
    if reset is None or not u.numel():
        return fft_conv(u, kernel, D, backward_kernel)
    tokens, outputs, places = u.transpose(1, 2).flatten(0, 1), [], []
    for place, inside in _clips(reset):
        clips = tokens[place].masked_fill(~inside[..., None], 0)
        y = fft_conv(clips.transpose(1, 2), kernel, D, backward_kernel)
        outputs.append(y.movedim(-1, 1)[inside])
        places.append(place[inside])
    return torch.cat(outputs)[torch.cat(places).argsort()].unflatten(0, reset.shape).movedim(1, -1)


def _clips(reset: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For clips of about the same length: their tokens, (n, m) of the b l, and which of these are not padding."""
    starts = reset.clone()
    starts[:, 0] = True
    first = starts.flatten().nonzero()[:, 0]
    lengths = first.diff(append=first.new_tensor([starts.numel()]))
    size = lengths.log2().ceil()
    found = []
    for same in (size == value for value in size.unique()):
        step = torch.arange(int(lengths[same].max()), device=reset.device)
        inside = step < lengths[same, None]
        found.append(((first[same, None] + step).where(inside, 0), inside))
    return found
