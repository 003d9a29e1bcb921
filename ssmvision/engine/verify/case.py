"""Reading a case: what the official code was built from, its weights, and the tensors it computed.

A case must be used up. A tensor that is neither given to our code nor compared with what it computes fails a case,
since a proof that skips it proves nothing about it. An argument that nothing asked for is named; whether it matters,
the tensors tell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ssmvision.data import UserError

__all__ = ["Arguments", "Case", "read_case"]


class Arguments(dict[str, Any]):
    """Official constructor arguments, nested ones too, that remember which of them were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({k: Arguments(v) if isinstance(v, dict) else v for k, v in values.items()})
        self._asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._asked.add(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:  # without it, `**` and `|` copy a dict past `__getitem__`
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or what stands for it."""
        self._asked.add(name)
        return super().get(name, default)

    def items(self) -> Any:
        """All arguments, which thereby count as asked for."""
        return [(name, self[name]) for name in self]

    def ignore(self, names: Iterable[str]) -> None:
        """Count arguments that are known to have no effect, "outer.inner" if nested, as asked for."""
        for outer, _, inner in (name.partition(".") for name in names):
            if isinstance(value := self.get(outer), Arguments):
                value.ignore([inner] if inner else value)

    def unasked(self) -> list[str]:
        """The arguments that nothing asked for, nested ones as "outer.inner"."""
        own = [name for name in self if name not in self._asked]
        inner = ((name, super(Arguments, self).__getitem__(name)) for name in self if name in self._asked)
        return own + [f"{outer}.{name}" for outer, x in inner if isinstance(x, Arguments) for name in x.unasked()]


@dataclass(frozen=True)
class Case:
    """One golden case.

    Args:
        name: Of its folder.
        meta: What `meta.json` says.
        weights: Under the official key names; empty if the case has none.
        tensors: Inputs, outputs and gradients by name.
    """

    name: str
    meta: dict[str, Any]
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]

    @property
    def family(self) -> str:
        """The family as the case spells it, in lower case letters and digits alone."""
        return re.sub(r"[^a-z0-9]", "", self.meta["family"].lower())

    @property
    def kwargs(self) -> Arguments:
        """Arguments of the official constructor."""
        arguments: Arguments = self.meta["kwargs"]
        return arguments

    @property
    def official_class(self) -> str:
        """The official class, empty if the case names none."""
        return self.meta.get("official_class") or ""

    def calls(self, sizes: Iterable[str]) -> Iterator[tuple[str, Arguments]]:
        """Of an operator: each call's name and arguments, of which some only say what sizes its tensors have.

        Raises:
            ValueError: Arguments that belong to no call.
        """
        for name, arguments in self.kwargs.items():
            if not isinstance(arguments, Arguments):
                raise ValueError(f"kwargs of an operator are calls by name, not {name}={arguments!r}")
            arguments.ignore(sizes)
            yield name, arguments

    def overlooked(self, compared: Iterable[str], given: str) -> tuple[str, str]:
        """The tensors and the arguments of this case that took no part in a check, a sentence each; empty if all did.

        Args:
            compared: Names of compared tensors, which may begin with their kind.
            given: Pattern of the names of tensors that are not results.
        """
        unasked = self.kwargs.unasked()
        names = {name for key in compared for name in (key, key.partition(".")[2])}
        # Checks that convert gradients as they convert weights know them by our names.
        names |= {f"grad.{key.removeprefix('params/')}" for key in self.weights}
        left = [name for name in sorted(self.tensors) if name not in names and not re.fullmatch(given, name)]
        return (
            f"not compared: {', '.join(left)}" if left else "",
            f"not looked at: {', '.join(unasked)}" if unasked else "",
        )


def read_case(folder: Path) -> Case:
    """Read a case from a folder.

    Raises:
        UserError: The folder is not a case.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        weights = folder / "ckpt.safetensors"
        tensors = load_file(folder / "io.safetensors")
        case = Case(folder.name, meta, load_file(weights) if weights.exists() else {}, tensors)
        if missing := {"family", "kwargs", "tolerance"} - meta.keys():
            raise ValueError(f"meta.json lacks {', '.join(sorted(missing))}")
        meta["kwargs"] = Arguments(meta["kwargs"])
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} is not a case (io.safetensors, meta.json, ckpt.safetensors): {error}") from error
    return case
