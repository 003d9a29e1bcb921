#!/usr/bin/env python
"""Draw what a model sees: effective receptive field, contribution of each scan route, feature maps in colour."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ssmvision.engine import add_input_arguments, parse_with_config, run_command

EPILOG = """
pictures (OUTPUT/NAME_PICTURE.png):
  receptive-field  gradient of the centre of the last feature map by the pixels, averaged over all images
  routes           what every route of a selective scan adds to the output of its layer, on the first image
  features         the three principal components of four feature maps as colours, on the first image
Segmenters show the receptive field of their output; of volumes and clips the middle slice or frame is drawn.

examples:
  all three of published weights
    python tools/visualize.py photo.jpg --model vmamba_tiny_s1l8 --pretrained

  the receptive field of a training run, averaged over a folder
    python tools/visualize.py flowers/val --model output/train/flowers --picture receptive-field
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser whose `--help` is this tool's documentation."""
    parser = argparse.ArgumentParser(
        "visualize.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_input_arguments(parser)
    group = parser.add_argument_group("pictures", "What is drawn.")
    kinds = ("receptive-field", "routes", "features")
    group.add_argument("--picture", nargs="+", choices=kinds, help="Default: all that the model has.")
    group.add_argument("--output", default="output/visualize", metavar="DIR", help="Default: %(default)s.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""

    def work() -> None:
        args = parse_with_config(build_parser(), argv)
        from ssmvision.engine.inspection.visualize import visualize  # only now: it needs matplotlib

        visualize(args)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
