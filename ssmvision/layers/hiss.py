"""HiSS, sequence models of two time scales (arXiv:2402.10211, section 4), and the stacks of blocks they are made of."""

from typing import Any, Optional

from torch import Tensor, nn

from ssmvision.layers.mamba import Mamba, S6State, S6States
from ssmvision.layers.s4 import S4Block
from ssmvision.ops._library import expect_reset


class MambaBlock(nn.Module):
    """x + mixer(norm(x)).

    Args:
        dim: Channels.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: Arguments of `Mamba`.
    """

    def __init__(self, dim: int, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mixer = Mamba(dim, device=device, dtype=dtype, **kwargs)

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, dim) → the same; `reset` (b, l) is True where a packed sequence starts."""
        return x + self.mixer(self.norm(x), reset)

    def run(self, x: Tensor, state: Optional[S6State] = None, reset: Optional[Tensor] = None) -> tuple[Tensor, S6State]:
        """As `forward`, after `state`; also returns the state after the last token."""
        y, state = self.mixer.run(self.norm(x), state, reset)
        return x + y, state

    def step(self, x: Tensor, state: S6State) -> tuple[Tensor, S6State]:
        """One token (b, dim) after `state`: its output (b, dim) and the next state."""
        y, state = self.mixer.step(self.norm(x), state)
        return x + y, state


class MambaStack(nn.Module):
    """Pre-norm Mamba blocks and a final norm: a causal sequence model.

    Args:
        dim: Channels of input and output.
        depth: Blocks.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: Arguments of `Mamba`.
    """

    def __init__(self, dim: int, depth: int, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(MambaBlock(dim, **dd, **kwargs) for _ in range(depth))
        self.norm_f = nn.LayerNorm(dim, **dd)

    def reset_parameters(self) -> None:
        """Initialize the scans of all mixers."""
        for layer in self.layers:
            layer.mixer.reset_parameters()

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, dim) → the same; `reset` (b, l) is True where a packed sequence starts."""
        for layer in self.layers:
            x = layer(x, reset)
        return self.norm_f(x)

    def run(
        self, x: Tensor, state: Optional[S6States] = None, reset: Optional[Tensor] = None
    ) -> tuple[Tensor, S6States]:
        """As `forward`, after `state` (see `initial_state`); also returns the state after the last token."""
        after: S6States = []
        before = [None] * len(self.layers) if state is None else state
        for layer, own in zip(self.layers, before, strict=True):
            x, next_state = layer.run(x, own, reset)
            after.append(next_state)
        return self.norm_f(x), after

    def step(self, x: Tensor, state: S6States) -> tuple[Tensor, S6States]:
        """One token (b, dim) after `state` (see `initial_state`): its output (b, dim) and the next state."""
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x, next_state = layer.step(x, before)
            after.append(next_state)
        return self.norm_f(x), after

    def initial_state(self, batch: int) -> S6States:
        """What precedes a sequence, for each block."""
        return [layer.mixer.initial_state(batch) for layer in self.layers]


class S4Stack(nn.Module):
    """S4 blocks with residuals and a norm each: a causal sequence model.

    Args:
        dim: Channels of input and output.
        depth: Blocks.
        prenorm: x + block(norm(x)) instead of norm(x + block(x)).
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: Arguments of `S4Block`.
    """

    def __init__(
        self, dim: int, depth: int, prenorm: bool = False, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.prenorm = prenorm
        self.s4_layers = nn.ModuleList(S4Block(dim, transposed=False, **dd, **kwargs) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim, **dd) for _ in range(depth))

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, dim) → the same; `reset` (b, l) is True where a packed sequence starts."""
        for layer, norm in zip(self.s4_layers, self.norms, strict=True):
            y = layer(norm(x) if self.prenorm else x, reset=reset)
            x = x + y if self.prenorm else norm(x + y)
        return x

    def step(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One token (b, dim) after `state` (see `initial_state`): its output (b, dim) and the next state."""
        after = []
        for layer, norm, before in zip(self.s4_layers, self.norms, state, strict=True):
            y, next_state = layer.step(norm(x) if self.prenorm else x, before)
            x = x + y if self.prenorm else norm(x + y)
            after.append(next_state)
        return x, after

    def initial_state(self, batch: int) -> list[Tensor]:
        """What precedes a sequence, for each block."""
        return [layer.initial_state(batch) for layer in self.s4_layers]


class Level(nn.Module):
    """A sequence model between projections: one level of a hierarchy.

    Args:
        net: From (b, l, dim) to the same.
        dim: Channels of `net`.
        in_dim: Channels of the input; None for dim, without a projection.
        out_dim: Channels of the output; None for dim, without a projection.
        device: Device of the projections.
        dtype: Type of the projections.
    """

    def __init__(
        self,
        net: nn.Module,
        dim: int,
        in_dim: Optional[int] = None,
        out_dim: Optional[int] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.embed = nn.Identity() if in_dim is None else nn.Linear(in_dim, dim, **dd)
        self.net = net
        self.decoder = nn.Identity() if out_dim is None else nn.Linear(dim, out_dim, **dd)

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, in_dim) → (b, l, out_dim); `reset` (b, l), True where a packed sequence starts, if `net` takes it."""
        return self.decoder(_after_resets(self.net, self.embed(x), reset))

    def run(self, x: Tensor, state: Any = None, reset: Optional[Tensor] = None) -> tuple[Tensor, Any]:
        """As `forward`, after `state`; also returns the state after the last token. For a `net` that has `run`."""
        y, state = self.net.run(self.embed(x), state, reset)
        return self.decoder(y), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One token (b, in_dim) after `state`, for a `net` that has `step`."""
        y, state = self.net.step(self.embed(x), state)
        return self.decoder(y), state

    def initial_state(self, batch: int) -> Any:
        """What precedes a sequence, for a `net` that has `initial_state`."""
        return self.net.initial_state(batch)


class Hierarchical(nn.Module):
    """Every chunk of `ratio` steps is read alone and told in one token; a second model reads the tokens of the chunks.

    Args:
        low: From chunks (b, ratio, in) to (b, ratio, d); its last output tells the chunk.
        high: From chunks in order (b, chunks, d) to (b, chunks, out).
        ratio: Steps of a chunk.
    """

    def __init__(self, low: nn.Module, high: nn.Module, ratio: int) -> None:
        super().__init__()
        if ratio < 1:
            raise ValueError(f"Hierarchical: a chunk has at least one step, not {ratio}")
        self.ratio = ratio
        self.low_level = low
        self.high_level = high

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, in) → one output per chunk, (b, l / ratio, out).

        Args:
            x: Whole chunks, one after the other.
            reset: Boolean (b, l), True where a packed sequence starts, which is where a chunk starts.

        Raises:
            ValueError: l is not a multiple of `ratio`, or a packed sequence starts within a chunk.
        """
        return _after_resets(self.high_level, self.summarize(x), self._chunk_resets(x, reset))

    def run(self, x: Tensor, state: Any = None, reset: Optional[Tensor] = None) -> tuple[Tensor, Any]:
        """As `forward`, after `state` of the high level; also returns its state after the last chunk."""
        return self.high_level.run(self.summarize(x), state, self._chunk_resets(x, reset))

    def summarize(self, x: Tensor) -> Tensor:
        """The token of each chunk, (b, l, in) → (b, l / ratio, d)."""
        b, length, _ = x.shape
        if length % self.ratio:
            raise ValueError(f"Hierarchical: {length} steps are not a multiple of the ratio {self.ratio}")
        chunks = x.unflatten(1, (-1, self.ratio)).flatten(0, 1)
        return self.low_level(chunks)[:, -1].unflatten(0, (b, -1))

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One chunk (b, ratio, in) after `state` of the high level: its output (b, out) and the next state."""
        return self.high_level.step(self.summarize(x).squeeze(1), state)

    def initial_state(self, batch: int) -> Any:
        """What precedes a sequence: the initial state of the high level."""
        return self.high_level.initial_state(batch)

    def _chunk_resets(self, x: Tensor, reset: Optional[Tensor]) -> Optional[Tensor]:
        """(b, l) → (b, l / ratio)."""
        if reset is None:
            return None
        expect_reset("Hierarchical", reset, tuple(x.shape[:2]))
        chunks = reset.unflatten(1, (-1, self.ratio))
        if chunks[..., 1:].any():
            raise ValueError(
                f"Hierarchical: a packed sequence starts within a chunk of {self.ratio} steps, not with one"
            )
        return chunks[..., 0]


def _after_resets(net: nn.Module, x: Tensor, reset: Optional[Tensor]) -> Tensor:
    """Whether `net` knows resets matters only where there are some."""
    return net(x) if reset is None else net(x, reset)
