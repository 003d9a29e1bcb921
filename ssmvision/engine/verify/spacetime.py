"""SpaceTime's state space models against the official ones."""

from __future__ import annotations

from typing import Any

import torch

from ssmvision.engine.verify.case import Case
from ssmvision.engine.verify.modules import Check, Tensors, gradients, kind_of, load_strictly, renamed, within
from ssmvision.layers.spacetime import (
    ClosedLoopSSM,
    CompanionSSM,
    FixedKernelSSM,
    ShiftSSM,
    differencing_kernels,
    moving_average_residual_kernels,
)

__all__ = ["CHECKS"]


def _spacetime(case: Case) -> tuple[Tensors, Tensors]:
    kwargs = _kwargs(case)
    horizon = kwargs.pop("horizon", 0)
    found: Tensors = {}
    for part, make in (("companion", CompanionSSM), ("shift", ShiftSSM)):
        if part in _parts(case):
            found |= _under(part, _companion(make(**kwargs), within(part, case.weights), within(part, case.tensors)))
    if "closed_loop" in _parts(case):
        # It has one kernel a channel, or as many as its weights say.
        heads = {"n_kernels": len(case.weights["closed_loop.a"]), "n_heads": 1, "head_dim": 1}
        found |= _closed_loop(ClosedLoopSSM(**{**kwargs, **heads}), case, horizon)
    if "companion.input" in case.tensors:
        found |= _fixed(case, kwargs["dim"], kwargs["n_kernels"])
    found = {name: x.detach() for name, x in found.items() if name in case.tensors}
    wanted = {name: x for name, x in case.tensors.items() if not name.endswith(".input")}
    return _kinds(found), _kinds(wanted)


def _kwargs(case: Case) -> dict[str, Any]:
    """Our arguments; those that initialize, and what is trained, change nothing here."""
    without = ("kernel_init", "kernel_train", "seed")
    official = {name: value for name, value in case.kwargs.items() if name not in without}
    kwargs = renamed(official, {"model_dim": "dim", "kernel_dim": "d_state"})
    if repeat := kwargs.pop("kernel_repeat", None):  # official channels are (repeat kernel head channel)
        channels = repeat * kwargs["n_kernels"] * kwargs["n_heads"] * kwargs["head_dim"]
        if channels != kwargs["dim"]:
            raise ValueError(f"kernel_repeat={repeat} makes {channels} channels, not model_dim={kwargs['dim']}")
    return kwargs


def _parts(case: Case) -> set[str]:
    return {name.partition(".")[0] for name in case.weights}


def _under(part: str, tensors: Tensors) -> Tensors:
    return {f"{part}.{name}": x for name, x in tensors.items()}


def _kinds(tensors: Tensors) -> Tensors:
    return {f"{kind_of(name.partition('.')[2])}.{name}": x for name, x in tensors.items()}


def _companion(layer: CompanionSSM, weights: Tensors, tensors: Tensors) -> Tensors:
    load_strictly(layer, weights)
    u = tensors["input"].clone().requires_grad_()
    y = layer(u)
    y.pow(2).mean().backward()
    kernel = layer.kernel(u.shape[1])
    found = {"output": y, "kernel": kernel, "kernel_f64": kernel, "A": layer.matrix()}
    return found | {"a_normed": layer.normalized(layer.a)} | gradients(layer, u)


def _closed_loop(layer: ClosedLoopSSM, case: Case, horizon: int) -> Tensors:
    load_strictly(layer, within("closed_loop", case.weights))
    u = case.tensors["closed_loop.input"].clone().requires_grad_()
    y, inputs = layer.forecast(u, horizon)
    y.pow(2).mean().backward()
    found = _under("closed_loop", {"output": y, "output_u": inputs} | gradients(layer, u))
    return found | dict(zip(("open_loop.output", "open_loop.output_u"), layer.open_loop(u), strict=True))


def _fixed(case: Case, dim: int, n_kernels: int) -> Tensors:
    found: Tensors = {}
    u = case.tensors["companion.input"]
    if (wanted := case.tensors.get("differencing.kernel")) is not None:
        kernels = differencing_kernels(n_kernels, wanted.shape[-1])
        found |= {"differencing.kernel": kernels, "differencing.output": FixedKernelSSM(dim, kernels)(u)}
    if (wanted := case.tensors.get("residual.ma_r_kernel")) is not None:
        # The official code draws the windows at random.
        averages = moving_average_residual_kernels((wanted != 0).sum(-1).tolist(), wanted.shape[-1])
        order = case.tensors["residual.diff_kernel"].shape[-1]
        differences = differencing_kernels(n_kernels, order)
        found |= {"residual.diff_kernel": differences, "residual.ma_r_kernel": averages}
        padded = torch.nn.functional.pad(differences, (0, averages.shape[-1] - order))
        both = torch.stack([padded.unflatten(0, (-1, order)), averages.unflatten(0, (-1, order))], 1).flatten(0, 2)
        found["residual.output"] = FixedKernelSSM(dim, both)(u)
    return found


CHECKS: dict[str, Check] = {"spacetime": Check(_spacetime, r".*\.input")}
