"""A YAML recipe under the command line (its keys are the parser's, given flags win), and flags that tools share."""

from __future__ import annotations

import difflib
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, _ArgumentGroup
from collections.abc import Sequence
from typing import Any

import yaml
from timm.utils import ParseKwargs

from ssmvision.data import UserError


class ConfigError(UserError):
    """A recipe file does not fit the parser."""


def parse_with_config(parser: ArgumentParser, argv: Sequence[str] | None = None) -> Namespace:
    """Parses `argv`; a `--config FILE.yaml` in it replaces the parser's defaults first.

    Raises:
        ConfigError: When the file cannot be read or has a key or a value that the parser does not know.
    """
    first, _ = parser.parse_known_args(argv)
    if first.config:
        parser.set_defaults(**_read_config(parser, first.config))
    return parser.parse_args(argv)


def add_model_arguments(group: _ArgumentGroup) -> None:
    """Adds the flags that `load_trained` reads."""
    group.add_argument("--model", metavar="NAME|DIR", help="Name, exported folder, or folder of a training run.")
    group.add_argument(
        "--pretrained", action=BooleanOptionalAction, default=False, help="Use the published weights of the name."
    )
    group.add_argument("--checkpoint", metavar="FILE", help="Weights; a training run's file says all else itself.")
    group.add_argument("--num-classes", type=int, metavar="N", help="Classes that plain weights were trained for.")
    group.add_argument("--in-chans", type=int, metavar="N", help="Image channels. Default: the model's.")
    group.add_argument("--img-size", type=int, metavar="PIXELS", help="Side of square inputs. Default: the model's.")
    group.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="Channels, height and width.")
    group.add_argument("--crop-pct", type=float, metavar="X", help="Part of the image that is looked at.")
    group.add_argument(
        "--model-kwargs", nargs="*", action=ParseKwargs, default={}, metavar="KEY=VALUE", help="Constructor arguments."
    )


def add_input_arguments(parser: ArgumentParser) -> None:
    """Adds the flags that `inspection.inputs` reads, with those of `add_model_arguments`."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="FILE|DIR",
        help="Images, and folders that are searched for them; NIfTI files for models of volumes; or random, for noise.",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="The flags below as keys. Flags override it.")
    group = parser.add_argument_group("model", "Which network, and its weights.")
    add_model_arguments(group)
    group.add_argument(
        "--num-frames", type=int, metavar="N", help="Frames of a clip, the first N images, or slices of a volume."
    )


def _read_config(parser: ArgumentParser, path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file) or {}
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold `key: value` lines.")
    config = {str(key).replace("-", "_"): value for key, value in config.items()}
    known = {action.dest for action in parser._actions if action.dest != "help"}
    for key in config:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{path} has the unknown key {key!r}; the nearest one is {near!r}.")
    return {key: _checked(parser, path, key, value) for key, value in config.items()}


def _checked(parser: ArgumentParser, path: str, key: str, value: Any) -> Any:
    """Passes a value through the type and the choices of its flag, as the command line would."""
    action = next(action for action in parser._actions if action.dest == key)
    if value is None:
        return None
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: {key} is {value!r}, but must hold `key: value` lines.")
        return value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: {key} is {value!r}, but must be true or false.")
        return value
    try:
        many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
        if many != isinstance(value, list) or (isinstance(action.nargs, int) and len(value) != action.nargs):
            raise ValueError
        convert = action.type or str
        result = [convert(str(item)) for item in value] if many else convert(str(value))  # type: ignore[operator]
    except (TypeError, ValueError):
        raise ConfigError(f"{path}: {key} is {value!r}, which {action.option_strings[-1]} does not take.") from None
    if action.choices and result not in action.choices:
        raise ConfigError(f"{path}: {key} is {value!r}, but must be one of {', '.join(map(str, action.choices))}.")
    return result
