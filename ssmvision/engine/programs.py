"""Models as programs that run without this package: torch.export's `.pt2` and ONNX, each checked against the model."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ssmvision.data import UserError
from ssmvision.ops import lowered_for_export

from .models import image_size, load_trained

TOLERANCE = 1e-4


class ExportError(UserError):
    """A model cannot be exported as it was asked for, or what was exported computes something else."""


def export_programs(args: Namespace) -> dict[str, float]:
    """Exports as `tools/export.py --help` describes.

    Returns:
        For each file written the largest difference of its output from the model's.

    Raises:
        ExportError: When that is more than `TOLERANCE`; the file stays, so that it can be looked at.
    """
    formats = args.format or ["onnx"]
    if "onnx" in formats:
        _require_onnx()
    model = load_trained(args)[0].eval()
    samples = _samples(model, args)
    program = export_program(model, samples[0], args.dynamic_size)
    target = Path(args.output or args.model or "model")
    target = target if args.output else Path(target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in formats:
        path = target.with_name(f"{target.name}.{name}")
        run = write_pt2(program, path) if name == "pt2" else write_onnx(program, path)
        found[str(path)] = max(difference(model, run, x) for x in samples)
        shapes = " and ".join(" x ".join(map(str, x.shape)) for x in samples)
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, max abs difference {found[str(path)]:.1e} at {shapes}")
    wrong = [f"{path} is off by {error:.1e}" for path, error in found.items() if not error <= TOLERANCE]
    if wrong:
        raise ExportError(f"{', '.join(wrong)}, more than {TOLERANCE:.0e}: do not use it.")
    return found


def export_program(model: nn.Module, example: Tensor, dynamic_size: bool = False) -> ExportedProgram:
    """The model as one graph of standard operators, for any batch.

    Args:
        model: In evaluation mode.
        example: Images (b, c, h, w) or clips (b, c, t, h, w), with b > 1.
        dynamic_size: Leave height and width open too.

    Raises:
        ExportError: When the architecture does not allow that.
    """
    axes = [0, example.ndim - 2, example.ndim - 1] if dynamic_size else [0]
    try:
        with torch.no_grad(), lowered_for_export():
            return torch.export.export(model, (example,), dynamic_shapes=(dict.fromkeys(axes, Dim.DYNAMIC),))
    except (RuntimeError, ValueError, torch._dynamo.exc.UserError) as error:
        reason = str(error).strip().splitlines()[0]
        advice = "try without --dynamic-size" if dynamic_size else "please report it"
        raise ExportError(f"{type(model).__name__} cannot be exported: {reason}; {advice}.") from error


def write_pt2(program: ExportedProgram, path: str | Path) -> Callable[[Tensor], Tensor]:
    """Writes a `.pt2` file, which `torch.export.load` reads, and returns what it computes."""
    torch.export.save(program, str(path))
    return torch.export.load(str(path)).module()


def write_onnx(program: ExportedProgram, path: str | Path) -> Callable[[Tensor], Tensor]:
    """Writes an ONNX file with input "images" and output "logits", and returns what onnxruntime computes with it."""
    _require_onnx()
    import onnxruntime

    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with torch.no_grad():
        graph = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    assert graph is not None
    graph.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@torch.no_grad()
def difference(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Largest absolute difference of a program's output from the model's; infinite where it cannot run."""
    wanted = model(x)
    try:
        found = run(x)
    except Exception as error:  # of torch or onnxruntime, each with classes of its own
        raise ExportError(f"The exported program does not run on {tuple(x.shape)}: {str(error).strip()}") from error
    if found.shape != wanted.shape:
        raise ExportError(f"The exported program gives {tuple(found.shape)} in place of {tuple(wanted.shape)}.")
    return (found - wanted).abs().max().item()


def _samples(model: Any, args: Namespace) -> list[Tensor]:
    """What the program is traced with, and another batch, with open sizes also of other sides; both are compared.

    Traced above the model's own size: a graph that is traced where a map is one window wide holds for no wider one.
    """
    channels, *cfg = model.pretrained_cfg["input_size"]
    channels, sides = args.in_chans or channels, image_size(args) or tuple(cfg)
    sides = (sides, sides) if isinstance(sides, int) else sides
    frames = (args.num_frames,) if args.num_frames else ()
    generator = torch.Generator().manual_seed(0)

    def images(batch: int, rows: int, columns: int) -> Tensor:
        return torch.randn(batch, channels, *frames, rows, columns, generator=generator)

    height, width = sides
    if not args.dynamic_size:
        return [images(2, height, width), images(3, height, width)]
    return [images(2, height + 64, width + 32), images(1, height + 32, width + 96)]


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}: pip install 'ssmvision[export]'.")
