"""Parameter groups for parameters that bring optimizer options of their own."""

from torch import nn
from torch.optim import Optimizer

from ssmvision.layers._optimizer_options import declared_options

__all__ = ["separate_own_groups"]


def separate_own_groups(optimizer: Optimizer, model: nn.Module) -> None:
    """Give parameters whose layer declares options, such as {"lr": 1e-3, "weight_decay": 0.0}, groups of their own.

    Layers do so in `own_options`; the marks that the official codes of S4 (`_optim`) and Mamba (`_no_weight_decay`)
    leave on parameters count too. To be called before a scheduler reads the groups: it then anneals each learning rate
    from its own start.

    Args:
        optimizer: Over parameters of `model`; its groups are split where declared options differ from theirs.
        model: Any tree of modules.
    """
    declared = declared_options(model)
    groups = []
    for group in optimizer.param_groups:
        parts: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
        for parameter in group["params"]:
            own = sorted(declared.get(parameter, {}).items())
            parts.setdefault(tuple((k, v) for k, v in own if group.get(k) != v), []).append(parameter)
        groups += [{**group, **dict(options), "params": parameters} for options, parameters in parts.items()]
    optimizer.param_groups[:] = groups
