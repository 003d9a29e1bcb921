"""What a model sees: effective receptive field, contribution of every scan route, feature maps in colour."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from ssmvision.data import UserError
from ssmvision.ops import routes as scan_routes

from ..pictures import save_png
from .inputs import load_with_inputs
from .scans import watch_scans

PICTURES = ("receptive-field", "routes", "features")
_INK = "#24292f"


def visualize(args: Namespace) -> list[Path]:
    """Draws as `tools/visualize.py --help` describes and returns the files written.

    Raises:
        UserError: A model that cannot be made, or images that cannot be read.
    """
    model, images, config = load_with_inputs(args)
    shown = _shown(images, config)
    name = Path(args.model or args.checkpoint).stem
    seen = f"{name}, {len(images)} input{'s' * (len(images) > 1)}" + ", middle slice" * (images.ndim > 4)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    drawn = {
        "receptive-field": lambda: draw_receptive_field(_central(receptive_field(model, images)), seen),
        "routes": lambda: draw_routes(route_contributions(model, images[:1]), shown, name),
        "features": lambda: draw_features(feature_maps(model, images[:1]), shown, name),
    }
    written = []
    for picture in args.picture or PICTURES:
        try:
            figure = drawn[picture]()
        except NothingToDraw as error:
            if args.picture:
                raise
            print(f"no {picture}: {error}")
            continue
        written.append(output / f"{name}_{picture}.png")
        save_png(figure, written[-1])
        print(written[-1])
    return written


class NothingToDraw(UserError):
    """The model does not have what was to be drawn."""


def receptive_field(model: Any, images: Tensor) -> Tensor:
    """Effective receptive field (VMamba, arXiv:2401.10166, figure 5; Luo et al., arXiv:1701.04128).

    Args:
        model: With timm's `forward_intermediates`, or one that answers with a map.
        images: (b, c, h, w); clips and volumes have an axis more.

    Returns:
        (h, w): absolute gradient of the centre of the last map's positive part, or of the absolute output, by the
        pixels, averaged over images, and scaled to a maximum of 1.

    Raises:
        NothingToDraw: For a model without maps.
    """
    total = torch.zeros(images.shape[2:])
    for image in images.split(1):
        image = image.clone().requires_grad_()
        centre = _last_map(model, image)[0]
        while centre.ndim > 1:
            centre = centre.select(1, centre.shape[1] // 2)
        (gradient,) = torch.autograd.grad(centre.sum(), image)
        total += gradient[0].abs().sum(0)
    return total / total.max().clamp(min=1e-30)


def _last_map(model: Any, image: Tensor) -> Tensor:
    if hasattr(model, "forward_intermediates"):
        return F.relu(model.forward_intermediates(image, 1, intermediates_only=True)[0])
    output: Tensor = model(image)
    if output.ndim != image.ndim:
        raise NothingToDraw(f"{type(model).__name__} answers with no map.")
    return output.abs()


@torch.no_grad()
def route_contributions(model: Any, image: Tensor) -> list[tuple[Tensor, list[str]]]:
    """How much each route adds to a layer's output: for every layer of scans norms over channels (k, h, w), and names.

    Args:
        model: One of ours.
        image: (1, c, h, w).

    Raises:
        NothingToDraw: For a model without scans over whole maps.
    """
    if image.ndim > 4:
        raise NothingToDraw("routes are drawn over images, not over clips or volumes.")
    found = []
    for call in watch_scans(model, image):
        if call.operator != "selective_scan":
            continue
        y = call.again(D=None, merge=False)  # the skip connection adds the same to every route
        tokens = y.transpose(2, 3).flatten(0, 1)  # (k, l, d)
        if getattr(model, "num_prefix_tokens", 0):
            tokens = model._split(tokens)[1]
        norms = tokens.norm(dim=-1)
        grid = _grid(norms.shape[1], image.shape[2:])
        if y.shape[0] == 1 and grid:
            found.append((norms.unflatten(1, grid), _names_of(call.arguments["routes"], y.shape[1], grid)))
    if not found:
        raise NothingToDraw(f"{type(model).__name__} has no scan over a whole map.")
    return found


def _grid(tokens: int, size: torch.Size) -> tuple[int, int] | None:
    """The map that an image was cut into, if these are all of its tokens."""
    for stride in (1, 2, 4, 8, 16, 32):
        height, width = (-(-side // stride) for side in size)
        if height * width == tokens:
            return height, width
    return None


def _names_of(routes: Tensor | None, k: int, grid: tuple[int, int]) -> list[str]:
    if k == 4 and routes is not None and torch.equal(routes, scan_routes.cross(*grid)):
        return ["rows", "columns", "rows, reversed", "columns, reversed"]
    if k == 2 and routes is not None and torch.equal(routes, scan_routes.bidirectional(routes.shape[1])):
        return ["forward", "backward"]
    return ["raster"] if routes is None else [f"route {i + 1}" for i in range(k)]


@torch.no_grad()
def feature_maps(model: Any, image: Tensor) -> list[tuple[Tensor, str]]:
    """Four feature maps (c, h, w) of a model, from early to late, and the names of their modules; of a clip the middle.

    Raises:
        NothingToDraw: For a model that does not hand out its maps.
    """
    if not hasattr(model, "forward_intermediates"):
        raise NothingToDraw(f"{type(model).__name__} does not hand out its feature maps.")
    last = len(model.feature_info) - 1
    indices = sorted({round(last * part / 3) for part in range(4)})
    maps = model.forward_intermediates(image, indices, intermediates_only=True)
    return [(_central(m[0], 4), model.feature_info[i]["module"]) for m, i in zip(maps, indices, strict=True)]


def principal_colours(features: Tensor) -> Tensor:
    """The three first principal components of a map (c, h, w) as red, green and blue in [0, 1]: (h, w, 3)."""
    pixels = features.flatten(1).T
    pixels = pixels - pixels.mean(0)
    _, _, directions = torch.linalg.svd(pixels, full_matrices=False)
    colours = pixels @ directions[:3].T
    colours = colours * colours.pow(3).sum(0).sign()  # a component's sign is arbitrary: skewed to the bright side
    colours = F.pad(colours, (0, 3 - colours.shape[1]))
    low, high = colours.quantile(0.02, 0), colours.quantile(0.98, 0)
    return ((colours - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).unflatten(0, features.shape[1:])


def draw_receptive_field(field: Tensor, title: str) -> Figure:
    """The field on a logarithmic scale, and how much of its sum lies within a square around the centre."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    figure.suptitle(f"Effective receptive field: {title}", fontsize=12, color=_INK)
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    picture = left.imshow(torch.log10(field.clamp(min=1e-4)), cmap="magma", vmin=-4, vmax=0)
    left.set(xticks=[], yticks=[])
    left.set_title("gradient of the centre by the pixels", fontsize=9, color=_INK)
    bar = figure.colorbar(picture, ax=left, fraction=0.046, ticks=[-4, -3, -2, -1, 0])
    bar.ax.set_yticklabels(["≤ 0.0001", "0.001", "0.01", "0.1", "1"], fontsize=8)
    height, width = field.shape
    sides = torch.linspace(0, 1, 57)[1:]
    shares = [_central_share(field, float(side)) for side in sides]
    right.plot(100 * sides, [100 * share for share in shares], color="#8a2981", linewidth=2)
    even = {"color": "#8c959f", "linewidth": 1, "linestyle": (0, (3, 3)), "label": "spread evenly"}
    right.plot(100 * sides, 100 * sides.square(), **even)
    right.set(xlabel=f"side of a central window (% of {width} × {height} px)", ylabel="gradient inside (%)")
    right.set(xlim=(0, 100), ylim=(0, 100))
    right.set_title("concentration", fontsize=9, color=_INK)
    right.grid(alpha=0.25)
    right.legend(frameon=False)
    return figure


def _central_share(field: Tensor, side: float) -> float:
    height, width = field.shape
    rows, columns = max(1, round(height * side)), max(1, round(width * side))
    top, left = (height - rows) // 2, (width - columns) // 2
    return (field[top : top + rows, left : left + columns].sum() / field.sum()).item()


def draw_routes(layers: list[tuple[Tensor, list[str]]], image: Tensor, title: str, rows: int = 4) -> Figure:
    """Up to `rows` layers from first to last, one column for the image and one for each route."""
    chosen = sorted({round((len(layers) - 1) * i / max(1, rows - 1)) for i in range(rows)})
    columns = 1 + max(len(names) for _, names in layers)
    figure = Figure(figsize=(2.1 * columns + 0.8, 2.3 * len(chosen) + 0.5), layout="constrained")
    figure.suptitle(f"What each scan route adds: {title}", fontsize=12, color=_INK)
    grid = figure.subplots(len(chosen), columns, squeeze=False)
    for axes_of_row, index in zip(grid, chosen, strict=True):
        norms, names = layers[index]
        for axes in axes_of_row:
            axes.axis("off")
        axes_of_row[0].imshow(image)
        axes_of_row[0].set_title(f"scan {index + 1} of {len(layers)}, {norms.shape[1]} × {norms.shape[2]}", fontsize=8)
        # One scale for the routes of a layer, so that they compare.
        low, high = norms.flatten().quantile(torch.tensor([0.01, 0.99])).tolist()
        for axes, norm, name in zip(axes_of_row[1:], norms, names, strict=False):
            shown = axes.imshow(norm, cmap="viridis", vmin=low, vmax=max(high, low + 1e-12))
            axes.set_title(f"{name} ({100 * norm.sum() / norms.sum():.0f} %)", fontsize=8)
        figure.colorbar(shown, ax=list(axes_of_row), fraction=0.02, pad=0.01).ax.tick_params(labelsize=7)
    return figure


def draw_features(maps: list[tuple[Tensor, str]], image: Tensor, title: str) -> Figure:
    """The image, and each map in the colours of its three principal components."""
    figure = Figure(figsize=(2.4 * (len(maps) + 1), 3.1), layout="constrained")
    figure.suptitle(f"Principal components of feature maps: {title}", fontsize=12, color=_INK)
    axes, *others = figure.subplots(1, len(maps) + 1)
    axes.imshow(image)
    axes.set_title("input", fontsize=9)
    for other, (features, name) in zip(others, maps, strict=True):
        other.imshow(principal_colours(features))
        other.set_title(f"{name}: {' × '.join(map(str, features.shape))}", fontsize=9)
    for each in (axes, *others):
        each.axis("off")
    return figure


def _shown(images: Tensor, config: dict[str, Any]) -> Tensor:
    """The first of normalised images (b, c, h, w) as it is looked at: (h, w, 3)."""
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    rgb = (_central(images[0], 4) * std + mean).clamp(0, 1)
    return (rgb if len(rgb) == 3 else rgb[:1].expand(3, -1, -1)).permute(1, 2, 0)


def _central(x: Tensor, ndim: int = 3) -> Tensor:
    """Of (..., d, h, w) with `ndim` axes the middle of d; of what has fewer all."""
    return x.select(-3, x.shape[-3] // 2) if x.ndim == ndim else x
