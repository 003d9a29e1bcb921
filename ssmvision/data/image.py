"""Image folders (and timm's other indexable data sets) as loaders with an exact, resumable position.

```python
train, val = open_train_val("imagenette2-160")
loader = create_image_loader(train, data_config, batch_size=64, augment={"hflip": 0.5}, workers=4)
loader.batch_sampler.set_position(epoch=3, batch=17)  # the next iteration starts there
```
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .check import BadFile, check_class_folders, drop_bad_images, find_bad_images
from .errors import DataError
from .sampling import PositionedBatchSampler, SeededDataset

FindBad = Callable[[Sequence[str]], list[BadFile]]

_SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "eval")}
_IMAGE_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass
class ImageSource:
    """An opened, checked data set.

    Attributes:
        dataset: timm's or torchvision's data set of (PIL image, class), without a transform.
        class_names: Names in the order of the class numbers, or None where the data set has none.
        bad: Files that were left out because they cannot be read, with reasons.
    """

    dataset: Dataset
    class_names: list[str] | None
    bad: list[BadFile] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @property
    def fingerprint(self) -> str:
        """A digest of names and classes in order; equal digests mean that a position denotes the same image."""
        reader = getattr(self.dataset, "reader", None)
        samples = getattr(reader, "samples", None)
        if samples is None:
            return str(len(self))
        lines = (f"{os.path.relpath(path, reader.root)}\t{target}\n" for path, target in samples)  # type: ignore[union-attr]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def find_split(root: str | Path, split: str) -> Path:
    """Returns the folder of `train` or `val` below `root`, under the names in common use.

    For `val`, a root that has no folder of any split is taken as the split itself.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"The data folder {root} does not exist.")
    for name in _SPLIT_FOLDERS.get(split, (split,)):
        if (root / name).is_dir():
            return root / name
    known = [name for names in _SPLIT_FOLDERS.values() for name in names]
    if split == "val" and not any((root / name).is_dir() for name in known):
        return root
    raise DataError(f"{root} has no folder {' or '.join(_SPLIT_FOLDERS.get(split, (split,))[:2])}.")


def open_image_folder(
    folder: str | Path,
    class_names: Sequence[str] | None = None,
    on_bad_sample: str = "stop",
    find: FindBad = find_bad_images,
) -> ImageSource:
    """Opens a folder of class folders after checking every image in it.

    Args:
        folder: The folder of one split.
        class_names: The classes of the training split or of a trained model; a folder that is none of them is an error.
        on_bad_sample: `stop` lists every broken file in one error, `skip` leaves them out.
        find: Finds broken files among paths.
    """
    check_class_folders(folder)
    dataset = create_dataset("", root=str(folder), search_split=False, input_img_mode="")
    reader = dataset.reader
    found = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    if class_names is not None:
        if strangers := sorted(set(found) - set(class_names)):
            raise DataError(
                f"{folder} has class {', '.join(map(repr, strangers))}, which training does not know "
                f"({len(class_names)} classes: {', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''})."
            )
        numbers = {name: index for index, name in enumerate(class_names)}
        reader.samples = [(path, numbers[found[target]]) for path, target in reader.samples]
        reader.class_to_idx = numbers
    before = {target for _, target in reader.samples}
    reader.samples, bad = drop_bad_images(reader.samples, on_bad_sample, find)
    names = list(class_names or found)
    if lost := before - {target for _, target in reader.samples}:
        raise DataError(f"{folder}: class {', '.join(repr(names[i]) for i in sorted(lost))} has no readable image.")
    dataset._max_retries = 1  # timm reads the next image in place of a broken one; here that is an error
    return ImageSource(dataset, names, bad)


def open_dataset(root: str | Path, name: str, split: str, download: bool = False) -> ImageSource:
    """Opens a data set by timm's name, for example `torch/cifar10` or `hfds/user/set`."""
    try:
        dataset = create_dataset(name, root=str(root), split=split, download=download, input_img_mode="")
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"Cannot open data set {name!r}, split {split!r}: {error}") from error
    if isinstance(dataset, IterableDataset):
        raise DataError(f"Data set {name!r} is a stream: it has no position to resume from, so it cannot be used here.")
    class_names = getattr(dataset, "classes", None)
    if class_names is None and (class_to_idx := getattr(getattr(dataset, "reader", None), "class_to_idx", None)):
        class_names = sorted(class_to_idx, key=class_to_idx.__getitem__)
    return ImageSource(dataset, [str(name) for name in class_names] if class_names else None)


def open_train_val(
    root: str | Path,
    name: str = "",
    on_bad_sample: str = "stop",
    download: bool = False,
    find: FindBad = find_bad_images,
) -> tuple[ImageSource, ImageSource]:
    """Opens both splits of an image folder (`root/train`, `root/val`) or of a data set named as timm names it."""
    if name and name != "folder":
        return open_dataset(root, name, "train", download), open_dataset(root, name, "validation", download)
    train_folder, val_folder = find_split(root, "train"), find_split(root, "val")
    train = open_image_folder(train_folder, None, on_bad_sample, find=find)
    assert train.class_names is not None
    if len(train.class_names) < 2:
        raise DataError(f"{train_folder} has only one class, {train.class_names[0]!r}; there is nothing to tell apart.")
    return train, open_image_folder(val_folder, train.class_names, on_bad_sample, find=find)


def image_mode(in_chans: int) -> str:
    """Returns the Pillow mode with that many channels."""
    if in_chans not in _IMAGE_MODES:
        raise DataError(f"Image files have 1 (grey), 3 (RGB) or 4 (RGBA) channels, not {in_chans}.")
    return _IMAGE_MODES[in_chans]


def _leave_signals_to_the_main_process(worker: int) -> None:
    # Ctrl-C and batch systems signal the whole group; the main process still needs its workers for the present step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def create_image_loader(
    source: ImageSource,
    data_config: dict[str, Any],
    batch_size: int,
    augment: dict[str, Any] | None = None,
    workers: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """Returns a loader whose batch `k` of epoch `e` depends on `seed` alone, not on workers or on what ran before.

    Args:
        source: What to read.
        data_config: From timm's `resolve_input_data_config`: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`.
        batch_size: Images in a batch of this process.
        augment: Arguments of timm's training transform. None gives evaluation: no randomness, every image once.
        workers: Reading processes; 0 reads in this one.
        seed: Decides order and augmentation.
        rank: Number of this process.
        world_size: Number of processes that share the data.
        pin_memory: Keep batches in page-locked memory for a fast copy to the accelerator.
    """
    training = augment is not None
    if training and len(source) < batch_size * world_size:
        raise DataError(
            f"The training set has {len(source)} images, fewer than one batch of {batch_size * world_size}; "
            "lower --batch-size."
        )
    try:
        transform = create_transform(**data_config, is_training=training, **(augment or {}))
    except (AssertionError, KeyError, ValueError) as error:
        raise DataError(f"timm cannot build such an image transform: {error or 'check --aa and --scale'}") from error
    mode = image_mode(data_config["input_size"][0])
    return DataLoader(
        SeededDataset(source.dataset, transform, mode, seed),
        batch_sampler=PositionedBatchSampler(len(source), batch_size, training, seed, rank, world_size),
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # of its own: drawing the workers' seeds must not move the model's randomness
    )
