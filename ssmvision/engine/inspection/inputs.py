"""A model of any kind and what it is shown: images, the frames of a clip, volumes, or noise."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmvision.data import DataError, UserError
from ssmvision.models._networks import is_network, network_cfg
from ssmvision.models.convs5 import VideoPredictor

from ..models import ModelError, create_model, data_config, load_trained
from ..predict import find_images, read_images

_VOLUMES = (".nii", ".nii.gz")


def load_with_inputs(args: Namespace, limit: int | None = None) -> tuple[Any, Tensor, dict[str, Any]]:
    """The model that the flags name, in evaluation mode, and its inputs.

    Args:
        args: The flags of `add_input_arguments`.
        limit: Most images or volumes that are read.

    Returns:
        The model; images (b, c, h, w), volumes (b, c, d, h, w) or one clip (1, c, t, h, w); their preprocessing.

    Raises:
        UserError: A model that cannot be made or looked into, or inputs that cannot be read or do not fit it.
    """
    network = bool(args.model) and is_network(args.model)
    model, depth = _load_network(args) if network else (load_trained(args)[0].eval(), ())
    if args.num_frames is not None:
        if args.num_frames < 1:
            raise UserError(f"--num-frames is {args.num_frames}, but must be at least 1.")
        depth = (args.num_frames,)
    config = data_config(model, args)
    channels, *sides = config["input_size"]
    if args.inputs == ["random"]:
        x = torch.randn(1, channels, *depth, *sides, generator=torch.Generator().manual_seed(0))
    elif args.inputs[0].endswith(_VOLUMES):
        x = torch.stack([_read_volume(path, (channels, *depth, *sides)) for path in args.inputs[:limit]])
    else:
        x, config = read_images(find_images(args.inputs)[: depth[0] if depth else limit], model, args)
        x = _stacked(x, depth[0]) if depth else x
    _try(model, x)
    return model, x, config


def _load_network(args: Namespace) -> tuple[Any, tuple[int, ...]]:
    """The network, and as many slices or frames as it was made for, if it takes volumes or clips."""
    size = network_cfg(args.model).input_size or args.input_size
    if not size:
        raise UserError(f"{args.model} has no input size of its own: say --input-size 3 224 224, or another.")
    channels = args.input_size[0] if args.input_size else args.in_chans
    weights: dict[str, Any] = {"pretrained": args.pretrained, "checkpoint_path": args.checkpoint}
    model = create_model(
        args.model, in_chans=channels, num_classes=args.num_classes, **weights, **args.model_kwargs
    ).eval()
    if isinstance(model, VideoPredictor):
        raise UserError(f"{args.model} predicts video: it has neither selective scans to follow nor maps to draw.")
    *depth, height, width = size[1:]
    # What timm asks of models, so that images are read as for those.
    model.pretrained_cfg = {
        "input_size": (model.in_channels, height, width), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0,
    }  # fmt: skip
    return model, tuple(depth)


def _read_volume(path: str, size: tuple[int, ...]) -> Tensor:
    """A NIfTI file as (c, d, h, w), axes as stored: standardized, and cut or padded around its centre to a size."""
    try:
        import nibabel
    except ModuleNotFoundError as error:
        raise UserError("Volumes need nibabel: pip install 'ssmvision[medical]'.") from error
    try:
        image: Any = nibabel.load(path)
        x = torch.from_numpy(image.get_fdata()).float()
    except (OSError, nibabel.filebasedimages.ImageFileError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    x = x.movedim(-1, 0) if x.ndim == 4 else x[None]
    if x.ndim != len(size) or len(x) != size[0]:
        raise DataError(f"{path} is {tuple(x.shape)}, channels first, but the model takes {size}.")
    x = (x - x.mean()) / x.std().clamp(min=1e-6)
    missing = [want - have for want, have in zip(size[:0:-1], x.shape[:0:-1], strict=True)]
    return F.pad(x, [n for m in missing for n in (m // 2, m - m // 2)], value=x.min().item())


def _stacked(images: Tensor, depth: int) -> Tensor:
    """Images (t, c, h, w) as one clip or volume (1, c, t, h, w)."""
    if len(images) < depth:
        raise DataError(f"The model takes {depth} images as frames or slices, not {len(images)}.")
    return images.transpose(0, 1)[None]


@torch.no_grad()
def _try(network: Any, x: Tensor) -> None:
    """One pass more, for models that refuse some sizes."""
    try:
        network(x[:1])
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"The model cannot take {tuple(x.shape)}: {error}") from error
