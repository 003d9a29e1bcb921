"""Position embeddings: absolute ones in space, with a class token anywhere, and in time; rotations by position."""

from typing import List, Optional

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed, is_exporting, register_notrace_function, resample_abs_pos_embed
from torch import Tensor


@register_notrace_function
def resize_pos_embed(
    pos_embed: Tensor, new_size: List[int], old_size: List[int], cls_index: Optional[int], antialias: bool = True
) -> Tensor:
    """Resample a position embedding (1, tokens, c) from one grid to another.

    A class row is taken out first and put back at the same place in the new sequence: the middle stays the middle, the
    front stays the front. (The official Vim code treats row 0 as the class row even when it is in the middle.)

    Args:
        pos_embed: Rows of an old_size grid in row-major order, with the class row, if any, among them.
        new_size: Wanted grid [height, width].
        old_size: Grid of `pos_embed`.
        cls_index: Row of the class token in `pos_embed`; None if there is none.
        antialias: Low-pass where the grid shrinks, by another bicubic kernel; without it, as mmcls resizes.
    """
    # Asking an export whether sizes are equal would bind it to the size it is traced with.
    if not is_exporting() and new_size[0] == old_size[0] and new_size[1] == old_size[1]:
        return pos_embed
    if cls_index is None:
        return resample_abs_pos_embed(pos_embed, new_size, old_size, num_prefix_tokens=0, antialias=antialias)
    grid = torch.cat([pos_embed[:, :cls_index], pos_embed[:, cls_index + 1 :]], dim=1)
    grid = resample_abs_pos_embed(grid, new_size, old_size, num_prefix_tokens=0, antialias=antialias)
    new_index = 0 if cls_index == 0 else new_size[0] * new_size[1] // 2
    row = pos_embed[:, cls_index : cls_index + 1]
    return torch.cat([grid[:, :new_index], row, grid[:, new_index:]], dim=1)


@register_notrace_function
def resize_temporal_embed(embed: Tensor, steps: int) -> Tensor:
    """Resample a position embedding over time (1, t, c) linearly to another number of steps."""
    if not is_exporting() and embed.shape[1] == steps:
        return embed
    resized = F.interpolate(embed.float().transpose(1, 2), size=steps, mode="linear", align_corners=False)
    return resized.transpose(1, 2).to(embed.dtype)


def sinusoid_table(tokens: int, dim: int) -> Tensor:
    """Fixed positions (1, tokens, dim): sines in even channels, cosines in odd ones (arXiv:1706.03762, section 3.5)."""
    channel = torch.arange(dim)
    # In float64, since far positions have large angles.
    angle = torch.arange(tokens, dtype=torch.float64).unsqueeze(1) / 10000 ** (channel // 2 * 2 / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float().unsqueeze(0)


@register_notrace_function
def rotary_table(x: Tensor, span: Optional[int] = None) -> Tensor:
    """Sines and cosines of the rotation of every pair of channels of x (b, h, w, c): (2, h, w, 1, c).

    The first half of the pairs turns with the row, the second with the column, at 10000^(-i / (c / 4)) per pixel
    (RoFormer, arXiv:2104.09864, on two axes). The table is made for any grid, in float32 also where x is not.

    Args:
        x: Map to rotate.
        span: Every grid counts as this many pixels high and wide (EVA-02, arXiv:2303.11331); None counts pixels.
    """
    H, W, bands = x.shape[1], x.shape[2], x.shape[3] // 4
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    theta = 1 / torch.pow(10000.0, torch.arange(bands, device=x.device, dtype=dtype) / bands)
    rows = torch.arange(H, device=x.device, dtype=dtype)
    columns = torch.arange(W, device=x.device, dtype=dtype)
    if span is not None:
        rows, columns = rows * (span / H), columns * (span / W)
    angles = torch.cat(
        [
            (rows.view(H, 1, 1) * theta).expand(H, W, bands),
            (columns.view(1, W, 1) * theta).expand(H, W, bands),
        ],
        dim=2,
    )
    return torch.stack([angles.sin(), angles.cos()]).repeat_interleave(2, dim=3).unsqueeze(3)


@register_notrace_function
def rotate_tokens(x: Tensor, grid: List[int], span: int) -> Tensor:
    """Tokens (b, h * w, c) of a grid [h, w], rotated by their positions; see `rotary_table`."""
    maps = x.unflatten(1, (grid[0], grid[1]))
    sin, cos = rotary_table(maps, span).squeeze(3).unbind(0)
    return apply_rot_embed(maps, sin, cos).flatten(1, 2).to(x.dtype)
