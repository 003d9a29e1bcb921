#!/usr/bin/env python
"""Export a model to ONNX or torch.export's .pt2, and prove that the file computes what the model does."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ssmvision.engine import add_model_arguments, export_programs, parse_with_config, run_command

EPILOG = """
examples:
  published weights as vmamba_tiny_s1l8.onnx, for any batch of 224 x 224 images
    python tools/export.py --model vmamba_tiny_s1l8 --pretrained

  a run of tools/train.py as flowers.onnx and flowers.pt2, for any batch and image size
    python tools/export.py --model output/train/flowers --format onnx pt2 --dynamic-size --output flowers

  clips of 8 frames
    python tools/export.py --model videomamba_tiny_patch16_video.k400_f8 --pretrained --num-frames 8

The batch is always open. With --dynamic-size height and width are open too, for every family, in any multiple of the
model's total stride (other sides where the model takes them, as it would without export); MambaVision then wants
images larger than its largest window (224 pixels for the published models up to 224, more for the others).

The scans become standard operators: one `Scan` node of ONNX each. Neither file needs this package. A .pt2 loads with

  program = torch.export.load("flowers.pt2").module()

The exported file runs on random inputs of two batches (with --dynamic-size of two sizes) beside the model. The largest
difference is printed; above 1e-4 the exit status is 2. ONNX needs the extra `export`: pip install "ssmvision[export]".
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser whose `--help` is this tool's documentation."""
    parser = argparse.ArgumentParser(
        "export.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="The flags below as keys. Flags override it.")
    add_model_arguments(parser.add_argument_group("model", "Which network, and its weights."))
    group = parser.add_argument_group("program", "What is written.")
    group.add_argument("--format", nargs="+", choices=("onnx", "pt2"), help="Kinds of file. Default: onnx.")
    group.add_argument("--dynamic-size", action="store_true", help="Leave height and width open, not only the batch.")
    group.add_argument("--num-frames", type=int, metavar="N", help="Frames of a clip, for models of clips.")
    group.add_argument("--output", metavar="PATH", help="File to write, without its ending. Default: the model's name.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""
    return run_command(lambda: export_programs(parse_with_config(build_parser(), argv)))


if __name__ == "__main__":
    sys.exit(main())
