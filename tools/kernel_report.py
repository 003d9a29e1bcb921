#!/usr/bin/env python
"""Compile the Triton kernels for GPUs that need not be there, and print what the machine code tells."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ssmvision.engine.command import run_command
from ssmvision.engine.kernel_report import (
    DTYPES,
    MACHINES,
    OPERATORS,
    RATIO_LIMIT,
    TARGETS,
    examine,
    kernels,
    traffic,
)

EPILOG = """
Budgets: no spills, at most 128 registers forward and 232 backward, 48 KiB of shared memory, loads of 128 bits for all
that is as large as the tokens, and for the scan along four routes in bfloat16, even if no cache holds anything, at most
0.35 of the bytes that a pipeline of copies, scan and merge moves. Times are predicted, not measured; no GPU is used.

Exit status 0 if all budgets hold, 1 if one is broken, 2 for wrong arguments.

example:
  python tools/kernel_report.py --operators selective_scan --targets sm_90
"""

# tokens, channels, states and rank of delta of VMamba's four stages at 224 x 224, and of a scan with more states
SHAPES = ((3136, 192, 1, 6), (784, 384, 1, 12), (196, 768, 1, 24), (49, 1536, 1, 48), (196, 384, 16, 24))
BATCH = 32


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser whose `--help` is this tool's documentation."""
    parser = argparse.ArgumentParser(
        "kernel_report.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, choices in (("operators", OPERATORS), ("targets", tuple(TARGETS)), ("dtypes", tuple(DTYPES))):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices, help="Default: all.")
    return parser


def print_kernels(operators: Sequence[str], targets: Sequence[str], dtypes: Sequence[str]) -> bool:
    """One line a kernel, type and machine; returns whether every budget holds."""
    holds = True
    print(f"{'kernel':44s}{'type':10s}{'machine':9s}registers  spills  shared  exp2   fma  widest loads")
    for operator in operators:
        for dtype in dtypes:
            for target in targets:
                for variant in kernels(operator, dtype, target):
                    found = examine(variant, target)
                    loads = ", ".join(f"{name.removesuffix('_ptr')} {bits}" for name, bits in found.widths.items())
                    print(f"{found.name:44s}{dtype:10s}{target:9s}{found.registers:5d}/{found.limit:3d}"
                          f"{found.spills:8d}{found.shared:8d}{found.counts['MUFU']:6d}{found.counts['FFMA']:6d}  "
                          f"{loads}", flush=True)  # fmt: skip
                    for budget in found.broken:
                        print(f"    over budget: {budget}")
                    holds = holds and not found.broken
    return holds


def print_traffic(targets: Sequence[str]) -> bool:
    """The counted bytes of the scans of VMamba and of one with more states; returns whether their budget holds."""
    print("\npredicted, not measured: bytes per element of (b, l, d) of a forward scan along 4 routes, bfloat16, "
          f"{BATCH} samples")  # fmt: skip
    print(f"{'tokens':>7s}{'d':>6s}{'n':>4s}{'r':>4s}  {'machine':8s}materialised{'cached':>14s}{'cold':>15s}"
          f"{'in flight':>12s}{'L2':>6s}  expected, and time on an H100")  # fmt: skip
    holds = True
    for tokens, channels, states, rank in SHAPES:
        for target in targets:
            found, machine = traffic(BATCH, 4, channels, states, rank, tokens, target), MACHINES[target]
            cached, cold = (f"{x:.1f} = {x / found.materialised:.2f}x" for x in (found.cached, found.cold))
            time = f", {found.picoseconds:.1f} ps, bound by {found.bound}" if target == "sm_90" else ""
            print(f"{tokens:7d}{channels:6d}{states:4d}{rank:4d}  {machine.name:8s}{found.materialised:12.1f}"
                  f"{cached:>14s}{cold:>15s}{found.in_flight / 2**20:8.0f} MiB{machine.cache / 2**20:6.0f}  "
                  f"{'cached' if found.fits else 'cold'}{time}")  # fmt: skip
            holds = holds and found.cold <= RATIO_LIMIT * found.materialised
    return holds


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report and returns the exit status."""
    args = build_parser().parse_args(argv)
    holds = []

    def report() -> None:
        holds.append(print_kernels(args.operators, args.targets, args.dtypes))
        if "selective_scan" in args.operators:
            holds.append(print_traffic(args.targets))

    return run_command(report) or int(not all(holds))


if __name__ == "__main__":
    sys.exit(main())
