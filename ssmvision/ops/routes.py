"""Scan orders over the tokens of an image or volume: the one place that names them.

A route is an int64 vector: entry t is the token (row-major position) that a scan visits at step t. `selective_scan`
takes a stack of routes (k, t) and follows them by index, so that an order costs no permuted copy. `docs/routes.svg`
draws each of them.

All functions are plain tensor arithmetic with typed signatures: they script, export with dynamic sizes, and run on any
device.
"""

from typing import List, Optional

import torch
from torch import Tensor


def raster(shape: List[int], axes: List[int], device: Optional[torch.device] = None) -> Tensor:
    """Visit a grid of any rank axis by axis; the last axis named runs fastest.

    Args:
        shape: Grid size, for example [height, width] or [depth, height, width].
        axes: A permutation of the axes, for example [1, 0] for column-major.
        device: Where the route is made.

    Returns:
        (t,) with t = product of shape.
    """
    tokens = 1
    for size in shape:
        tokens *= size
    return torch.arange(tokens, device=device).view(shape).permute(axes).flatten()


def row(height: int, width: int, device: Optional[torch.device] = None) -> Tensor:
    """Row by row, left to right."""
    return raster([height, width], [0, 1], device)


def column(height: int, width: int, device: Optional[torch.device] = None) -> Tensor:
    """Column by column, top to bottom."""
    return raster([height, width], [1, 0], device)


def serpentine(height: int, width: int, device: Optional[torch.device] = None) -> Tensor:
    """Row by row, every second row from right to left, so that consecutive tokens are neighbours (PlainMamba)."""
    r, c = _grid(height, width, device)
    return _order(r * width + torch.where(r % 2 == 0, c, width - 1 - c))


def window(height: int, width: int, size: int, device: Optional[torch.device] = None) -> Tensor:
    """Window by window of size x size, row by row inside each (LocalMamba); border windows may be smaller."""
    r, c = _grid(height, width, device)
    per_row = (width + size - 1) // size
    block = (r // size) * per_row + c // size
    return _order((block * size + r % size) * size + c % size)


def atrous(height: int, width: int, step: int, device: Optional[torch.device] = None) -> Tensor:
    """Sub-grid by sub-grid: first every step-th row and column from (0, 0), then from (0, 1), … (EfficientVMamba)."""
    r, c = _grid(height, width, device)
    subgrid = (r % step) * step + c % step
    return _order((subgrid * height + r // step) * width + c // step)


def reverse(route: Tensor) -> Tensor:
    """The same way back; also for stacks (k, t)."""
    return route.flip(-1)


def inverse(route: Tensor) -> Tensor:
    """The step at which each token is visited: `route[inverse(route)]` counts 0, 1, 2, …"""
    return torch.argsort(route, dim=-1)


def bidirectional(tokens: int, device: Optional[torch.device] = None) -> Tensor:
    """Forward and backward over a sequence (Vim): (2, tokens)."""
    forward = torch.arange(tokens, device=device)
    return torch.stack([forward, forward.flip(0)])


def cross(height: int, width: int, device: Optional[torch.device] = None) -> Tensor:
    """VMamba's cross-scan: rows, columns, and both reversed, (4, height * width)."""
    forward = torch.stack([row(height, width, device), column(height, width, device)])
    return torch.cat([forward, forward.flip(-1)])


def continuous(height: int, width: int, device: Optional[torch.device] = None) -> Tensor:
    """PlainMamba's scan: serpentines over rows and columns, each there and back, (4, height * width)."""
    rows = serpentine(height, width, device)
    columns = column(height, width, device)[serpentine(width, height, device)]
    return torch.stack([rows, rows.flip(0), columns, columns.flip(0)])


def atrous_cross(height: int, width: int, device: Optional[torch.device] = None) -> Tensor:
    """EfficientVMamba's scan: every second row and column, from each of the four places to start a route of its own.

    The routes that start in an odd row go by columns, the others by rows. Odd sides are padded: numbers from
    `height * width` on are the padding.

    Returns:
        (4, t), the starts being (0, 0), (1, 0), (0, 1) and (1, 1).
    """
    grid = _padded_grid(height, width, 2, device)
    return torch.stack([grid[i % 2 :: 2, i // 2 :: 2].permute([i % 2, 1 - i % 2]).flatten() for i in range(4)])


def local(height: int, width: int, directions: List[str], device: Optional[torch.device] = None) -> Tensor:
    """LocalMamba's routes: rows "h", columns "v" or windows "w2", "w7", …, and with "_flip" the same way back.

    Windows that the grid does not fill are padded: numbers from `height * width` on are the padding. So that all routes
    are equally long, each ends with the tokens of padding that are not its own. There they change nothing.

    Returns:
        (k, t) with t = height * width + the padding of every size of windows.
    """
    orders: List[Tensor] = []
    sizes: List[int] = []
    steps = height * width
    for direction in directions:
        kind = direction.split("_")[0]
        if kind == "h":
            order = row(height, width, device)
        elif kind == "v":
            order = column(height, width, device)
        else:
            size = int(kind[1:])
            order = _padded_window(height, width, size, device)
            if size not in sizes:
                sizes.append(size)
                steps += order.shape[0] - height * width
        orders.append(order.flip(0) if direction.endswith("_flip") else order)
    tokens = torch.arange(steps, device=device)
    return torch.stack([torch.slice_scatter(tokens, order, 0, 0, order.shape[0]) for order in orders])


def insert(stack: Tensor, at: int) -> Tensor:
    """Routes (k, t) over one token more: it has number `at`, and every route visits it at step `at`."""
    shifted = stack + (stack >= at).to(stack.dtype)
    token = torch.full_like(stack[:, :1], at)
    return torch.cat([shifted[:, :at], token, shifted[:, at:]], dim=1)


def _padded_window(height: int, width: int, size: int, device: Optional[torch.device] = None) -> Tensor:
    """As `window`, but all windows are whole: what the last ones lack is padding."""
    grid = _padded_grid(height, width, size, device)
    rows, columns = (height + size - 1) // size, (width + size - 1) // size
    return grid.view(rows, size, columns, size).permute(0, 2, 1, 3).flatten()


def _padded_grid(height: int, width: int, size: int, device: Optional[torch.device]) -> Tensor:
    """Numbers of the tokens on a grid whose sides are multiples of size."""
    r, c = _grid((height + size - 1) // size * size, (width + size - 1) // size * size, device)
    padding = (r >= height) | (c >= width)
    later = height * width - 1 + padding.flatten().cumsum(0).view(padding.shape)
    return torch.where(padding, later, r * width + c)


def _grid(height: int, width: int, device: Optional[torch.device]) -> List[Tensor]:
    rows = torch.arange(height, device=device).view(-1, 1).expand(height, width)
    columns = torch.arange(width, device=device).view(1, -1).expand(height, width)
    return [rows, columns]


def _order(keys: Tensor) -> Tensor:
    return torch.argsort(keys.flatten())
