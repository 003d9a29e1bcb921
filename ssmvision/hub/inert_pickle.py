"""A pickle module that runs no code of the file: tensors are rebuilt, every other class becomes an inert placeholder.

Official training checkpoints hold more than tensors (yacs configs, numpy scalars, optimizers). `weights_only=True`
refuses such files as a whole, `weights_only=False` runs whatever they name; `torch.load` with this module as its
`pickle_module` does neither.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pickle import UnpicklingError
from typing import IO, Any, ClassVar

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor, _rebuild_tensor_v2

__all__ = ["Placeholder", "Unpickler", "UnpicklingError", "load"]

# Names are looked up here and nowhere else: nothing is imported on a file's behalf, so nothing of it can run.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
    ("torch.storage", "UntypedStorage"): torch.storage.UntypedStorage,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
}
_ALLOWED.update({("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)})


class Placeholder:
    """Stands for an object of a class that is not loaded: it swallows all that unpickling does to it."""

    origin = "unknown"

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Take and forget the arguments of the original class."""

    def __new__(cls, *args: object, **kwargs: object) -> Placeholder:
        """Take and forget them at construction too."""
        return super().__new__(cls)

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Forget a list item."""

    def extend(self, items: object) -> None:
        """Forget list items."""

    def add(self, item: object) -> None:
        """Forget a set item."""

    def __repr__(self) -> str:
        return f"<{self.origin}, not loaded>"


# The unpickler written in Python, for two reasons: its opcodes can be replaced, and its memo is a dict, where that of
# the C one is a list that a file of ten bytes can make as long as it likes.
class Unpickler(pickle._Unpickler):
    """Unpickler that resolves tensor-rebuilding names and answers every other one with a `Placeholder`."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a global of the file without importing anything."""
        allowed = _ALLOWED.get((module, name))
        if allowed is not None:
            return allowed
        return type("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})

    def load_build(self) -> None:
        """Drop the state of an object, which could otherwise rewrite torch's own functions."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is OrderedDict and isinstance(state, dict):
            vars(target).update(state)  # the `_metadata` of a state dict

    dispatch[pickle.BUILD[0]] = load_build


def load(file: IO[bytes], **kwargs: Any) -> Any:
    """`pickle.load` with the inert `Unpickler`; the name and signature are what `torch.load` expects."""
    return Unpickler(file, **kwargs).load()
