#!/usr/bin/env python
"""Measure speed and memory side by side: scans against their sequential reference, models against timm's."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler reports a missing GPU as an error

import torch

from ssmvision.engine import benchmark

EPILOG = """
examples:
  the scan operator at the shapes of real models, against the sequential PyTorch scan
    python tools/benchmark.py ops

  our models beside timm's at 224 x 224 and 1024 x 1024, batch 1
    python tools/benchmark.py models

  any models, side by side in one run; the first is the yardstick
    python tools/benchmark.py models --models swin_tiny_patch4_window7_224 vmamba_tiny_s1l8 --img-size 384 --train

Everything that is compared runs in turn in one process. Read the ratios: absolute times belong to the machine named in
the first line.
"""

# (yardstick, ours, image size, forward and backward?)
PAIRS = (
    ("swin_tiny_patch4_window7_224", "vmamba_tiny_s1l8", 224, False),
    ("swin_tiny_patch4_window7_224", "vmamba_tiny_s1l8", 224, True),
    ("vit_tiny_patch16_224", "vim_tiny_patch16_224", 224, False),
    ("vit_tiny_patch16_224", "vim_tiny_patch16_224", 1024, False),
)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser whose `--help` is this tool's documentation."""
    parser = argparse.ArgumentParser(
        "benchmark.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("ops", "models"), help="Scan operators, or whole models.")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1).")
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help="Timed runs (default: 30 ops, 7 models).")
    parser.add_argument("--shapes", nargs="+", choices=tuple(benchmark.OPS), metavar="NAME", help="Scans to measure.")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="Models to compare, ours or timm's.")
    parser.add_argument("--img-size", type=int, default=224, metavar="PX", help="Side of the image for --models.")
    parser.add_argument("--train", action="store_true", help="Forward and backward instead of forward, for --models.")
    return parser


def print_ops(names: Sequence[str], repeats: int) -> None:
    """One line a shape: error first, then times and ratios."""
    limit = benchmark.exp_limit()
    print(f"torch.exp on one thread, in cache: {limit / 1e9:.2f} G/s\n")
    for name in names:
        shape = benchmark.OPS[name]
        found = benchmark.measure_op(shape, repeats)
        print(f"{name}: batch {shape.batch}, routes {shape.routes}, d {shape.channels}, n {shape.states}, "
              f"l {shape.tokens}; error {found['error']:.1e}")  # fmt: skip
        for kind in ("forward", "train"):
            line = f"  {kind:8s} {found[kind]:9.2f} ms"
            for slow in ("published form", "our reference"):
                if (time := found.get(f"{kind}, {slow}")) is not None:
                    line += f"   {slow} {time:9.1f} ms = {time / found[kind]:.0f}x"
            print(line)
        rate = shape.elements / (1e-3 * found["forward"])
        print(f"  {rate / 1e9:.2f} G state updates/s = {rate / limit:.2f} of torch.exp's rate")
        if "routes" in found:
            ratio = found["routes"] / found["no routes"]
            print(
                f"  along four routes, merged: {found['routes']:.2f} ms = {ratio:.2f}x the same scans in raster order"
            )
        print(flush=True)


def print_pair(yardstick: str, ours: str, size: int, train: bool, repeats: int) -> None:
    """Time, ratio, and for forward passes the scan's share and both peaks of memory."""
    models = {name: benchmark.build(name, size, train) for name in (yardstick, ours)}
    calls = {name: benchmark.model_call(model, image, train) for name, (model, image) in models.items()}
    times = benchmark.interleaved(calls, repeats if size <= 384 else max(2, repeats // 3))
    kind = "forward + backward" if train else "forward"
    line = f"{ours} {kind} at {size}: {times[ours]:.0f} ms, {yardstick} {times[yardstick]:.0f} ms"
    ratio = times[ours] / times[yardstick]
    line += f", ratio {ratio:.2f}" if ratio > 0.5 else f", {1 / ratio:.1f}x faster"
    if not train:
        line += f"; scan share {100 * benchmark.scan_share(*models[ours]):.0f} %"
        peaks = {name: benchmark.peak_memory(name, size) for name in (ours, yardstick)}
        if all(peaks.values()):
            line += f"; peak memory {peaks[ours]:.0f} MiB, {yardstick} {peaks[yardstick]:.0f} MiB"
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks and prints them; returns the exit status."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    print(benchmark.hardware() + "\n", flush=True)
    if args.what == "ops":
        print_ops(args.shapes or tuple(benchmark.OPS), args.repeats or 30)
        return 0
    pairs = list(PAIRS)
    if args.models:
        yardstick, *others = args.models
        pairs = [(yardstick, name, args.img_size, args.train) for name in others]
    for yardstick, ours, size, train in pairs:
        print_pair(yardstick, ours, size, train, args.repeats or 7)
    return 0


if __name__ == "__main__":
    sys.exit(main())
