"""Reading weights out of any checkpoint without running its code, and telling how they fit a model."""

from __future__ import annotations

import argparse
import logging
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from . import flax_msgpack, inert_pickle

__all__ = ["CheckpointError", "KeyReport", "compare_keys", "extract_state_dict", "load_state_dict", "read_checkpoint"]

_logger = logging.getLogger(__name__)

# Where training scripts put the weights. All VMamba releases but one were evaluated with their EMA, so it goes first.
_EMA_KEYS = ("state_dict_ema", "model_ema")
_MODEL_KEYS = ("state_dict", "model", "model_state_dict", "network_weights")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_FLAX_COLLECTIONS = ("params", "batch_stats")  # maps of maps; beside them lie steps and states of optimizers


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


@dataclass(frozen=True)
class KeyReport:
    """How the keys of a checkpoint fit a model.

    Args:
        missing: keys that the model has and the checkpoint lacks.
        unexpected: keys that the checkpoint has and the model lacks.
        mismatched: `(key, shape in the checkpoint, shape in the model)` where both have the key.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every key of both sides is accounted for."""
        return not (self.missing or self.unexpected or self.mismatched)

    def without(self, *modules: str) -> KeyReport:
        """The same report with the keys of some modules excused."""
        prefixes = tuple(f"{name}." for name in modules)
        return KeyReport(
            tuple(key for key in self.missing if not key.startswith(prefixes)),
            tuple(key for key in self.unexpected if not key.startswith(prefixes)),
            tuple(entry for entry in self.mismatched if not entry[0].startswith(prefixes)),
        )

    def summary(self, limit: int = 5) -> str:
        """Counts of each kind of trouble with the first few keys, on one line."""
        shapes = [f"{key} {have} instead of {want}" for key, have, want in self.mismatched]
        parts = [("missing", self.missing), ("surplus", self.unexpected), ("of another shape", shapes)]
        found = [f"{len(keys)} {what} ({_first(keys, limit)})" for what, keys in parts if keys]
        return "keys: " + ", ".join(found) if found else "all keys match"


def _first(keys: Any, limit: int) -> str:
    return (", ".join(keys[:limit]) or "none") + (", ..." if len(keys) > limit else "")


def compare_keys(state_dict: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> KeyReport:
    """Compare the weights of a checkpoint, already under the model's key names, with a model's own."""
    mismatched = [
        (key, tuple(value.shape), tuple(model_state[key].shape))
        for key, value in state_dict.items()
        if key in model_state and value.shape != model_state[key].shape
    ]
    missing = tuple(key for key in model_state if key not in state_dict)
    unexpected = tuple(key for key in state_dict if key not in model_state)
    return KeyReport(missing, unexpected, tuple(mismatched))


def read_checkpoint(path: str | Path) -> Any:
    """Read a safetensors, torch (zip or legacy) or flax (msgpack) file onto the CPU; code inside the file never runs.

    Classes other than tensors and plain containers come back as `inert_pickle.Placeholder`.
    """
    path = Path(path)
    kind = _sniff(path)
    try:
        if kind == "safetensors":
            return safetensors.torch.load_file(path)
        return _read_flax(path) if kind == "flax" else _read_torch(path)
    except CheckpointError:
        raise
    except flax_msgpack.FlaxFormatError as error:
        raise CheckpointError(f"{path} {error}.") from error
    except MemoryError as error:
        raise CheckpointError(f"{path} needs more memory than there is.") from error
    # A damaged or hostile file makes the parsers raise nearly anything; all of it means the same to the caller.
    except Exception as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise CheckpointError(f"{path} is damaged or no checkpoint: {type(error).__name__}: {reason}") from error


def _sniff(path: Path) -> str:
    """Name the format by content, since published files carry all kinds of suffixes."""
    if not path.is_file():
        raise CheckpointError(f"{path} {'is not a file' if path.exists() else 'does not exist'}.")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError(f"{path} is empty.")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`.")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError(f"{path} is a web page, not a checkpoint; the download link probably needs a login.")
    if flax_msgpack.is_flax(head):
        return "flax"
    return "safetensors" if head[8:9] == b"{" else "torch"


def _read_flax(path: Path) -> dict[str, Any]:
    tree = flax_msgpack.load(path)
    return tree if isinstance(tree.get("params"), Mapping) else {"params": tree}  # parameters saved alone


def _read_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            unpacked = sum(entry.file_size for entry in archive.infolist())
        # torch stores tensors uncompressed, so a file that grows when read is no checkpoint but a zip bomb.
        if unpacked > 2 * path.stat().st_size:
            raise CheckpointError(f"{path} would unpack to {unpacked / 1e6:.0f} MB, far more than its size; not read.")
        # torch.load hands TorchScript archives to a loader that runs their code.
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError(f"{path} is a TorchScript program; only checkpoints of weights are read.")
    elif tarfile.is_tarfile(path):
        raise CheckpointError(f"{path} is a tar archive; only torch and safetensors files are read.")
    # An open file, because torch.load goes by the suffix of a path.
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickle protocols and sources of modules, which do not matter here
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            _logger.info("%s holds more than weights; its other classes are not loaded (%s)", path, error)
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=inert_pickle)


def extract_state_dict(checkpoint: Any, use: str | None = None) -> dict[str, Tensor]:
    """Take the weights out of a training checkpoint and strip the prefixes of DDP and torch.compile.

    Args:
        checkpoint: what `read_checkpoint` returned.
        use: `"model"` or `"model_ema"`; by default the averaged weights if there are any.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"holds a {type(checkpoint).__name__}, not a dictionary of weights.")
    weights = _choose(checkpoint, use)
    strangers = [str(key) for key, value in weights.items() if not isinstance(value, Tensor)]
    if strangers or not weights:
        problem = f"entries that are no tensors ({_first(strangers, 5)})" if strangers else "no tensors"
        raise CheckpointError(f"holds {problem}; its keys are: {_first([str(key) for key in checkpoint], 8)}.")
    return _strip_prefixes(dict(weights))


def _choose(checkpoint: Mapping[str, Any], use: str | None) -> Mapping[str, Any]:
    choices = {None: _EMA_KEYS + _MODEL_KEYS, "model": _MODEL_KEYS, "model_ema": _EMA_KEYS}
    if use not in choices:
        raise ValueError(f"use must be 'model', 'model_ema' or None, not {use!r}")
    for key in choices[use]:
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    if use == "model_ema":
        raise CheckpointError(f"holds no averaged weights; its keys are: {_first([str(k) for k in checkpoint], 8)}.")
    params = checkpoint.get("params")
    if isinstance(params, Mapping) and any(isinstance(value, Mapping) for value in params.values()):
        return _flax_weights(checkpoint)
    return checkpoint


def _flax_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Paths joined by "/" → arrays, of a model's variables alone."""
    while isinstance(checkpoint["params"].get("params"), Mapping):  # variables within a training state
        checkpoint = checkpoint["params"]
    return dict(flax_msgpack.flatten({name: checkpoint[name] for name in _FLAX_COLLECTIONS if name in checkpoint}))


def _strip_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    # Only a prefix that all keys share is a wrapper's; a model may have a submodule of that name.
    for prefix in _WRAPPER_PREFIXES * 2:
        if all(key.startswith(prefix) for key in weights):
            weights = {key[len(prefix) :]: value for key, value in weights.items()}
    return weights


def load_state_dict(path: str | Path, use: str | None = None) -> dict[str, Tensor]:
    """Read the weights of any checkpoint file; warn if some are not finite.

    Args:
        path: safetensors, torch or flax file.
        use: see `extract_state_dict`.
    """
    checkpoint = read_checkpoint(path)
    try:
        weights = extract_state_dict(checkpoint, use)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    _warn_if_not_finite(weights, path)
    return weights


def _warn_if_not_finite(weights: Mapping[str, Tensor], path: str | Path) -> None:
    bad = [key for key, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        warnings.warn(f"{path} holds NaN or infinity in {len(bad)} tensors ({_first(bad, 5)})", stacklevel=3)
