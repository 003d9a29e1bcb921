"""How layers say that parameters of theirs need optimizer options of their own, and how a model is asked for them.

A layer has an attribute `own_options`: names of its parameters and their options, {"A_log": {"weight_decay": 0.0}}. The
engine gives them groups in which these hold. Marks on tensors would not survive `copy.deepcopy` or `to_empty`.
"""

from typing import Optional

from torch import nn


def undecayed(*names: str, lr: Optional[float] = None) -> dict[str, dict[str, float]]:
    """Options of parameters that weight decay would harm, such as time scales: none, and `lr` unless that is None."""
    return {name: {"weight_decay": 0.0} if lr is None else {"lr": lr, "weight_decay": 0.0} for name in names}


def declared_options(model: nn.Module) -> dict[nn.Parameter, dict[str, float]]:
    """What the modules of any tree declare; of two that name the same parameter, the outer one holds.

    Where none does, marks that official codes set on parameters are heeded: S4's `_optim`, Mamba's `_no_weight_decay`.
    """
    found: dict[nn.Parameter, dict[str, float]] = {}
    for module in model.modules():
        declared = getattr(module, "own_options", {})
        parameters = dict(module.named_parameters(remove_duplicate=False)) if declared else {}
        for name in declared.keys() & parameters:
            found.setdefault(parameters[name], declared[name])
    for parameter in model.parameters():
        marked = {"weight_decay": 0.0} if getattr(parameter, "_no_weight_decay", False) else {}
        marked |= getattr(parameter, "_optim", {})
        if marked:
            found.setdefault(parameter, marked)
    return found


def undecayed_names(model: nn.Module) -> set[str]:
    """Names of the parameters of `model` that declare to be without weight decay, for timm's `no_weight_decay()`."""
    declared = declared_options(model)
    return {name for name, p in model.named_parameters() if declared.get(p, {}).get("weight_decay") == 0.0}
