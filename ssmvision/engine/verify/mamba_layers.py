"""Layers of the Mamba family against the official ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ssmvision.engine.verify.case import Case
from ssmvision.engine.verify.modules import Check, Tensors, check_module, renamed, within, without_options
from ssmvision.layers import (
    FSCILNeck,
    Hierarchical,
    Hydra,
    Level,
    Mamba,
    Mamba2,
    MambaStack,
    MotionMambaUNet,
    S4Stack,
    SMambaLayer,
)
from ssmvision.layers.fscil import NeckOutput, separation_loss, suppression_loss
from ssmvision.layers.mamba3 import Mamba3State, trapezoidal_scan
from ssmvision.ops import resets_from_seq_idx

__all__ = ["CHECKS"]

# Of official constructors: what only initializes, chooses a kernel, or places the module.
_WITHOUT_EFFECT = {
    "A_init_range", "chunk_size", "conv_init", "device", "dt_init", "dt_init_floor", "dt_max", "dt_min", "dt_scale",
    "dtype", "layer_idx", "process_group", "sequence_parallel", "use_fast_path", "use_mem_eff_path",
}  # fmt: skip
_SILU = {"activation": ("silu", "swish")}
_MAMBA3_ARGUMENTS = {
    "Q": "q", "K": "k", "V": "v", "DT": "dt", "ADT": "a_dt", "Trap": "trap", "Angles": "angles", "Q_bias": "q_bias",
    "K_bias": "k_bias", "D": "D", "Z": "z",
}  # fmt: skip
_MAMBA3_RESULTS = ("out", "final_Angle", "final_SSM", "final_K", "final_V")
_MAMBA3_SIZES = {"D", "H", "Hq", "L", "N", "P", "S", "Z", "b", "init"}


def _arguments(kwargs: dict[str, Any], names: dict[str, str], ignored: Iterable[str] = ()) -> dict[str, Any]:
    """Official arguments under our names, without those that change nothing here."""
    without = _WITHOUT_EFFECT.union(ignored)
    return renamed({name: value for name, value in kwargs.items() if name not in without}, names)


def _under_our_names(case: Case, rename: Callable[[str], str | None]) -> Case:
    """The case with our keys for weights and gradients; keys that become None are known to have no effect."""
    ours = {key: name for key in case.weights if (name := rename(key)) is not None}
    grads = {f"grad.{key}": f"grad.{name}" for key, name in ours.items()}
    return replace(
        case,
        weights={name: case.weights[key] for key, name in ours.items()},
        tensors={grads.get(key, key): x for key, x in case.tensors.items()},
    )


def _packed(case: Case) -> Tensors:
    """Where packed sequences start, if the case has several in a row."""
    return {"reset": resets_from_seq_idx(case.tensors["seq_idx"])} if "seq_idx" in case.tensors else {}


def _mamba1(case: Case) -> tuple[Tensors, Tensors]:
    kwargs = _arguments(case.kwargs, {"d_model": "dim"})
    if kwargs.get("dt_rank") == "auto":
        del kwargs["dt_rank"]
    return check_module(case, Mamba(**kwargs), **_packed(case))


def _mamba2(case: Case) -> tuple[Tensors, Tensors]:
    kwargs = without_options(case.kwargs, _SILU)
    return check_module(case, Mamba2(**_arguments(kwargs, {"d_model": "dim"})), **_packed(case))


def _hydra(case: Case) -> tuple[Tensors, Tensors]:
    kwargs = without_options(case.kwargs, _SILU)
    return check_module(case, Hydra(**_arguments(kwargs, {"d_model": "dim"})))


class _SMamba(nn.Module):
    """The official forecaster around our encoder layers, as far as it is needed to run them."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.use_norm, d = kwargs.get("use_norm", True), kwargs["d_model"]
        activations = {"relu": nn.ReLU, "gelu": nn.GELU}
        if (activation := kwargs.get("activation", "gelu")) not in activations:
            raise ValueError(f"activation must be one of {', '.join(activations)}, not {activation!r}")
        options = {name: kwargs[name] for name in ("d_ff", "d_conv", "expand") if name in kwargs}
        layers = [
            SMambaLayer(d, kwargs["d_state"], act_layer=activations[activation], **options)
            for _ in range(kwargs["e_layers"])
        ]
        self.value_embedding = nn.Linear(kwargs["seq_len"], d)
        self.attn_layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(d)
        self.projector = nn.Linear(d, kwargs["pred_len"])

    def forward(self, x: Tensor, marks: Tensor | None = None) -> Tensor:
        """Series (b, l, variates) and time marks (b, l, m) → forecast (b, pred_len, variates)."""
        series = x
        if self.use_norm:
            x = x - x.mean(1, keepdim=True).detach()
            scale = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
            x = x / scale
        tokens = x if marks is None else torch.cat([x, marks], dim=2)
        tokens = self.attn_layers(self.value_embedding(tokens.transpose(1, 2)))
        y = self.projector(self.norm(tokens)).transpose(1, 2)[..., : x.shape[2]]
        return y * scale + series.mean(1, keepdim=True).detach() if self.use_norm else y


def _smamba(case: Case) -> tuple[Tensors, Tensors]:
    def rename(key: str) -> str | None:
        parts = key.split(".")
        # Modules that the official layer makes and never runs.
        dead = parts[:2] == ["encoder", "attn_layers"] and parts[3] in ("man", "man2", "a")
        return None if dead else key.removeprefix("encoder.").removeprefix("enc_embedding.")

    case.kwargs.ignore(("class_strategy", "dropout", "embed", "freq", "output_attention"))
    model = _SMamba(case.kwargs)
    marks = [case.tensors[name] for name in ("x_mark_enc", "x_mark", "input.1") if name in case.tensors]
    found, wanted = check_module(_under_our_names(case, rename), model, **({"marks": marks[0]} if marks else {}))
    for i, layer in enumerate(model.attn_layers):  # each layer alone, on an input of its own
        if f"layer{i}.input" in case.tensors:
            found[f"feat.layer{i}.output"] = layer(case.tensors[f"layer{i}.input"]).detach()
            wanted[f"feat.layer{i}.output"] = case.tensors[f"layer{i}.output"]
    return found, wanted


def _net(level: dict[str, Any]) -> nn.Module:
    """The sequence model of one level of HiSS."""
    kind = level["type"].removesuffix("Model").removesuffix("Net")
    options = {k: v for k, v in level.items() if k not in ("type", "model_dim", "input_dim", "output_dim", "nlayers")}
    if kind == "Mamba":
        options.pop("dropout", None)  # acts in training alone
        return MambaStack(level["model_dim"], level["nlayers"], **options)
    if kind == "S4":
        return S4Stack(level["model_dim"], level["nlayers"], **options)
    raise ValueError(f"levels of HiSS are Mamba or S4 models here, not {level['type']}")


def _hiss(case: Case) -> tuple[Tensors, Tensors]:
    kwargs = case.kwargs
    low, high, between = kwargs["ll"], kwargs["hl"], kwargs["model_dim"]
    low_level = Level(_net(low), low["model_dim"], kwargs["input_dim"], low["output_dim"])
    high_level = Level(_net(high), high["model_dim"], out_dim=kwargs["output_dim"])
    if low["output_dim"] != between or high["model_dim"] != between:
        raise ValueError(f"the levels must meet in model_dim {between} channels")

    def rename(key: str) -> str | None:
        level, _, rest = key.partition(".")
        if level == "output":
            return f"high_level.decoder.{rest}"
        if level == "pos_encoder":  # a table that only Transformers read
            return None
        projection = rest.startswith(("embed.", "decoder."))
        return key if projection else f"{level}.net.{rest.removeprefix('mamba.')}"

    def linear(tensors: Tensors) -> Tensors:
        """Convolutions of one token are linear maps here."""
        return {key: x.squeeze(2) if key.endswith("output_linear.0.weight") else x for key, x in tensors.items()}

    case = replace(case, weights=linear(case.weights), tensors=linear(case.tensors))
    model = Hierarchical(low_level, high_level, kwargs["freq_ratio"])
    found, wanted = check_module(_under_our_names(case, rename), model)
    if "low_level_last" in case.tensors:
        found["feat.low_level_last"] = model.summarize(case.tensors["input"]).detach().flatten(0, 1)
        wanted["feat.low_level_last"] = case.tensors["low_level_last"]
    return found, wanted


def _fscil(case: Case) -> tuple[Tensors, Tensors]:
    def rename(key: str) -> str | None:
        return key.replace("residual_proj.proj.", "residual_proj.")

    losses = [name for name in case.kwargs if name.startswith(("loss_weight", "param_avg"))]
    module = FSCILNeck(**_arguments(case.kwargs, {"d_rank": "dt_rank"}, ignored=losses))
    results: list[NeckOutput] = []

    def features_alone(_: nn.Module, __: Any, result: NeckOutput) -> Tensor:
        results.append(result)
        return result.out

    module.register_forward_hook(features_alone)
    found, wanted = check_module(_under_our_names(case, rename), module)
    features = {"main": results[0].main, "residual": results[0].residual} | _fscil_losses(results[0], case)
    found |= {f"feat.{name}": feature.detach() for name, feature in features.items()}
    known = {"input", "output", "grad_input"}
    others = {key: x for key, x in case.tensors.items() if key not in known and not key.startswith("grad.")}
    return found, wanted | {f"feat.{key}": x for key, x in others.items()}


def _fscil_losses(result: NeckOutput, case: Case) -> Tensors:
    """Coefficients and losses, as if the second half of the batch were of novel classes."""
    batch = len(result.out)
    novel = torch.arange(batch) >= batch // 2
    named = {name: getattr(result.base, name) for name in ("dts", "Bs", "Cs")}
    if result.novel is not None:
        named |= {f"{name}_new": getattr(result.novel, name) for name in ("dts", "Bs", "Cs")}
    dims = tuple(int(dim) for dim in case.kwargs.get("param_avg_dim", "0-1-3").split("-"))
    found = named | {f"sep_loss.{name}": separation_loss(x, novel, dims)[None] for name, x in named.items()}
    base, new = suppression_loss(result.main, novel)
    return found | {"supp_base": base[None], "supp_novel": new[None]}


def _motion_mamba(case: Case) -> tuple[Tensors, Tensors]:
    model = MotionMambaUNet(**case.kwargs)
    found, wanted = check_module(case, model)
    x = case.tensors["input"].detach()
    for i, block in enumerate(model.enc):
        y = block.htm(x)
        found[f"feat.enc{i}.htm"] = y.detach()
        x = block.bsm(y).detach()
        found[f"feat.enc{i}.bsm"] = x
    return found, wanted | {f"feat.{key}": x for key, x in case.tensors.items() if key.startswith("enc")}


def _mamba3(case: Case) -> tuple[Tensors, Tensors]:
    results = [_mamba3_scan(name, case) for name, _ in case.calls(_MAMBA3_SIZES)]
    return {k: x for found, _ in results for k, x in found.items()}, {k: x for _, w in results for k, x in w.items()}


def _mamba3_scan(name: str, case: Case) -> tuple[Tensors, Tensors]:
    """One of the operator's cases, whose tensors have the official names."""
    tensors = within(name, case.tensors)
    leaves = {key: x.requires_grad_() for key, x in tensors.items() if f"grad.{key}" in tensors}
    arguments = {ours: tensors[official] for official, ours in _MAMBA3_ARGUMENTS.items() if official in tensors}
    for scalar in ("dt", "a_dt", "trap"):  # in which heads come before tokens
        arguments[scalar] = arguments[scalar].transpose(1, 2)
    initial = [tensors[part] for part in ("init_Angle", "init_SSM", "init_K", "init_V") if part in tensors]
    y, last = trapezoidal_scan(**arguments, state=Mamba3State(*initial) if initial else None, reset=None)
    y.backward(tensors["grad_out"])
    found = {f"output.{name}.{part}": x.detach() for part, x in zip(_MAMBA3_RESULTS, (y, *last), strict=True)}
    wanted = {f"output.{name}.{part}": tensors[part] for part in _MAMBA3_RESULTS if part in tensors}
    found |= {f"grad.{name}.grad.{key}": x.grad for key, x in leaves.items() if x.grad is not None}
    return found, wanted | {f"grad.{name}.grad.{key}": tensors[f"grad.{key}"] for key in leaves}


# By the families' names, as `Case.family` gives them.
CHECKS: dict[str, Check] = {
    "mamba3siso": Check(_mamba3, rf"\w+\.({'|'.join(_MAMBA3_ARGUMENTS)}|init_\w+|grad_out)"),
    "motionmamba": Check(_motion_mamba),
    "mambafscil": Check(_fscil),
    "hiss": Check(_hiss),
    "smamba": Check(_smamba, r"input(\.1)?|x_mark(_enc)?|layer\d+\.input"),
    "hydra": Check(_hydra),
    "mamba1": Check(_mamba1, "input|seq_idx"),
    "mamba2": Check(_mamba2, "input|seq_idx"),
}
