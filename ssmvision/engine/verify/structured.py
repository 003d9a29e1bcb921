"""Structured state space layers against the official ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ssmvision.engine.verify.case import Case
from ssmvision.engine.verify.modules import Check, Tensors, check_module, kind_of, renamed, within, without_options
from ssmvision.layers.hippo import MEASURES, diagonal_init, hippo, hippo_low_rank, nplr
from ssmvision.layers.ptd import diagonalize, transfer_function
from ssmvision.layers.s4 import S4Block, S4Kernel
from ssmvision.layers.s4d import S4D, S4DKernel
from ssmvision.layers.s4nd import S4ND
from ssmvision.layers.ssm2d import SSM2D

__all__ = ["CHECKS"]


def _pairs(x: Tensor) -> Tensor:
    """Complex numbers as cases store them."""
    return torch.view_as_real(x.resolve_conj())


def _named(kind: str, tensors: Tensors) -> Tensors:
    return {f"{kind}.{name}": x for name, x in tensors.items()}


def _hippo(case: Case) -> tuple[Tensors, Tensors]:
    found: Tensors = {}
    for n in case.kwargs["N"]:
        for measure in MEASURES:
            A, B = hippo(measure, n, **case.kwargs.get(measure, {}))
            found |= {f"{measure}.N{n}.A": A, f"{measure}.N{n}.B": B[:, None]}
            if (P := case.tensors.get(f"{measure}.N{n}.P")) is not None:
                found[f"{measure}.N{n}.P"] = hippo_low_rank(measure, n, len(P))
        found |= _nplr_forms(case, n) | _diagonal_forms(case, n)
    # The official corrections of Fourier bases, and eigenvalues that follow from them, are computed in float32.
    single = {name for name in found if "fourier" in name and (name.endswith(".P") or name.startswith("nplr"))}
    wanted = {name: x.float() if name in single else x for name, x in case.tensors.items()}
    # What is clipped depends on the arbitrary phases of eigenvectors, and its absolute value with it.
    wanted = {name: x for name, x in wanted.items() if not name.endswith("absB_clipped")}
    return _named("output", found), _named("output", wanted)


def _nplr_forms(case: Case, n: int) -> Tensors:
    found: Tensors = {}
    for name, P in case.tensors.items():
        kind, _, measure = name.partition(".")
        measure = measure.partition(".")[0]
        if kind != "nplr" or not name.endswith(f"N{n}.absP"):
            continue
        W, ours, B, V = nplr(measure, n, len(P), B_clip=None)
        forms = {"W": _pairs(W), "absP": ours.abs(), "absB_unclipped": B.abs()}
        forms["PPstar_diag"] = ours.abs().square().sum(0)
        forms["normal_part_2Re_VWVh"] = 2 * ((V * W) @ V.mH).real
        found |= {f"nplr.{measure}.N{n}.{form}": x for form, x in forms.items()}
    return found


def _diagonal_forms(case: Case, n: int) -> Tensors:
    found: Tensors = {}
    for name in case.tensors:
        kind, _, init = name.partition(".")
        init = init.partition(".")[0]
        if kind == "s4d" and name.endswith(f"N{n}.A"):
            A, B = diagonal_init(init, n)
            absolute = {f"s4d.{init}.N{n}.absB": B.abs()[None], f"s4d.{init}.N{n}.B": _pairs(B)[None]}
            found |= {f"s4d.{init}.N{n}.A": _pairs(A)[None]}
            found |= {key: x for key, x in absolute.items() if key in case.tensors}
    return found


def _ptd(case: Case) -> tuple[Tensors, Tensors]:
    found: Tensors = {}
    wanted: Tensors = {}
    omega = case.tensors["omega"]
    for n in case.kwargs["N"]:
        A, B, C, E = (case.tensors[f"N{n}.{name}"] for name in ("A", "B", "C", "E_unit"))
        found |= dict(zip((f"N{n}.A", f"N{n}.B"), hippo("legs", n), strict=True))
        wanted |= {name: case.tensors[name] for name in (f"N{n}.A", f"N{n}.B")}
        for relative in case.kwargs["relative_perturbation"]:
            Lambda, V = diagonalize(A + relative * torch.linalg.matrix_norm(A, 2) * E)
            CB = (C.to(V) @ V) * torch.linalg.solve(V, B.to(V))
            ours = {"Lambda": _pairs(Lambda), "CB": _pairs(CB), "G": _pairs(transfer_function(Lambda, CB, omega))}
            names = {name: f"N{n}.rel{relative}.{name}" for name in ours}
            order = _eigenvalue_order(case.tensors[names["Lambda"]])
            found |= {names[name]: x for name, x in ours.items()}
            wanted |= {names[name]: case.tensors[names[name]] for name in ours}
            # Rounding A + E differently moves CB by condition * eps of its largest entries, and thereby more than small
            # ones are allowed: as float32, it is compared to what it cancels from.
            wanted |= {names["Lambda"]: wanted[names["Lambda"]][order], names["CB"]: wanted[names["CB"]][order].float()}
    return _named("output", found), _named("output", wanted)


def _eigenvalue_order(Lambda: Tensor) -> Tensor:
    order = Lambda[:, 0].argsort(stable=True)
    return order[Lambda[order, 1].argsort(stable=True)]


def _s4d(case: Case) -> tuple[Tensors, Tensors]:
    checks = {"S4D": _s4d_minimal, "S4Block": _s4, "SSMKernelDiag": lambda case: _kernels(case, _s4d_kernel)}
    official = re.search(rf"\b({'|'.join(checks)})\b", case.official_class)
    if official is None:
        raise ValueError(f"official_class must name {', '.join(checks)}, not be {case.official_class!r}")
    return checks[official[1]](case)


def _s4d_minimal(case: Case) -> tuple[Tensors, Tensors]:
    layer = S4D(**_s4_kwargs(case, dplr=False))
    found, wanted = check_module(case, layer)
    if (K := case.tensors.get("K")) is not None:
        found["feat.K"], wanted["feat.K"] = layer.kernel(K.shape[-1]).detach(), K
    return found, wanted


def _s4(case: Case) -> tuple[Tensors, Tensors]:
    return _at_rates(case, S4Block(**_s4_kwargs(case)))


def _s4nd(case: Case) -> tuple[Tensors, Tensors]:
    kwargs = _s4_kwargs(case)
    kwargs.setdefault("spatial_dims", case.tensors["input"].dim() - 2)
    return _at_rates(case, S4ND(**kwargs))


def _at_rates(case: Case, module: nn.Module) -> tuple[Tensors, Tensors]:
    """As `check_module`, and the outputs at other step sizes, "output.rate2" for twice as large ones."""
    found, wanted = check_module(case, module)
    for name, x in within("output", case.tensors).items():
        if rate := re.fullmatch(r"rate(\d+(?:\.\d+)?)", name):
            found[f"output.{name}"] = module(case.tensors["input"], rate=float(rate[1])).detach()
            wanted[f"output.{name}"] = x
    return found, wanted


def _ssm2d(case: Case) -> tuple[Tensors, Tensors]:
    off = {"normalize": (False,), "truncation": (None,), "force_coeff_calc": (False,)}
    kwargs = without_options(case.kwargs, off)
    names = {"embed_dim": "dim", "ndim": "d_state", "directions_amount": "directions"}
    side = math.isqrt(places := kwargs.pop("L"))
    if side**2 != places:
        raise ValueError(f"L must be the number of places of a square, not {places}")
    layer = SSM2D(side=side, **renamed(kwargs, {**names, "use_residual_inside_ssm": "use_residual"}))
    if case.tensors["input"].dim() == 3:  # tokens first, (l, b, d)
        layer.register_forward_pre_hook(lambda _, x: x[0].permute(1, 2, 0).unflatten(-1, (math.isqrt(len(x[0])), -1)))
        layer.register_forward_hook(lambda _, x, y: y.flatten(2).permute(2, 0, 1))
    found, wanted = check_module(case, layer)
    wanted |= {f"feat.{name}": case.tensors[name] for name in ("kernel", "kernel_naive_f64") if name in case.tensors}
    return found | dict.fromkeys(("feat.kernel", "feat.kernel_naive_f64"), layer.kernel().detach()), wanted


def _dplr(case: Case) -> tuple[Tensors, Tensors]:
    return _kernels(case, _s4_kernel)


def _kernels(case: Case, check: Callable[[Case, str, Tensors, Tensors], Tensors]) -> tuple[Tensors, Tensors]:
    """Several kernels, each with weights and tensors under its own prefix."""
    found: Tensors = {}
    wanted: Tensors = {}
    for prefix in sorted({name.rpartition(".")[0] for name in case.weights}):
        weights, tensors = within(prefix, case.weights), within(prefix, case.tensors)
        ours = check(case, prefix, weights, tensors)
        ours = {f"{kind_of(name)}.{prefix}.{name}": x.detach() for name, x in ours.items()}
        found |= ours
        wanted |= {
            f"{kind_of(name)}.{prefix}.{name}": x
            for name, x in tensors.items()
            if name.startswith(("K", "grad.", "step_y", "step_state")) or f"{kind_of(name)}.{prefix}.{name}" in ours
        }
    return found, wanted


def _s4d_kernel(case: Case, prefix: str, weights: Tensors, tensors: Tensors) -> Tensors:
    init, disc, real_transform = prefix.split(".")
    kwargs = _s4_kwargs(case, dplr=False) | {"disc": disc, "real_transform": real_transform}
    if "init.A_real" in tensors:  # else it is of no effect, and may be one that nobody should start from
        kwargs["init"] = init
    length = kwargs.pop("L")
    kernel = S4DKernel(**kwargs)
    found = _initialized(kernel, ("A_real", "A_imag"))
    kernel.load_state_dict(weights)
    found |= _kernel_and_gradients(kernel, length, tensors)
    if disc != "dss":
        found["K_state"] = kernel(length, state=torch.view_as_complex(tensors["state0"]))[1]
        found["step_y"], state = _stepped(kernel, tensors["step_u"])
        found["step_state"] = _pairs(state)
    return found


def _s4_kernel(case: Case, prefix: str, weights: Tensors, tensors: Tensors) -> Tensors:
    kwargs = _s4_kwargs(case, dplr=True)
    length, rank = kwargs.pop("L"), kwargs.pop("rank")[prefix]
    kernel = S4Kernel(**kwargs, init=prefix, rank=rank)
    found = _initialized(kernel, ("A_real", "A_imag"))
    # What the first forward makes of a fresh C is what the official checkpoint holds.
    kernel.load_state_dict(
        {**weights, "C": tensors["C_before_setup"], "l_kernel": torch.zeros_like(weights["l_kernel"])}
    )
    kernel(length)
    tensors["C_after_setup"], found["C_after_setup"] = weights["C"], kernel.C.clone()
    kernel.load_state_dict(weights)
    found |= _kernel_and_gradients(kernel, length, tensors)
    found["K.shorter"] = kernel(tensors["K.shorter"].shape[-1])[0]
    found["step_y"], _ = _stepped(kernel, tensors["step_u"])
    return found


def _initialized(kernel: nn.Module, names: tuple[str, ...]) -> Tensors:
    """What initialization does not draw at random."""
    return {f"init.{name}": kernel.get_parameter(name).clone() for name in names}


def _kernel_and_gradients(kernel: nn.Module, length: int, tensors: Tensors) -> Tensors:
    K, _ = kernel(length)
    K.pow(2).mean().backward()
    found = {f"grad.{name}": p.grad for name, p in kernel.named_parameters() if p.grad is not None} | {"K": K}
    for name, wanted in tensors.items():
        if name.startswith("K.rate"):
            found[name], _ = kernel(wanted.shape[-1], rate=float(name.removeprefix("K.rate")))
    return found


def _stepped(kernel: nn.Module, u: Tensor) -> tuple[Tensor, Tensor]:
    state, outputs = kernel.initial_state(len(u)), []
    for u_l in u.unbind(-1):
        y, state = kernel.step(u_l, state)
        outputs.append(y)
    return torch.stack(outputs, -1), state


# Of official S4 layers: what initializes weights, which a case brings, or chooses among equal implementations.
_WITHOUT_EFFECT = {"backend", "contract_version", "deterministic", "init", "lr", "tie_dropout", "verbose", "wd"}
_OFF: dict[str, tuple[Any, ...]] = {
    "bottleneck": (None, 0), "drop_kernel": (0,), "dt_fast": (False,), "gate": (None, 0), "gate_act": (None,),
    "hyper_act": (None,), "initializer": (None,), "is_real": (False,), "kernel": (None,), "ln": (False,),
    "mult_act": (None,), "postact": (None,), "return_state": (False,), "weight_norm": (False,),
}  # fmt: skip
# The DPLR kernel is bilinear, whatever `disc` says of the diagonal one.
_OFF_OF_DPLR = _OFF | {"disc": ("bilinear", "zoh"), "dt_tie": (True,)}
_NAMES = {"dim": "spatial_dims", "d_model": "dim", "out_channels": "out_chans"}


def _s4_kwargs(case: Case, dplr: bool | None = None) -> dict[str, Any]:
    """Our arguments of S4 layers and kernels, whose form is DPLR if that is said or by their `mode`."""
    if dplr is None:
        dplr = case.kwargs.get("mode", "dplr") == "dplr"
    case.kwargs.ignore(_WITHOUT_EFFECT)
    kwargs = without_options(case.kwargs, _OFF_OF_DPLR if dplr else _OFF)
    return renamed({name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}, _NAMES)


_RANDOM = r"init\.(B|C|P|inv_dt)"

# By the families' names, as `Case.family` gives them.
CHECKS: dict[str, Check] = {
    "2dssmbaronetal": Check(_ssm2d),
    "hippos4init": Check(_hippo, r".*\.absB_clipped"),
    "s4": Check(_s4),
    "s4d": Check(_s4d, rf"input|.*\.({_RANDOM}|state0|step_u)"),
    "s4nplrdplr": Check(_dplr, rf".*\.({_RANDOM}|C_before_setup|step_u)"),
    "s4nd": Check(_s4nd),
    "s4ptds5ptd": Check(_ptd, r"omega|N\d+\.(C|E_unit|G_legs|G_s4d_legs)"),
}
