#!/usr/bin/env python
"""Label images with a trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ssmvision.engine import add_model_arguments, parse_with_config, predict, run_command

EPILOG = """
examples:
  every image below a folder, with the best weights of a training run
    python tools/predict.py photos --model output/train/vmamba_tiny_s1l8

  two files, five labels each, with published weights
    python tools/predict.py cat.jpg dog.jpg --model vmamba_tiny_s1l8 --pretrained --topk 5

OUTPUT then holds predictions.csv (path, labels and probabilities) and predictions.png (images with their labels).
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser whose `--help` is this tool's documentation."""
    parser = argparse.ArgumentParser(
        "predict.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="FILE|DIR", help="Images, and folders that are searched for them.")
    parser.add_argument("--config", metavar="FILE.yaml", help="The flags below as keys. Flags override it.")
    add_model_arguments(parser.add_argument_group("model", "Which network, and its weights."))
    group = parser.add_argument_group("prediction", "How images are read and labelled.")
    group.add_argument("--topk", type=int, default=3, metavar="K", help="Labels for each image. Default: %(default)s.")
    group.add_argument("-b", "--batch-size", type=int, default=64, metavar="N", help="Images at a time.")
    group.add_argument("--device", metavar="NAME", help="cuda, cpu or mps. Default: cuda where there is one.")
    group.add_argument(
        "--on-bad-sample",
        choices=("stop", "skip"),
        default="skip",
        help="Unreadable images are named, skipped and counted, or stop the tool. Default: %(default)s.",
    )
    group.add_argument("--output", default="output/predict", metavar="DIR", help="Default: %(default)s.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""
    return run_command(lambda: predict(parse_with_config(build_parser(), argv)))


if __name__ == "__main__":
    sys.exit(main())
