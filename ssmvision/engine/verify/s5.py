"""S5, its classifier and its stack with resets, against the official JAX code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ssmvision.engine.verify.case import Case
from ssmvision.engine.verify.modules import Check, Tensors, check_module, gradients, load_strictly, renamed
from ssmvision.layers.s5 import S5, S5Classifier, S5Encoder, s5_from_flax

__all__ = ["CHECKS"]

_NAMES = {"H": "dim", "d_model": "dim", "ssm_size": "d_state", "n_layers": "depth", "d_input": "in_chans",
          "d_output": "num_classes", "mode": "pool", "p_dropout": "dropout"}  # fmt: skip


def _s5(case: Case) -> tuple[Tensors, Tensors]:
    if "Classification" in case.official_class:
        return _classifier(case)
    layer = S5(**renamed(case.kwargs, _NAMES))
    found, wanted = {}, {}
    for name in ("Lambda_re", "Lambda_im"):
        if f"init.{name}" in case.tensors:
            found[f"output.init.{name}"] = layer.get_parameter(name).detach().clone()
            wanted[f"output.init.{name}"] = case.tensors[f"init.{name}"]
    ours, theirs = check_module(case, layer)
    found, wanted = found | ours, wanted | theirs
    for name, system in zip(("Lambda_bar", "B_bar"), layer.discrete(), strict=True):
        if name in case.tensors:
            found[f"feat.{name}"], wanted[f"feat.{name}"] = torch.view_as_real(system.detach()), case.tensors[name]
    for name in [name for name in case.tensors if name.startswith("output.step_rescale_")]:
        layer.step_rescale = float(name.removeprefix("output.step_rescale_"))
        found[name], wanted[name] = layer(case.tensors["input"]).detach(), case.tensors[name]
    return found, wanted


def _classifier(case: Case) -> tuple[Tensors, Tensors]:
    kwargs = dict(case.kwargs)
    kwargs.pop("padded", None)
    kwargs["norm"] = "batch" if kwargs.pop("batchnorm", False) else "layer"
    for name in ("training", "dropout", "p_dropout", "bn_momentum"):
        kwargs.pop(name, None)
    module = S5Classifier(**renamed(kwargs, _NAMES))
    return _flax_module(case, module, lengths=case.tensors.get("lengths"))


def _resets(case: Case) -> tuple[Tensors, Tensors]:
    module = S5Encoder(**renamed(case.kwargs, _NAMES))
    load_strictly(module.eval(), s5_from_flax(case.weights))
    x = case.tensors["input"].clone().requires_grad_()
    states = [torch.view_as_complex(case.tensors[f"h0.{i}"][0]) for i in range(len(module.layers))]
    found: Tensors = {}
    for suffix, reset in (("_no_reset", None), ("", case.tensors["resets"].T.bool())):
        y, last = module.run(x.transpose(0, 1), states, reset)
        found[f"output{suffix}"] = y.transpose(0, 1)
        found |= {f"output.hN{suffix}.{i}": torch.view_as_real(h)[None] for i, h in enumerate(last)}
    found["output"].pow(2).mean().backward()
    found = {name: t.detach() for name, t in found.items()} | gradients(module, x)
    wanted = {f"output.{name}": t for name, t in case.tensors.items() if name.startswith("hN")}
    wanted |= {name: t for name, t in case.tensors.items() if name in ("output", "output_no_reset", "grad_input")}
    return found, wanted | _official_gradients(case)


def _flax_module(case: Case, module: nn.Module, **inputs: Any) -> tuple[Tensors, Tensors]:
    """As `check_module`, for weights and gradients by flax paths."""
    case = Case(case.name, case.meta, s5_from_flax(case.weights), case.tensors)
    found, wanted = check_module(case, module, **inputs)
    wanted = {name: t for name, t in wanted.items() if not name.startswith("grad.")}
    return found, wanted | _official_gradients(case)


def _official_gradients(case: Case) -> dict[str, Tensor]:
    gradients = {name.removeprefix("grad."): t for name, t in case.tensors.items() if name.startswith("grad.")}
    return {f"grad.{name}": t for name, t in s5_from_flax(gradients).items()}


CHECKS: dict[str, Check] = {
    "s5": Check(_s5, r"input|lengths|init\.(B|C\d?|D|log_step)"),
    "s5resetsincontextrl": Check(_resets, r"input|resets|h0\.\d+"),
}
