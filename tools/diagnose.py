#!/usr/bin/env python
"""Tell for every selective scan of a model whether its tokens converge to zero or diverge, slowly or fast."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ssmvision.engine import add_input_arguments, parse_with_config, run_command

EPILOG = """
Each scan is followed as the flow of its tokens that a deep stack of it would be, from the tokens of your images:

  convergent        their norm falls; to zero, where the input-output matrix is negative definite
  slowly divergent  it rises ever more slowly, and stays finite for all times
  fast divergent    it rises ever faster, and would be infinite after finite time

columns of the table, one line for each route of a layer, medians over images:
  mu min, mu max    eigenvalues of the symmetric part of the input-output matrix; negative ones: mu < 0
  rate              growth of the norm at the start, from -1 (straight to zero) to 1 (straight away)
  exponent          p of d norm / d time ~ norm^(1 + p): above 0 is fast
  norm              where the walk ended, relative to the start: above 1000, below 1 / 30, or after 300 steps
  grow              tokens whose own norm grew

OUTPUT/NAME_tokens.csv holds the table, OUTPUT/NAME_tokens.png norms over time and eigenvalues.

examples:
  published weights on a photo
    python tools/diagnose.py photo.jpg --model vim_tiny_patch16_224 --pretrained

  a training run on some of the images it was validated on
    python tools/diagnose.py flowers/val/daisy --max-images 4 --model output/train/flowers

  a segmenter on a volume, standardized and cut to the size it was made for; a model of video on eight frames
    python tools/diagnose.py case.nii.gz --model umamba_enc_3d --checkpoint weights.pth
    python tools/diagnose.py frames --model videomamba_tiny_patch16_video --num-frames 8
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser whose `--help` is this tool's documentation."""
    parser = argparse.ArgumentParser(
        "diagnose.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_input_arguments(parser)
    group = parser.add_argument_group("diagnosis", "What is followed, and where it is written.")
    group.add_argument(
        "--max-images",
        type=int,
        default=4,
        metavar="N",
        help="The first N images or volumes count. Default: %(default)s.",
    )
    group.add_argument("--output", default="output/diagnose", metavar="DIR", help="Default: %(default)s.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""

    def work() -> None:
        args = parse_with_config(build_parser(), argv)
        from ssmvision.engine.inspection.diagnose import diagnose  # only now: it needs matplotlib

        diagnose(args)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
