#!/usr/bin/env python
"""Prove a conversion: our model with official weights against tensors that the official code computed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssmvision.data import UserError
from ssmvision.engine.verify import verify_case

EPILOG = """
A case is a folder with
  ckpt.safetensors   weights under the official key names
  io.safetensors     input, output, feat.N (outputs of official modules), grad_input, grad.<official key>
  meta.json          family, official_class, kwargs of the official constructor, tolerance {rtol, atol},
                     grad_tolerance {rtol, atol_rel_to_max}, feats (official module names in the order of feat.N)

The model is built from the official arguments, loads the weights strictly, and every tensor is compared: a case with a
tensor that nothing here computes fails. One line a case: NAME ok|FAIL, the worst error of outputs, features and
gradients as a fraction of what the tolerances allow, and the arguments that were not looked at.
Exit status 0 if all cases pass, 1 if any fails, 2 if a folder is not a case.

example:
  python tools/verify.py tests/parity/vim_midcls tests/parity/vmamba_v05_s1
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser whose `--help` is this tool's documentation."""
    parser = argparse.ArgumentParser(
        "verify.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", type=Path, metavar="CASE", help="Folders, each one case.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies all cases, prints a line for each, and returns the exit status."""
    args = build_parser().parse_args(argv)
    status = 0
    for folder in args.cases:
        try:
            result = verify_case(folder)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        print(result, flush=True)
        status = max(status, 0 if result.ok else 1)
    return status


if __name__ == "__main__":
    sys.exit(main())
