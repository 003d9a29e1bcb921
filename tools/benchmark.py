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
from ssmvision.engine.benchmark import Bar, layers, operators, segmenters, video
from ssmvision.ops import backend_info

EPILOG = """
examples:
  the scan operator at the shapes of real models, against the sequential PyTorch scan
    python tools/benchmark.py ops

  S4D beside its FFT, S5 beside a copy in memory, recurrent layers with and without resets
    python tools/benchmark.py layers

  our models beside timm's at 224 x 224 and 1024 x 1024, batch 1
    python tools/benchmark.py models

  any models, side by side in one run; the first is the yardstick
    python tools/benchmark.py models --models swin_tiny_patch4_window7_224 vmamba_tiny_s1l8 --img-size 384 --train

  ConvS5 beside ConvLSTM and Transformers: steps of training, generation, packed clips
    python tools/benchmark.py convs5 --threads 2

  U-Mamba beside its twins without an SSM: time of a forward pass, memory of a training step
    python tools/benchmark.py segmenters

Everything that is compared runs in turn in one process. Times are lower quartiles. Read the ratios: absolute
times belong to the machine named in the first line. "met" and "NOT met" judge a figure against the bar set for it.
"""

# (yardstick, ours, image size, forward and backward?)
PAIRS = (
    ("swin_tiny_patch4_window7_224", "vmamba_tiny_s1l8", 224, False),
    ("swin_tiny_patch4_window7_224", "vmamba_tiny_s1l8", 224, True),
    ("vit_tiny_patch16_224", "vim_tiny_patch16_224", 224, False),
    ("vit_tiny_patch16_224", "vim_tiny_patch16_224", 1024, False),
)
MODEL_BARS = {
    ("vmamba_tiny_s1l8", 224, False, "time ratio"): Bar(1.15, at_least=False),
    ("vmamba_tiny_s1l8", 224, False, "scan share"): Bar(0.1, at_least=False),
    ("vmamba_tiny_s1l8", 224, True, "time ratio"): Bar(1.3, at_least=False),
}
SEGMENTER_BARS = {
    "umamba_bot_3d": {"time ratio": Bar(1.1, at_least=False)},
    "umamba_enc_3d": {"time ratio": Bar(1.6, at_least=False), "memory ratio": Bar(1.3, at_least=False)},
}


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser whose `--help` is this tool's documentation."""
    parser = argparse.ArgumentParser(
        "benchmark.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what",
        choices=("ops", "layers", "models", "convs5", "segmenters"),
        help="Scans, layers, models, video, or U-Mamba.",
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads (default: 1).")
    parser.add_argument(
        "--repeats", type=int, default=0, metavar="N", help="Timed runs (default: 30 ops, 7 models, else 10)."
    )
    parser.add_argument("--shapes", nargs="+", choices=tuple(benchmark.OPS), metavar="NAME", help="Scans to measure.")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="Models to compare, ours or timm's.")
    parser.add_argument("--img-size", type=int, default=224, metavar="PX", help="Side of the image for --models.")
    parser.add_argument("--volume", nargs=3, type=int, metavar="PX", help="Size of both volumes of segmenters.")
    parser.add_argument("--train", action="store_true", help="Forward and backward instead of forward, for --models.")
    return parser


def print_figure(name: str, value: float, bar: Bar | None = None, unit: str = "") -> None:
    """One figure, and whether it meets its bar."""
    print(f"  {name:29s} {value:10.3g}{unit:4s}" + (f"   {bar.judge(value)}" if bar else ""), flush=True)


def print_scan(name: str, repeats: int, bandwidth: float) -> None:
    """Errors first, then times, ratios and fractions of the limits."""
    shape = benchmark.OPS[name]
    found = benchmark.measure_op(shape, repeats)
    seconds = 1e-3 * found["forward"]
    found["of bandwidth limit"] = shape.bytes / seconds / bandwidth
    bars = operators.bars(shape)
    print(f"selective_scan, {name}: batch {shape.batch}, routes {shape.routes}, d {shape.channels}, n {shape.states}, "
          f"l {shape.tokens}")  # fmt: skip
    for figure, value in found.items():
        milliseconds = figure.split()[-1] in ("forward", "backward", "train") and "/" not in figure
        print_figure(figure, value, bars.get(figure), " ms" if milliseconds else "")


def print_ops(names: Sequence[str], repeats: int) -> None:
    """The machine's limits, every selective scan, and, if no shapes were chosen, all that is measured once."""
    exp, bandwidth = benchmark.exp_limit(), benchmark.bandwidth_limit()
    print(f"limits of one core: {exp / 1e9:.2f} G exponentials/s (the kernels' 2^x in L1), "
          f"{bandwidth / 1e9:.1f} GB/s (copy in memory)\n")  # fmt: skip
    for name in names or benchmark.OPS:
        print_scan(name, repeats, bandwidth)
        print()
    if names:
        return
    for operator, found in benchmark.measure_layers(repeats).items():
        print(f"{operator}: {found['ours']:.3g} ms, PyTorch {found['PyTorch']:.3g} ms = "
              f"{found['PyTorch'] / found['ours']:.1f}x; "
              f"{found['bytes'] / (1e-3 * found['ours']) / bandwidth:.2f} of bandwidth limit")  # fmt: skip
        if "share" in found:
            print_figure("share of the layer", found["share"], Bar(0.05, at_least=False))
    for package, times in benchmark.measure_others(benchmark.OPS["Vim-T"], max(2, repeats // 10)).items():
        if times is None:
            print(f'{package}: not installed, skipped (pip install "ssmvision[benchmark]")')
        else:
            print(f"{package} at Vim-T: {times[1]:.3g} ms, ours {times[0]:.3g} ms = {times[1] / times[0]:.0f}x")
    print_figure("time at l 32768 / 4096", benchmark.time_growth(max(2, repeats // 3)), Bar(8 * 1.15, at_least=False))
    print_processes()


def print_layers(repeats: int) -> None:
    """S4D and S5 beside what bounds them, then what resets cost each recurrent layer."""
    for title, measure in (
        ("S4D (b 8, d 256, l 4096, 32 conjugate pairs)", layers.s4d),
        ("S5 (b 4, l 4096, d 256, 128 conjugate pairs)", layers.s5),
    ):
        print(title)
        for figure, value in measure(repeats).items():
            print_figure(figure, value, layers.BARS.get(figure), "" if "/" in figure else " ms")
        print()
    print("forward pass over packed clips by that without resets")
    for name, ratio in layers.packed(repeats).items():
        print_figure(name, ratio, layers.BARS["with / without resets"])


def print_processes() -> None:
    """What is measured in processes of its own."""
    if backend_info()["cpu"]["detail"] == "avx512":
        ratio = benchmark.instruction_set_ratio("avx2", "avx512", "Vim-T")
        if ratio is not None:
            print_figure("AVX2 / AVX-512 at Vim-T", ratio, Bar(1.7, at_least=False))
    memory, short = benchmark.training_memory(32768), benchmark.training_memory(4096)
    if memory is not None and short is not None:
        print_figure("volume, train memory", memory, Bar(80, at_least=False), " MiB")
        print_figure("memory at l 32768 / 4096", memory / short, Bar(8 * 1.15, at_least=False))


def print_pair(yardstick: str, ours: str, size: int, train: bool, repeats: int) -> None:
    """Time, ratio, and for forward passes the scan's share and both peaks of memory."""
    models = {name: benchmark.build(name, size, train) for name in (yardstick, ours)}
    calls = {name: benchmark.model_call(model, image, train) for name, (model, image) in models.items()}
    times = benchmark.interleaved(calls, repeats if size <= 384 else max(2, repeats // 3))
    kind = "forward + backward" if train else "forward"
    line = f"{ours} {kind} at {size}: {times[ours]:.0f} ms, {yardstick} {times[yardstick]:.0f} ms"
    ratio = times[ours] / times[yardstick]
    line += f", ratio {ratio:.2f}" if ratio > 0.5 else f", {1 / ratio:.1f}x faster"
    share = None if train else benchmark.scan_share(*models[ours])
    if share is not None:
        line += f"; scan share {100 * share:.0f} %"
        peaks = {name: benchmark.peak_memory(name, size) for name in (ours, yardstick)}
        if all(peaks.values()):
            line += f"; peak memory {peaks[ours]:.0f} MiB, {yardstick} {peaks[yardstick]:.0f} MiB"
    print(line, flush=True)
    for figure, value in (("time ratio", ratio), ("scan share", share)):
        if value is not None and (bar := MODEL_BARS.get((ours, size, train, figure))):
            print_figure(figure, value, bar)


def print_convs5(repeats: int, frames: int = 300, lengths: tuple[int, int] = (50, 1200)) -> None:
    """One table of training, one of generation, and what resets cost and save; of width and depth that are equal."""
    print(f"one step of training on two clips of {frames} frames: the whole model, its sequence model alone")
    trained = video.training(frames, repeats)
    for name, found in trained.items():
        print(f"  {name:24s} {found['ms']:8.0f} ms {found['sequence ms']:8.0f} ms {found['flop'] / 1e9:8.1f} GFLOP "
              f"{found['parameters']:9d} parameters")  # fmt: skip
    for kind, bar in (("ms", None), ("sequence ms", Bar(3))):
        print_figure(f"ConvLSTM / ConvS5, {kind}", trained["ConvLSTM"][kind] / trained["ConvS5"][kind], bar)

    short, long = lengths
    print(f"\na frame of {video.CONSECUTIVE} in a row, after {short} and {long}: milliseconds, and bytes of the state")
    generated, states = video.generation(lengths, repeats), video.state_bytes(lengths)
    for name, ms in generated.items():
        state = states.get(name, {})
        print(f"  {name:40s}" + "".join(f" {ms[at]:8.2f} ms {state.get(at, ''):>8}" for at in lengths))
    for part, bar in (("", None), (", sequence model", Bar(100))):
        ours, uncached = generated[f"ConvS5{part}"], generated[f"Transformer, no cache{part}"]
        print_figure(f"no cache / ConvS5{part}", uncached[long] / ours[long], bar)
    growth = generated["ConvS5"][long] / generated["ConvS5"][short]
    print_figure(f"ConvS5 at {long} / {short}", growth, Bar(1.1, at_least=False))

    print("\na ConvS5 layer of 96 frames, 128 channels and states, 16 x 16")
    print_figure("scan share of ConvS5", layers.scan_share(), layers.BARS["scan share of ConvS5"])
    if (memory := benchmark.convs5_memory()) is not None:
        print_figure("scan, train memory/state", memory, Bar(3, at_least=False))

    print("\nclips of 120 and of 30 frames, one layer forward and backward")
    packed = video.packed_clips(repeats)
    print_figure("with / without resets", packed["resets"], Bar(1.15, at_least=False))
    print_figure("packed / padded clips/s", packed["clips/s"], Bar(1.5))


def print_segmenter(name: str, volume: Sequence[int] | None, repeats: int) -> None:
    """Time of a forward pass and memory of a training step, beside the twin's."""
    size, training_size = volume or segmenters.VOLUME, volume or segmenters.TRAINING_VOLUME
    twin, bars = f"{name}_nossm", SEGMENTER_BARS[name]
    times = segmenters.forward_times((name, twin), size, repeats)
    print(f"{name}: forward at {_cross(size)} {times[name]:.0f} ms, twin {times[twin]:.0f} ms", flush=True)
    print_figure("time ratio", times[name] / times[twin], bars["time ratio"])
    ours, theirs = (segmenters.training_memory(each, training_size) for each in (name, twin))
    if ours is None or theirs is None:
        print("  memory is measured on Linux alone")
        return
    print(f"  training at {_cross(training_size)} {ours:.0f} MiB, twin {theirs:.0f} MiB")
    print_figure("memory ratio", ours / theirs, bars.get("memory ratio"))


def _cross(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks and prints them; returns the exit status."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    print(benchmark.hardware() + "\n", flush=True)
    if args.what == "ops":
        print_ops(args.shapes or (), args.repeats or 30)
        return 0
    if args.what == "layers":
        print_layers(args.repeats or 10)
        return 0
    if args.what == "convs5":
        print_convs5(args.repeats or 10)
        return 0
    if args.what == "segmenters":
        for name in SEGMENTER_BARS:
            print_segmenter(name, args.volume, args.repeats or 5)
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
