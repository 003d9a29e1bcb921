"""Initialization that families share, in the form that `timm.models.named_apply` calls."""

from timm.layers import trunc_normal_
from torch import nn


def init_linear(module: nn.Module, name: str = "") -> None:
    """Truncated normal weights and zero biases, as of vision transformers, if the module is a linear layer."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def reset_parameters(module: nn.Module, name: str = "") -> None:
    """What a layer initializes itself, anew (after `to_empty`)."""
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
