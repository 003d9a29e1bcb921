#!/usr/bin/env python
"""Compare sequence layers: train one small network per row of a config on the same task with the same budget."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from timm.utils import ParseKwargs

from ssmvision.engine import parse_with_config, run_command

EPILOG = """
examples:
  initializations of S4D on images of clothing, read pixel by pixel
    python tools/sequences.py --config configs/sequence/inits.yaml

  the same, with more seeds and a grid of learning rates
    python tools/sequences.py --config configs/sequence/inits.yaml --seeds 0 1 2 --lr 2e-3 6e-3 --output output/grid

  two rows of your own
    python tools/sequences.py --task drift --net-args dim=16 depth=2 --rows S5="{'net': 's5'}" Mamba="{'net': 'mamba'}"

The folder OUTPUT then holds args.yaml, results.csv (a line per epoch, written as it ends), noise.csv, table.md and
curves.png. A row's figures are those of its last epoch, at the one of --lr that is best for it.
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser whose `--help` is this tool's documentation."""
    parser = argparse.ArgumentParser(
        "sequences.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="The flags below as keys. Flags override it.")
    group = parser.add_argument_group("task", "What is read and answered.")
    group.add_argument(
        "--task",
        choices=("pixels", "drift"),
        default="pixels",
        help="pixels: which class a grey image is of. drift: the velocity of a body from an accelerometer whose bias "
        "walks. Default: %(default)s.",
    )
    _add_words(group, "--task-args", "Sizes of the task; see its function in ssmvision/engine/sequences/tasks.py.")
    group = parser.add_argument_group("rows", "What is compared.")
    _add_words(group, "--rows", "A name and the arguments of `build_network` for each row, as a dict.")
    _add_words(group, "--net-args", "Arguments that all rows share and may replace.")
    group = parser.add_argument_group("budget", "The same for all rows.")
    group.add_argument("--epochs", type=int, default=5, metavar="N", help="Passes over the data. Default: %(default)s.")
    group.add_argument("--batch-size", type=int, default=32, metavar="N", help="Default: %(default)s.")
    group.add_argument(
        "--lr", type=float, nargs="+", default=[4e-3], metavar="X", help="Each is tried, the best of a row counts."
    )
    group.add_argument("--weight-decay", type=float, default=0.01, metavar="X", help="Default: %(default)s.")
    group.add_argument("--clip-grad", type=float, default=1.0, metavar="X", help="Largest norm. Default: %(default)s.")
    group.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="Of weights and order.")
    group.add_argument("--threads", type=int, default=1, metavar="N", help="Of torch. Default: %(default)s.")
    group = parser.add_argument_group("noise", "How trained networks stand one oscillation added to every sequence.")
    group.add_argument(
        "--noise", type=float, default=0.0, metavar="X", help="Its norm over that of the sequence. Default: none."
    )
    group.add_argument(
        "--noise-every",
        type=int,
        default=7,
        metavar="N",
        help="Every Nth Fourier mode is tried, and what the first layer of each trained row amplifies most. "
        "Default: %(default)s.",
    )
    group.add_argument("--noise-count", type=int, default=500, metavar="N", help="Sequences that are scored so.")
    group = parser.add_argument_group("run", "Where results go.")
    group.add_argument("--output", default="output/sequences", metavar="DIR", help="Default: %(default)s.")
    return parser


def _add_words(group: argparse._ArgumentGroup, flag: str, text: str) -> None:
    group.add_argument(flag, nargs="*", action=ParseKwargs, default={}, metavar="KEY=VALUE", help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""

    def work() -> None:
        args = parse_with_config(build_parser(), argv)
        from ssmvision.engine.sequences import compare

        torch.set_num_threads(args.threads)
        compare(args)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
