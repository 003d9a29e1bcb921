"""Checkpoints that are never half written, hold everything a run needs to continue exactly, and run no code.

The keys are those of timm's checkpoints where timm has one (`state_dict`, `state_dict_ema`, `optimizer`, ...), so that
`create_model(..., checkpoint_path="model_best.pth")` reads the weights.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ssmvision.data import UserError

VERSION = 1


class ResumeError(UserError):
    """A checkpoint cannot be read, or belongs to another run."""


def atomic_write(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file so that `path` holds the old or the new content at any moment, also after a power cut."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    # The name must reach the disk too: without this a power cut may bring back the file before the last one.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Saves `state` atomically."""
    try:
        atomic_write(path, lambda file: torch.save({"version": VERSION, **state}, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise ResumeError(f"Cannot write checkpoint {path}: {error}; the previous one is intact.") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Loads a training checkpoint onto the CPU without running code from it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ResumeError(f"There is no checkpoint {path}.") from None
    except Exception as error:  # on damaged bytes torch's unpickler fails in any way, IndexError for one
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ResumeError(f"Cannot read checkpoint {path}: {reason}") from error
    if not isinstance(state, dict) or "version" not in state or "position" not in state:
        raise ResumeError(f"{path} holds weights but no training state; start from it with --checkpoint instead.")
    if state["version"] != VERSION:
        raise ResumeError(f"{path} has checkpoint version {state['version']}; this release reads {VERSION}.")
    return state


def rng_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of Python's, numpy's and torch's generators as plain types and tensors."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (timm's Mixup draws from the global generator)
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts back what `rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
