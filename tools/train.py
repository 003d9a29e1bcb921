#!/usr/bin/env python
"""Train or fine-tune an image classifier."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from timm.utils import ParseKwargs

from ssmvision.engine import parse_with_config, run_command, train

WORKERS = min(4, os.cpu_count() or 1)

EPILOG = """
examples:
  train on a folder with train/ and val/, one class folder for each class in them
    python tools/train.py --data-dir imagenette2-160 --model vmamba_tiny_s1l8 --img-size 160 --amp --amp-dtype bfloat16

  fine-tune published weights at a lower rate, deeper layers faster than early ones
    python tools/train.py --data-dir flowers --model vmamba_tiny_s1l8 --pretrained --lr 2e-4 --layer-decay 0.75

  repeat a recipe, changing one value
    python tools/train.py --config configs/image/quickstart.yaml --data-dir fashion_mnist --epochs 5

  continue after any interruption, exactly where the last checkpoint was saved
    python tools/train.py --config configs/image/quickstart.yaml --data-dir fashion_mnist --resume auto

  four GPUs; --batch-size is per process
    torchrun --nproc-per-node 4 tools/train.py --data-dir imagenet --model vmamba_tiny_s1l8 --amp --workers 8

The folder OUTPUT/EXPERIMENT then holds args.yaml, results.csv, curves.png, predictions.png, last.pth, model_best.pth,
a TensorBoard log, and export/, which create_model("local-dir:OUTPUT/EXPERIMENT/export", pretrained=True) loads.
"""


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser whose `--help` is this tool's documentation."""
    parser = argparse.ArgumentParser(
        "train.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Recipe: the flags below as keys. Flags override it.")
    _add_data(parser.add_argument_group("data", "What is read, and what happens when some of it is broken."))
    _add_model(parser.add_argument_group("model", "Which network, and the weights it starts from."))
    _add_optimization(parser.add_argument_group("optimization", "How long, how fast, by which rule."))
    _add_regularization(parser.add_argument_group("regularization", "What keeps the network from learning by heart."))
    _add_augmentation(parser.add_argument_group("augmentation", "How training images are varied (timm's transforms)."))
    _add_machine(parser.add_argument_group("machine", "What makes the run fast on the hardware at hand."))
    _add_run(parser.add_argument_group("run", "Where results go, and how a run is repeated or continued."))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--data-dir", metavar="DIR", default="", help="Folder with train/ and val/ (or validation/).")
    group.add_argument(
        "--dataset", metavar="NAME", default="", help="A data set by timm's name instead, such as torch/cifar10."
    )
    _add_switch(group, "--dataset-download", "Let the data set download itself into --data-dir.")
    group.add_argument("--num-classes", type=int, metavar="N", help="Number of classes. Default: as the data has.")
    group.add_argument(
        "--on-bad-sample",
        choices=("stop", "skip"),
        default="stop",
        help="Every image is decoded before training. Unreadable ones stop the run with a list of them, or are left "
        "out and counted. Default: %(default)s.",
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="NAME", default="vmamba_tiny_s1l8", help="Name. Default: %(default)s.")
    _add_switch(group, "--pretrained", "Start from the published weights of the model.")
    group.add_argument("--checkpoint", metavar="FILE", help="Start from the weights in a file.")
    group.add_argument("--in-chans", type=int, metavar="N", help="Image channels: 1, 3 or 4. Default: the model's.")
    group.add_argument("--img-size", type=int, metavar="PIXELS", help="Side of square inputs. Default: the model's.")
    group.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="Channels, height and width.")
    group.add_argument("--crop-pct", type=float, metavar="X", help="Part of a validation image that is looked at.")
    group.add_argument("--mean", type=float, nargs="+", metavar="X", help="Mean for normalization. Default: model's.")
    group.add_argument("--std", type=float, nargs="+", metavar="X", help="Deviation for it. Default: the model's.")
    group.add_argument("--interpolation", metavar="NAME", help="Resampling: bilinear, bicubic. Default: the model's.")
    group.add_argument(
        "--model-kwargs", nargs="*", action=ParseKwargs, default={}, metavar="KEY=VALUE", help="Constructor arguments."
    )


def _add_optimization(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-b", "--batch-size", type=int, default=64, metavar="N", help="Images per process and step.")
    group.add_argument("--grad-accum-steps", type=int, default=1, metavar="N", help="Batches in one update.")
    group.add_argument("--epochs", type=int, default=100, metavar="N", help="Passes over the data.")
    group.add_argument("--opt", default="adamw", metavar="NAME", help="Any optimizer of timm. Default: %(default)s.")
    group.add_argument("--lr", type=float, default=1e-3, metavar="X", help="Peak learning rate. Default: %(default)s.")
    group.add_argument("--weight-decay", type=float, default=0.05, metavar="X", help="Default: %(default)s.")
    group.add_argument("--momentum", type=float, default=0.9, metavar="X", help="Where the optimizer has one.")
    group.add_argument("--layer-decay", type=float, metavar="X", help="Factor on the rate of each earlier layer.")
    group.add_argument("--sched", default="cosine", metavar="NAME", help="Any schedule of timm. Default: %(default)s.")
    group.add_argument("--warmup-epochs", type=float, default=5, metavar="N", help="Epochs of rising rate.")
    group.add_argument("--warmup-lr", type=float, default=1e-6, metavar="X", help="Rate that warm-up starts from.")
    group.add_argument("--min-lr", type=float, default=1e-6, metavar="X", help="Rate that the schedule ends at.")
    group.add_argument("--clip-grad", type=float, metavar="X", help="Clip gradients at this value. Default: no.")
    group.add_argument("--clip-mode", choices=("norm", "value", "agc"), default="norm", help="What --clip-grad limits.")


def _add_regularization(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--drop", type=float, default=0.0, metavar="X", help="Dropout before the classifier.")
    group.add_argument("--drop-path", type=float, metavar="X", help="Stochastic depth. Default: the model's.")
    group.add_argument("--smoothing", type=float, default=0.1, metavar="X", help="Label smoothing. Default 0.1.")
    group.add_argument("--mixup", type=float, default=0.0, metavar="X", help="Mixup alpha; 0 is off.")
    group.add_argument("--cutmix", type=float, default=0.0, metavar="X", help="CutMix alpha; 0 is off.")
    _add_switch(group, "--model-ema", "Average the weights over steps; the average is validated and exported.")
    group.add_argument("--model-ema-decay", type=float, default=0.9998, metavar="X", help="Weight of the past.")


def _add_augmentation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--train-crop-mode",
        choices=("rrc", "rkrc", "rkrr"),
        default="rrc",
        help="rrc: random resized crop; rkrc, rkrr: keep the aspect, crop at the centre or at random.",
    )
    group.add_argument("--scale", type=float, nargs=2, metavar=("MIN", "MAX"), help="Area of the random crop.")
    group.add_argument("--ratio", type=float, nargs=2, metavar=("MIN", "MAX"), help="Aspect ratio of the random crop.")
    group.add_argument("--hflip", type=float, default=0.5, metavar="P", help="Horizontal flip probability.")
    group.add_argument("--vflip", type=float, default=0.0, metavar="P", help="Vertical flip probability.")
    group.add_argument("--color-jitter", type=float, default=0.4, metavar="X", help="Brightness, contrast, saturation.")
    group.add_argument("--aa", metavar="POLICY", help="AutoAugment policy, such as rand-m9-mstd0.5-inc1.")
    group.add_argument("--reprob", type=float, default=0.0, metavar="P", help="Random erasing probability.")
    group.add_argument("--remode", choices=("const", "rand", "pixel"), default="pixel", help="What erasing leaves.")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", metavar="NAME", help="cuda, cpu or mps. Default: cuda where there is one.")
    group.add_argument(
        "--workers", type=int, default=WORKERS, metavar="N", help="Reading processes. Default: %(default)s."
    )
    _add_switch(group, "--amp", "Mixed precision.")
    group.add_argument("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="Its lower precision.")
    _add_switch(group, "--channels-last", "Channels-last memory order, faster for convolutions on GPUs.")
    _add_switch(group, "--grad-checkpointing", "Compute activations twice to save memory.")
    _add_switch(group, "--torchcompile", "Compile the model with torch.compile.")


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output", default="output/train", metavar="DIR", help="Folder of runs. Default: %(default)s.")
    group.add_argument("--experiment", metavar="NAME", help="Folder of this run in it. Default: the model's name.")
    group.add_argument("--seed", type=int, default=42, metavar="N", help="Same seed, same run. Default: %(default)s.")
    group.add_argument("--resume", metavar="auto|FILE", help="Continue the run in the output folder, or this file.")
    group.add_argument("--checkpoint-interval-steps", type=int, metavar="N", help="Save also every N updates.")
    group.add_argument(
        "--eval-metric", choices=("top1", "top5", "loss"), default="top1", help="What the best epoch is best at."
    )


def _add_switch(group: argparse._ArgumentGroup, flag: str, text: str) -> None:
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=False, help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code."""
    return run_command(lambda: train(parse_with_config(build_parser(), argv)))


if __name__ == "__main__":
    sys.exit(main())
