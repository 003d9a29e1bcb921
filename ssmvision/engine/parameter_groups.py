"""Parameter groups for parameters that bring optimizer options of their own."""

from torch.optim import Optimizer

__all__ = ["separate_own_groups"]


def separate_own_groups(optimizer: Optimizer) -> None:
    """Give parameters with `_optim`, such as {"lr": 1e-3, "weight_decay": 0.0}, groups in which these options hold.

    It is the convention of S4 and its kin, whose dynamics learn slower than other parameters and are not decayed. To be
    called before a scheduler reads the groups: it then anneals each learning rate from its own start.
    """
    groups = []
    for group in optimizer.param_groups:
        parts: dict[tuple[tuple[str, float], ...], list[object]] = {}
        for parameter in group["params"]:
            options = tuple(sorted(getattr(parameter, "_optim", {}).items()))
            parts.setdefault(options, []).append(parameter)
        groups += [{**group, **dict(options), "params": parameters} for options, parameters in parts.items()]
    optimizer.param_groups[:] = groups
