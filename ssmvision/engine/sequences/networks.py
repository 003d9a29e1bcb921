"""Networks by the words of a config: a stack of layers between an encoder and a decoder, or a hierarchy of two."""

from __future__ import annotations

from typing import Any

from torch import nn

from ssmvision.layers import Hierarchical, Level, MambaStack, S4Stack, S5Encoder

STACKS: dict[str, type[nn.Module]] = {"s4": S4Stack, "s5": S5Encoder, "mamba": MambaStack}


def build_network(in_chans: int, outputs: int, net: str, dim: int, **args: Any) -> nn.Module:
    """From sequences (b, l, in_chans) to (b, l, outputs); a hierarchy gives one output per chunk.

    Args:
        in_chans: Channels of the sequences.
        outputs: Channels of the outputs.
        net: "s4" (`S4Stack`), "s5" (`S5Encoder`), "mamba" (`MambaStack`) or "hiss" (`Hierarchical`).
        dim: Channels inside.
        **args: `depth` and others of the stack. Of "hiss": `ratio`, and `low` and `high` with arguments like these.

    Raises:
        ValueError: A network that does not exist, or a value that a layer refuses.
        TypeError: An argument that a layer does not have, or lacks.
    """
    if net == "hiss":
        return _hierarchy(in_chans, outputs, dim, **args)
    return Level(_stack(net, dim, **args), dim, in_chans, outputs)


def _hierarchy(
    in_chans: int, outputs: int, dim: int, low: dict[str, Any], high: dict[str, Any], ratio: int
) -> Hierarchical:
    return Hierarchical(
        Level(_stack(dim=dim, **low), dim, in_chans), Level(_stack(dim=dim, **high), dim, None, outputs), ratio
    )


def _stack(net: str, dim: int, **args: Any) -> nn.Module:
    if net not in STACKS:
        raise ValueError(f"there is no network {net!r}; known: {', '.join([*STACKS, 'hiss'])}")
    return STACKS[net](dim, **args)
