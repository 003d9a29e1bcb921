"""How a family answers `tools/verify.py`: from the official constructor arguments to our model, and where to look."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# Official arguments that change no result: what acts in training alone, what initializes, what computes the same.
WITHOUT_EFFECT = (
    "attn_drop_rate", "device", "drop_path_rate", "drop_rate", "dtype", "fused_add_norm", "img_size", "imgsize",
    "initializer_cfg", "mlp_drop_rate", "residual_in_fp32", "ssm_drop_rate", "ssm_init", "use_checkpoint",
)  # fmt: skip

Read = Callable[[tuple[Any, ...], Any], Tensor]


def as_is(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """Read an output as it is."""
    return output


def nhwc(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """Read an NCHW output as NHWC."""
    return output.permute(0, 2, 3, 1)


def nchw(inputs: tuple[Any, ...], output: Any) -> Tensor:
    """Read an NHWC output as NCHW."""
    return output.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Tap:
    """One tensor of an official module's output, found in ours.

    Args:
        module: Name of our module to hook.
        read: Gets that module's inputs and output, returns the tensor as the official code lays it out.
    """

    module: str
    read: Read = as_is


@dataclass(frozen=True)
class OfficialModel:
    """Our model built from official arguments.

    Args:
        model: The model.
        taps: Gives the tensors of an official module by its name.
        inputs: Tensors that a case may have for the model to take after its inputs, by name.
        without_effect: Official arguments of the family that change no result, beside those of `WITHOUT_EFFECT`.
        variants: Further outputs that a case may have, by name, and the change to the model that gives them.
    """

    model: nn.Module
    taps: Callable[[str], list[Tap]]
    inputs: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    variants: Mapping[str, Callable[[nn.Module], None]] = field(default_factory=dict)


def block_taps(name: str) -> list[Tap]:
    """Of a token block: the official ones return the mixer's output and the residual that it was computed from."""
    return [Tap(f"{name}.mixer"), Tap(f"{name}.norm", lambda inputs, output: inputs[0])]


def rename(key: str, renames: Iterable[tuple[str, Any]]) -> str:
    """An official key with every (pattern, replacement) applied in turn, as `re.sub` takes them."""
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def stage_key(key: str) -> str:
    """`layers.i` → `stages.i`: stages begin with their downsampling here and end with it in the official code."""
    match = re.match(r"layers\.(\d+)\.(.*)", key)
    if match is None:
        return key
    stage, rest = int(match[1]), match[2]
    return f"stages.{stage + rest.startswith('downsample')}.{rest}"


def pyramid_taps(
    family: str, stages: int, read_map: Read, read_block: Read, prefix: str = ""
) -> Callable[[str], list[Tap]]:
    """Where the stem, stages and blocks of an official pyramid with `layers.i` are in ours.

    Args:
        family: Name for the error.
        stages: Number of stages.
        read_map: Reads an NCHW map as the official code lays it out.
        read_block: Reads the NHWC output of a block as the official code lays it out.
        prefix: Of our module names.
    """

    def taps(name: str) -> list[Tap]:
        if name == "patch_embed":
            return [Tap(prefix + name, read_map)]
        found = re.fullmatch(r"layers\.(\d+)(\.blocks\.\d+|\.downsample)?", name)
        if found is None:
            raise ValueError(f"{family} has no module {name!r}")
        if found[2] and found[2].startswith(".blocks"):
            return [Tap(prefix + stage_key(name), read_block)]
        last = int(found[1]) == stages - 1
        module = f"stages.{found[1]}" if last else stage_key(f"layers.{found[1]}.downsample")
        return [Tap(prefix + module, read_map)]

    return taps


def refuse_unpublished(family: str, kwargs: Mapping[str, Any], understood: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise a ValueError that names an official argument whose value is not built here.

    Args:
        family: Name for the error.
        kwargs: Official constructor arguments.
        understood: Values that are built, the official default first, by argument.
    """
    for name, values in understood.items():
        if kwargs.get(name, values[0]) not in values:
            raise ValueError(f"{family} with {name}={kwargs[name]!r} was never published and is not built here")
