"""Models for training and for use, made by name, from an exported folder or from a checkpoint."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import timm
from timm.data.model_config import resolve_input_data_config
from timm.models import get_pretrained_cfg_value
from torch import nn

import ssmvision
from ssmvision.data import UserError
from ssmvision.models._networks import is_network

from .checkpoint import ResumeError, load_checkpoint


class ModelError(UserError):
    """A model cannot be made or its weights do not fit."""


def create_model(name: str, **kwargs: Any) -> Any:
    """As `ssmvision.create_model`, with failures that the user can repair as `ModelError`.

    Typed Any: timm gives every model attributes (`num_classes`, `pretrained_cfg`) that `nn.Module` does not declare.
    """
    try:
        return ssmvision.create_model(name, **kwargs)
    except (RuntimeError, ValueError, AssertionError, OSError) as error:
        raise ModelError(str(error)) from error
    except TypeError as error:  # how Python reports a keyword that the constructor does not have
        raise ModelError(f"Cannot create model {name!r}: {error}; check --model-kwargs.") from error


def image_size(args: Namespace) -> int | tuple[int, ...] | None:
    """Returns the asked-for image size, or None when the model decides."""
    return tuple(args.input_size[1:]) if args.input_size else args.img_size


def build_model(args: Namespace, num_classes: int) -> Any:
    """Makes the model that the arguments of a training run describe."""
    if is_network(args.model):
        raise ModelError(f"{args.model} is no classifier of images, the only models that this tool can use.")
    kwargs = dict(args.model_kwargs or {})
    fixed_size = timm.is_model(args.model) and get_pretrained_cfg_value(args.model, "fixed_input_size")
    if image_size(args) and fixed_size:
        kwargs.setdefault("img_size", image_size(args))
    return create_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint_path=args.checkpoint or "",
        num_classes=num_classes,
        in_chans=args.input_size[0] if args.input_size else args.in_chans,
        drop_rate=args.drop or None,
        drop_path_rate=args.drop_path,
        **kwargs,
    )


def data_config(model: nn.Module, args: Namespace) -> dict[str, Any]:
    """Resolves the preprocessing of `model` under the arguments given."""
    try:
        return resolve_input_data_config(model, args={k: v for k, v in vars(args).items() if v is not None})
    except (ValueError, AssertionError) as error:
        raise ModelError(f"The model cannot take such images: {error}") from error


def load_trained(args: Namespace) -> tuple[Any, list[str] | None]:
    """Loads what validation and prediction run: the model and its class names.

    `args.model` is a name, an exported folder or a run's folder; with `args.checkpoint` from a training run everything
    else follows from that file.
    """
    if args.model and Path(args.model).is_dir():
        folder = Path(args.model)
        folder = folder if (folder / "config.json").is_file() else folder / "export"
        if not (folder / "config.json").is_file():
            raise ModelError(f"{args.model} holds no exported model: config.json is missing.")
        model = create_model(f"local-dir:{folder}", pretrained=not args.checkpoint, checkpoint_path=args.checkpoint)
        return model, model.pretrained_cfg.get("label_names")
    trained = _training_args(args.checkpoint)
    if trained is None and not args.model:
        raise ModelError("Name a model, an exported folder, or a checkpoint of a training run.")
    if trained is None:
        args.drop, args.drop_path = 0.0, None
        model = build_model(args, args.num_classes)
        return model, model.pretrained_cfg.get("label_names")
    state, made_with = trained
    made_with.pretrained, made_with.checkpoint = False, args.checkpoint
    for name in ("img_size", "input_size", "in_chans", "mean", "std", "interpolation", "crop_pct"):
        if getattr(args, name, None) is None:
            setattr(args, name, getattr(made_with, name, None))
    return build_model(made_with, made_with.num_classes), state["class_names"]


def _training_args(checkpoint: str | None) -> tuple[dict[str, Any], Namespace] | None:
    if not checkpoint:
        return None
    if not Path(checkpoint).is_file():
        raise ResumeError(f"There is no checkpoint {checkpoint}.")
    try:
        state = load_checkpoint(checkpoint)
    except ResumeError:
        return None  # plain weights: create_model reads every kind, and says what is wrong with a broken file
    return state, Namespace(**state["args"])
