"""Prediction on files and folders: a table of labels and a sheet of the images with them."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor, nn
from tqdm import tqdm

from ssmvision.data import DataError, UserError, find_bad_images, to_mode
from ssmvision.data.check import describe_bad_images
from ssmvision.data.image import image_mode

from .checkpoint import atomic_write
from .distributed import start_ranks
from .models import data_config, load_trained
from .pictures import draw_predictions


def find_images(paths: Iterable[str | Path]) -> list[str]:
    """Returns the files named, and the image files below the folders named, each once and in order."""
    extensions = get_img_extensions(as_set=True)
    found: dict[str, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            below = (Path(root) / name for root, _, names in os.walk(path, followlinks=True) for name in names)
            found.update((str(file), None) for file in sorted(below) if file.suffix.lower() in extensions)
        elif path.exists():
            found[str(path)] = None
        else:
            raise DataError(f"{path} does not exist.")
    if not found:
        raise DataError("There are no images in what was named.")
    return list(found)


def read_images(inputs: Iterable[str | Path], model: nn.Module, args: Namespace) -> tuple[Tensor, dict[str, Any]]:
    """Images (b, c, h, w) of files and folders, as a model is given them, and the preprocessing that made them.

    Raises:
        DataError: Some of them cannot be read.
    """
    paths = find_images(inputs)
    if bad := find_bad_images(paths):
        raise DataError(f"{len(bad)} of {len(paths)} files are no images that can be read:\n{describe_bad_images(bad)}")
    config = data_config(model, args)
    transform, mode = create_transform(**config), image_mode(config["input_size"][0])
    return torch.stack([transform(_read(path, mode)) for path in paths]), config


def predict(args: Namespace) -> list[dict[str, Any]]:
    """Predicts as `tools/predict.py --help` describes and returns one row for each image."""
    device = start_ranks(args.device).device
    output = Path(args.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        atomic_write(output / ".writable", lambda file: None)
        (output / ".writable").unlink()
    except OSError as error:
        raise UserError(f"The output folder {output} cannot be written: {error.strerror or error}.") from error
    model, class_names = load_trained(args)
    paths = find_images(args.inputs)
    bad = find_bad_images(paths)
    if bad and args.on_bad_sample != "skip":
        raise DataError(f"{len(bad)} of {len(paths)} images cannot be read:\n{describe_bad_images(bad)}")
    if len(bad) == len(paths):
        raise DataError(f"None of the {len(paths)} images can be read:\n{describe_bad_images(bad)}")
    broken = {path for path, _ in bad}
    paths = [path for path in paths if path not in broken]
    names = class_names or [str(number) for number in range(model.num_classes)]
    config = data_config(model, args)
    rows = _predict(model.to(device).eval(), paths, config, names, args.topk, args.batch_size, device)
    _write(rows, output, image_mode(config["input_size"][0]))
    if bad:
        print(f"{len(bad)} unreadable images were skipped:\n{describe_bad_images(bad)}")
    print(f"{len(rows)} images: {output / 'predictions.csv'}")
    return rows


@torch.inference_mode()
def _predict(
    model: nn.Module,
    paths: Sequence[str],
    config: dict[str, Any],
    names: Sequence[str],
    topk: int,
    batch_size: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    transform, mode = create_transform(**config), image_mode(config["input_size"][0])
    topk, rows = min(topk, len(names)), []
    for start in tqdm(range(0, len(paths), batch_size), "predict", leave=False, disable=None):
        chunk = paths[start : start + batch_size]
        images = torch.stack([transform(_read(path, mode)) for path in chunk])
        probabilities, classes = model(images.to(device)).float().softmax(1).topk(topk)
        for path, values, numbers in zip(chunk, probabilities.tolist(), classes.tolist(), strict=True):
            row: dict[str, Any] = {"path": path}
            for rank, (value, number) in enumerate(zip(values, numbers, strict=True), 1):
                row |= {f"label{rank}": names[number], f"probability{rank}": round(value, 6)}
            rows.append(row)
    return rows


def _read(path: str, mode: str) -> Image.Image:
    with Image.open(path) as image:
        return to_mode(image, mode)


def _write(rows: list[dict[str, Any]], output: Path, mode: str, on_sheet: int = 48) -> None:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(output / "predictions.csv", lambda file: file.write(table.getvalue().encode()))
    shown = rows[:: -(-len(rows) // on_sheet)]
    titles = [f"{Path(row['path']).name}\n{row['label1']} {row['probability1']:.0%}" for row in shown]
    images = []
    for row in shown:
        image = _read(row["path"], mode)
        image.thumbnail((256, 256))
        images.append(image)
    draw_predictions(images, titles, output / "predictions.png")
