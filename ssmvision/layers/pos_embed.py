"""Absolute position embeddings with a class token anywhere in the sequence."""

from typing import List, Optional

import torch
from timm.layers import register_notrace_function, resample_abs_pos_embed
from torch import Tensor


@register_notrace_function
def resize_pos_embed(pos_embed: Tensor, new_size: List[int], old_size: List[int], cls_index: Optional[int]) -> Tensor:
    """Resample a position embedding (1, tokens, c) from one grid to another.

    A class row is taken out first and put back at the same place in the new sequence: the middle stays the middle, the
    front stays the front. (The official Vim code treats row 0 as the class row even when it is in the middle.)

    Args:
        pos_embed: Rows of an old_size grid in row-major order, with the class row, if any, among them.
        new_size: Wanted grid [height, width].
        old_size: Grid of `pos_embed`.
        cls_index: Row of the class token in `pos_embed`; None if there is none.
    """
    if new_size[0] == old_size[0] and new_size[1] == old_size[1]:
        return pos_embed
    if cls_index is None:
        return resample_abs_pos_embed(pos_embed, new_size, old_size, num_prefix_tokens=0)
    grid = torch.cat([pos_embed[:, :cls_index], pos_embed[:, cls_index + 1 :]], dim=1)
    grid = resample_abs_pos_embed(grid, new_size, old_size, num_prefix_tokens=0)
    new_index = 0 if cls_index == 0 else new_size[0] * new_size[1] // 2
    row = pos_embed[:, cls_index : cls_index + 1]
    return torch.cat([grid[:, :new_index], row, grid[:, new_index:]], dim=1)
