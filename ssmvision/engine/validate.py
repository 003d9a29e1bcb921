"""Validation of a trained model on a folder of class folders."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from ssmvision.data import (
    DataError,
    ImageSource,
    UserError,
    create_image_loader,
    find_split,
    open_dataset,
    open_image_folder,
)

from .checkpoint import atomic_write
from .distributed import start_ranks, stop_ranks
from .evaluate import evaluate
from .models import data_config, load_trained


def validate(args: Namespace) -> dict[str, Any]:
    """Validates as `tools/validate.py --help` describes and returns the result row."""
    ranks = start_ranks(args.device)
    try:
        source = None
        if args.num_classes is None and args.model and not (args.checkpoint or Path(args.model).is_dir()):
            source = _open(args, None)  # a bare name: the data says how many classes the head has
            args.num_classes = len(source.class_names or []) or None
        model, class_names = load_trained(args)
        source = source or _open(args, class_names)
        if source.class_names and len(source.class_names) > model.num_classes:
            raise UserError(
                f"The data has {len(source.class_names)} classes, but the model tells {model.num_classes} apart."
            )
        model.to(ranks.device)
        loader = create_image_loader(
            source, data_config(model, args), args.batch_size, None, args.workers, 0, ranks.rank, ranks.world_size
        )
        started = time.perf_counter()
        metrics = evaluate(model, loader, ranks, args.amp, args.amp_dtype, args.channels_last, "validate")
        seconds = time.perf_counter() - started
    finally:
        stop_ranks()
    row = {
        "model": args.model or args.checkpoint,
        "images": metrics["count"],
        "skipped": len(source.bad),
        "top1": round(metrics["top1"], 4),
        "top5": round(metrics["top5"], 4),
        "loss": round(metrics["loss"], 6),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images_per_second": round(metrics["count"] / seconds, 1),
    }
    if ranks.is_first:
        _report(row, source, args.results_file)
    return row


def _open(args: Namespace, class_names: list[str] | None) -> ImageSource:
    if args.dataset:
        return open_dataset(args.data_dir, args.dataset, args.split)
    return open_image_folder(find_split(args.data_dir, args.split), class_names, args.on_bad_sample)


def _report(row: dict[str, Any], source: ImageSource, results_file: str | None) -> None:
    for path, reason in source.bad:
        print(f"skipped {path}: {reason}")
    width = max(map(len, row))
    for name, value in row.items():
        print(f"{name:<{width}}  {value}")
    if not results_file:
        return
    try:
        Path(results_file).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(results_file, lambda file: file.write((json.dumps(row, indent=2) + "\n").encode()))
    except OSError as error:
        raise DataError(f"Cannot write {results_file}: {error.strerror or error}.") from error
