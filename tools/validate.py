#!/usr/bin/env python
"""Measure the accuracy of a model on a folder of class folders."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ssmvision.engine import add_model_arguments, parse_with_config, run_command, validate

WORKERS = min(4, os.cpu_count() or 1)

EPILOG = """
examples:
  a run of tools/train.py, by its folder or by one of its checkpoints
    python tools/validate.py --data-dir imagenette2-160 --model output/train/vmamba_tiny_s1l8
    python tools/validate.py --data-dir imagenette2-160 --checkpoint output/train/vmamba_tiny_s1l8/last.pth

  published weights
    python tools/validate.py --data-dir imagenet --model vmamba_tiny_s1l8 --pretrained --results-file result.json
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser whose `--help` is this tool's documentation."""
    parser = argparse.ArgumentParser(
        "validate.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="The flags below as keys. Flags override it.")
    add_model_arguments(parser.add_argument_group("model", "Which network, and its weights."))
    group = parser.add_argument_group("data", "What it is measured on.")
    group.add_argument("--data-dir", metavar="DIR", default="", help="Folder with val/, or of class folders.")
    group.add_argument("--dataset", metavar="NAME", default="", help="A data set by timm's name instead.")
    group.add_argument("--split", metavar="NAME", default="val", help="Which split of it. Default: %(default)s.")
    group.add_argument(
        "--on-bad-sample",
        choices=("stop", "skip"),
        default="stop",
        help="Stop with a list of unreadable images, or leave them out and count them. Default: %(default)s.",
    )
    _add_machine(parser.add_argument_group("machine", "What makes it fast on the hardware at hand."))
    group = parser.add_argument_group("results", "They are printed, and written where asked.")
    group.add_argument("--results-file", metavar="FILE.json", help="Write the results as JSON.")
    return parser


def _add_machine(group: argparse._ArgumentGroup) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--device", metavar="NAME", help="cuda, cpu or mps. Default: cuda where there is one.")
    group.add_argument("-b", "--batch-size", type=int, default=128, metavar="N", help="Images at a time.")
    group.add_argument("--workers", type=int, default=WORKERS, metavar="N", help="Reading processes.")
    group.add_argument("--amp", action=switch, default=False, help="Mixed precision.")
    group.add_argument("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="Its lower precision.")
    group.add_argument("--channels-last", action=switch, default=False, help="Channels-last memory order.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""
    return run_command(lambda: validate(parse_with_config(build_parser(), argv)))


if __name__ == "__main__":
    sys.exit(main())
