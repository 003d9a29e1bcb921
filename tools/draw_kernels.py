#!/usr/bin/env python
"""Draw the pictures of docs/layers and docs/one_framework.md from real layers, as they are initialized.

python tools/draw_kernels.py                             all of them
python tools/draw_kernels.py layers/s5.svg --output /x   one, elsewhere
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from ssmvision.engine.inspection.layer_pictures import PICTURES, write_picture

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which; default: all of {', '.join(PICTURES)}")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder to write to")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(PICTURES):
        parser.error(f"there is no picture {sorted(unknown)[0]!r}; known: {', '.join(PICTURES)}")
    for name in args.names or PICTURES:
        print(f"wrote {write_picture(name, args.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
