"""Look at every image before training does, so that a broken file costs a second and not a night."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from .errors import DataError

BadFile = tuple[str, str]  # path, reason
_MAX_LISTED = 1000  # a message of a million lines helps nobody


def read_problem(path: str | Path) -> str | None:
    """Decodes one image completely and returns why that fails, or None."""
    try:
        if os.path.getsize(path) == 0:
            return "empty file"
        with Image.open(path) as image:
            image.draft(image.mode, (1, 1))  # JPEG: all bytes are still decoded, but few pixels are computed
            image.load()
    except Image.DecompressionBombError as error:
        return f"decompression bomb: {error}"
    except Image.UnidentifiedImageError:
        return "not an image"
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        return str(error) or type(error).__name__
    return None


def find_bad_images(paths: Sequence[str], threads: int | None = None) -> list[BadFile]:
    """Decodes all images in parallel (decoders release Python's lock) and returns the broken ones in order."""
    threads = threads or min(32, 2 * (os.cpu_count() or 1))
    with ThreadPool(threads) as pool:
        problems = pool.imap(read_problem, paths, chunksize=32)
        return [(path, problem) for path, problem in zip(paths, problems, strict=True) if problem]


def describe_bad_images(bad: Sequence[BadFile]) -> str:
    """Returns one indented line for each broken file."""
    lines = [f"  {path}: {reason}" for path, reason in bad[:_MAX_LISTED]]
    if len(bad) > _MAX_LISTED:
        lines.append(f"  ... and {len(bad) - _MAX_LISTED} more")
    return "\n".join(lines)


def drop_bad_images(
    samples: list[tuple[str, int]],
    on_bad_sample: str = "stop",
    find: Callable[[Sequence[str]], list[BadFile]] = find_bad_images,
) -> tuple[list[tuple[str, int]], list[BadFile]]:
    """Checks `(path, class)` samples and returns the readable ones and the broken ones.

    Args:
        samples: What a data set is about to read.
        on_bad_sample: `stop` raises a `DataError` that lists every broken file; `skip` leaves them out.
        find: The search itself; a distributed run passes one that shares the work.
    """
    bad = find([path for path, _ in samples])
    if bad and on_bad_sample != "skip":
        raise DataError(
            f"{len(bad)} of {len(samples)} images cannot be read:\n{describe_bad_images(bad)}\n"
            "Repair or remove them, or leave them out with --on-bad-sample skip."
        )
    broken = {path for path, _ in bad}
    return [sample for sample in samples if sample[0] not in broken], bad


def check_class_folders(root: str | Path) -> None:
    """Raises a `DataError` unless `root` holds class folders with at least one image file in each."""
    root = Path(root)
    extensions = get_img_extensions(as_set=True)
    classes = 0
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders.sort()
        has_images = any(os.path.splitext(name)[1].lower() in extensions for name in files)
        inside = Path(folder).relative_to(root).parts
        if any(part.startswith(".") for part in inside):
            if has_images:
                raise DataError(f"The hidden folder {folder} holds images and would become a class; remove it.")
        elif not inside:
            if has_images:
                raise DataError(f"{root} holds images beside its class folders; put every image into a class folder.")
        elif has_images:
            classes += 1
        elif not subfolders:
            raise DataError(f"The class folder {folder} holds no images; add some or remove the folder.")
    if not classes:
        raise DataError(f"{root} holds no images; expected one folder for each class with images in it.")
