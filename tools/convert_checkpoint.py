"""Convert an official training checkpoint into timm-format safetensors, every key accounted for.

python tools/convert_checkpoint.py vmamba_tiny_s1l8 vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba_tiny.safetensors
python tools/convert_checkpoint.py --inspect vssm1_tiny_0230s_ckpt_epoch_264.pth
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ssmvision import create_model
from ssmvision.hub import CheckpointError, file_sha256, load_state_dict, read_checkpoint
from ssmvision.models._builder import fitting_state_dict
from ssmvision.models._networks import is_network, licence_of

_SHOWN_TENSORS = 12


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("model", metavar="MODEL_NAME", nargs="?", help="architecture that the checkpoint is for")
    parser.add_argument("source", metavar="IN", help="official checkpoint: of torch, safetensors or flax")
    parser.add_argument("target", metavar="OUT", nargs="?", help="safetensors file to write")
    parser.add_argument("--use", choices=["model", "model_ema"], help="default: the averaged weights if there are any")
    parser.add_argument("--num-classes", type=int, help="classes of the checkpoint's head, if not the default number")
    parser.add_argument("--inspect", action="store_true", help="print what IN holds and stop")
    args = parser.parse_args(argv)
    if not args.inspect and not args.target:
        parser.error("MODEL_NAME, IN and OUT are needed (or --inspect IN)")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; bad input ends in one sentence and status 2."""
    args = parse_args(argv)
    try:
        return inspect(args.source) if args.inspect else convert(args)
    except (RuntimeError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def convert(args: argparse.Namespace) -> int:
    """Convert `args.source` for `args.model` and write `args.target`."""
    target = Path(args.target)
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target} must end in .safetensors.")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is not a folder.")
    # On the meta device: only the names and shapes of the model are needed.
    model = create_model(args.model, num_classes=args.num_classes, device="meta")
    weights = fitting_state_dict(model, args.source, use=args.use)
    metadata = {"format": "pt", "architecture": args.model, "source_sha256": file_sha256(args.source)}
    write(weights, target, metadata)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{target}: {len(weights)} tensors, {parameters / 1e6:.2f} M parameters, all keys match {args.model}")
    print(f"sha256 {file_sha256(target)}")
    if is_network(args.model) and (licence := licence_of(args.model)):
        print(f"licence of the official weights: {licence}")
    return 0


def write(weights: Mapping[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
    """Write safetensors beside the target and rename, so that no half file ever carries its name."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.incomplete")
    try:
        # safetensors refuses tensors that share memory, as slices of one official tensor do.
        separate = {key: value.detach().clone().contiguous() for key, value in weights.items()}
        safetensors.torch.save_file(separate, partial, metadata)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def inspect(source: str) -> int:
    """Print what a checkpoint holds."""
    checkpoint = read_checkpoint(source)
    if isinstance(checkpoint, Mapping) and not all(isinstance(value, Tensor) for value in checkpoint.values()):
        for key, value in checkpoint.items():
            print(f"{key}: {_describe(value)}")
    weights = load_state_dict(source)
    print(f"weights: {_describe(weights)}")
    for key in list(weights)[:_SHOWN_TENSORS]:
        print(f"  {key} {tuple(weights[key].shape)} {str(weights[key].dtype).removeprefix('torch.')}")
    if len(weights) > _SHOWN_TENSORS:
        print("  ...")
    return 0


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        tensors = [entry for entry in value.values() if isinstance(entry, Tensor)]
        numbers = sum(tensor.numel() for tensor in tensors)
        return f"{len(value)} entries, {len(tensors)} of them tensors with {numbers / 1e6:.2f} M numbers"
    return repr(value)[:100]


if __name__ == "__main__":
    sys.exit(main())
