"""The two blocks of Motion Mamba (arXiv:2403.07487, section 3) and a U-Net of them.

No official code of the model is published: this is our reading of the paper, and no weights exist that could prove it.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers.mamba import S6Branch, S6States


class HierarchicalTemporalMamba(nn.Module):
    """x + out_proj(silu(z) * the sum of isolated scans over time), each with a convolution and coefficients of its own.

    It is causal and can stream; the block that the paper makes of it and a scan over channels cannot.

    Args:
        dim: Channels of input and output.
        branches: Number of scans.
        d_state: Size of the state per channel.
        d_conv: Width of the causal convolutions.
        expand: Inner channels / dim.
        dt_rank: Rank of the step-size projections.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        branches: int,
        d_state: int = 4,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int = 2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d = expand * dim
        self.norm = nn.LayerNorm(dim, **dd)
        self.in_proj = nn.Linear(dim, 2 * d, bias=False, **dd)
        self.branches = nn.ModuleList(S6Branch(d, d_state, d_conv, dt_rank, **dd) for _ in range(branches))
        self.out_proj = nn.Linear(d, dim, bias=False, **dd)

    def reset_parameters(self) -> None:
        """Initialize all scans."""
        for branch in self.branches:
            branch.reset_parameters()

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, dim) → the same; `reset` (b, l) is True where a packed sequence starts."""
        return self.run(x, None, reset)[0]

    def run(
        self, x: Tensor, state: Optional[S6States] = None, reset: Optional[Tensor] = None
    ) -> tuple[Tensor, S6States]:
        """As `forward`, after `state` (see `initial_state`); also returns the state after the last token."""
        u, z = self.in_proj(self.norm(x)).transpose(1, 2).chunk(2, dim=1)
        outputs: list[Tensor] = []
        after: S6States = []
        for index, branch in enumerate(self.branches):
            y, last = branch.mix_run(u, None, None if state is None else state[index], reset)
            outputs.append(y)
            after.append(last)
        y = torch.stack(outputs).sum(0)
        return x + self.out_proj((y * F.silu(z)).transpose(1, 2)), after

    def step(self, x: Tensor, state: S6States) -> tuple[Tensor, S6States]:
        """One token (b, dim) after `state` (see `initial_state`): its output (b, dim) and the next state."""
        u, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        pairs = [branch.mix_step(u, None, s) for branch, s in zip(self.branches, state, strict=True)]
        y = torch.stack([y for y, _ in pairs]).sum(0)
        return x + self.out_proj(y * F.silu(z)), [after for _, after in pairs]

    def initial_state(self, batch: int) -> S6States:
        """What precedes a sequence, for each scan."""
        return [branch.initial_state(batch) for branch in self.branches]


class BidirectionalSpatialMamba(nn.Module):
    """x + a gated scan over channels, forward and backward, in which the frames are the features.

    Args:
        length: Frames, whose number is fixed thereby.
        d_state: Size of the state per feature.
        d_conv: Width of the causal convolutions.
        expand: Inner features / length.
        dt_rank: Rank of the step-size projections.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        length: int,
        d_state: int = 4,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int = 2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d = expand * length
        self.norm = nn.LayerNorm(length, **dd)
        self.in_proj = nn.Linear(length, 2 * d, bias=False, **dd)
        self.fwd = S6Branch(d, d_state, d_conv, dt_rank, **dd)
        self.bwd = S6Branch(d, d_state, d_conv, dt_rank, **dd)
        self.out_proj = nn.Linear(d, length, bias=False, **dd)

    def reset_parameters(self) -> None:
        """Initialize both scans."""
        self.fwd.reset_parameters()
        self.bwd.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, dim) → the same, with any number of channels."""
        u, z = self.in_proj(self.norm(x.transpose(1, 2))).transpose(1, 2).chunk(2, dim=1)  # (b, d, dim)
        y = self.fwd.mix(u) + self.bwd.mix(u.flip(2)).flip(2)
        return x + self.out_proj((y * F.silu(z)).transpose(1, 2)).transpose(1, 2)


class MotionMambaBlock(nn.Module):
    """A scan over time, then one over channels.

    Args:
        dim: Channels of input and output.
        length: Frames.
        branches: Scans over time.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: Arguments of both layers.
    """

    def __init__(
        self, dim: int, length: int, branches: int, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.htm = HierarchicalTemporalMamba(dim, branches, device=device, dtype=dtype, **kwargs)
        self.bsm = BidirectionalSpatialMamba(length, device=device, dtype=dtype, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, dim) → the same."""
        return self.bsm(self.htm(x))


class MotionMambaUNet(nn.Module):
    """An encoder and a decoder of equal resolution, with skip connections; the outermost levels scan most often.

    Args:
        dim: Channels of input and output.
        length: Frames.
        depth: Levels: the encoder has 2 depth - 1, ..., 3, 1 scans over time, the decoder 1, 3, ..., 2 depth - 1.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: Arguments of the layers.
    """

    def __init__(self, dim: int, length: int, depth: int, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}

        def block(branches: int) -> MotionMambaBlock:
            return MotionMambaBlock(dim, length, branches, **dd, **kwargs)

        self.enc = nn.ModuleList(block(2 * (depth - i) - 1) for i in range(depth))
        self.mid = block(1)
        self.skip = nn.ModuleList(nn.Linear(2 * dim, dim, **dd) for _ in range(depth))
        self.dec = nn.ModuleList(block(2 * i + 1) for i in range(depth))
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(b, length, dim) → the same."""
        skipped: list[Tensor] = []
        for block in self.enc:
            x = block(x)
            skipped.append(x)
        x = self.mid(x)
        for block, merge in zip(self.dec, self.skip, strict=True):
            x = block(merge(torch.cat([x, skipped.pop()], dim=-1)))
        return self.norm(x)
