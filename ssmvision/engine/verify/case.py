"""Reading a case: what the official code was built from, its weights, and the tensors it computed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ssmvision.data import UserError

__all__ = ["Case", "read_case"]


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
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder} is not a case (io.safetensors, meta.json, ckpt.safetensors): {error}") from error
    return case
