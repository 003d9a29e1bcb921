"""Mamba-3 with one input and one output per head : trapezoidal steps and rotating states.

The recurrence is that of the official reference. The layer around it is our reading of the published description: no
official weights have proved it.

Letters: b batch, l token, h head, p head channel, n state, g group of heads, s rotated pair of states.
"""

import math
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.s6 import init_dt_bias_
from ssmvision.ops._library import expect, expect_reset, no_autocast

CHUNK = 64  # tokens whose mutual decays are materialized at once


class Mamba3State(NamedTuple):
    """What a scan leaves behind after a token.

    Attributes:
        angle: Accumulated rotation modulo 2 pi, (b, h, s).
        ssm: State, (b, h, p, n).
        k: The token's key after rotation, (b, h, n).
        v: The token's value, (b, h, p).
    """

    angle: Tensor
    ssm: Tensor
    k: Tensor
    v: Tensor


def trapezoidal_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    a_dt: Tensor,
    trap: Tensor,
    angles: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    state: Optional[Mamba3State] = None,
    reset: Optional[Tensor] = None,
) -> tuple[Tensor, Mamba3State]:
    """Scan that weighs both ends of every step.

        θ_t = θ_{t-1} + pi tanh(angles_t) dt_t,      q_t, k_t rotated by θ_t after their biases are added
        s_t = exp(a_dt_t) (s_{t-1} + (1 - λ_t) dt_t v_{t-1} k_{t-1}^T) + λ_t dt_t v_t k_t^T,      λ = sigmoid(trap)
        y_t = s_t q_t + D v_t

    and y * silu(z) if z is given. What a token gives to the step after its own depends on nothing but the two, so it
    can enter the state at once; only the token itself must not see it. Within chunks of tokens that is attention with
    decays, between them a recurrence of states (Mamba-2, arXiv:2405.21060, section 6): matrix products in plain torch.

    Args:
        q: Output matrix (b, l, g, n).
        k: Input matrix (b, l, g, n).
        v: Tokens (b, l, h, p).
        dt: Step sizes (b, l, h).
        a_dt: Logarithms of the decays, (b, l, h).
        trap: Logits of the weight of a step's end, (b, l, h).
        angles: Before tanh, (b, l, h, s), for the first 2 s states in pairs of neighbours; the others do not rotate.
        q_bias: (h, n).
        k_bias: (h, n).
        D: Skip connection (h,).
        z: Gate (b, l, h, p).
        state: What precedes; None for nothing.
        reset: Boolean (b, l), True where a packed sequence starts.

    Returns:
        y (b, l, h, p); and the state after the last token, or `state` if there is none.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    given = {"q": q, "k": k, "v": v, "dt": dt, "a_dt": a_dt, "trap": trap, "angles": angles, "q_bias": q_bias}
    _check("trapezoidal_scan", given | {"k_bias": k_bias, "D": D, "z": z}, state)
    expect_reset("trapezoidal_scan", reset, tuple(v.shape[:2]))
    dtype = torch.promote_types(v.dtype, torch.float32)
    out_dtype = v.dtype
    q, k, v, dt, a_dt, trap, angles = (x.to(dtype) for x in (q, k, v, dt, a_dt, trap, angles))
    b, l, h, p = v.shape
    if state is None:
        state = _nothing(v, b, h, p, q.shape[-1], angles.shape[-1])
    if not l:
        return v.to(out_dtype), state
    # Whole turns are removed from a sum that float32 would round. Across resets it runs on: differences alone matter.
    turns = (math.pi * torch.tanh(angles) * dt.unsqueeze(-1)).double().cumsum(1)
    theta = torch.remainder(turns + state.angle.unsqueeze(1), 2 * math.pi).to(dtype)
    q, k = _rotated(q, q_bias, theta), _rotated(k, k_bias, theta)
    own, before = _weights(trap, dt)
    total = own + F.pad(before[:, 1:], [0, 0, 0, 1])
    carried = state.ssm + _outer(state.v, state.k, before[:, 0])
    with no_autocast(v):
        y, last = _chunked(q, k, v, a_dt, own, total, carried, reset)
    # Copies: as slices, a small state would keep all tokens in memory.
    angle, last_k, last_v = (x[:, -1].clone() for x in (theta, k, v))
    return _skip_and_gate(y, v, D, z).to(out_dtype), Mamba3State(angle, last, last_k, last_v)


def trapezoidal_scan_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dt: Tensor,
    a_dt: Tensor,
    trap: Tensor,
    angles: Tensor,
    q_bias: Tensor,
    k_bias: Tensor,
    state: Mamba3State,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
) -> tuple[Tensor, Mamba3State]:
    """One step of `trapezoidal_scan`, for streams: its arguments without the axis of tokens.

    Returns:
        y (b, h, p); and the next state.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    given = {"q": q, "k": k, "v": v, "dt": dt, "a_dt": a_dt, "trap": trap, "angles": angles, "q_bias": q_bias}
    _check("trapezoidal_scan_step", given | {"k_bias": k_bias, "D": D, "z": z}, state)
    dtype = torch.promote_types(v.dtype, torch.float32)
    out_dtype = v.dtype
    q, k, v, dt, a_dt, trap, angles = (x.to(dtype) for x in (q, k, v, dt, a_dt, trap, angles))
    theta = torch.remainder(state.angle + math.pi * torch.tanh(angles) * dt.unsqueeze(-1), 2 * math.pi)
    q, k = _rotated(q, q_bias, theta), _rotated(k, k_bias, theta)
    own, before = _weights(trap, dt)
    carried = state.ssm + _outer(state.v, state.k, before)
    ssm = torch.exp(a_dt)[..., None, None] * carried + _outer(v, k, own)
    y = (ssm * q.unsqueeze(-2)).sum(-1)
    return _skip_and_gate(y, v, D, z).to(out_dtype), Mamba3State(theta, ssm, k, v)


class Mamba3(nn.Module):
    """A gated `trapezoidal_scan` whose decays, weights and rotations all depend on the token; without convolution.

    Args:
        dim: Channels of input and output.
        d_state: Size of the state per channel.
        expand: Inner channels / dim.
        headdim: Channels of a head.
        ngroups: Groups of heads, each with one B and C.
        rope_fraction: Fraction of the states that rotate.
        A_floor: Smallest -A.
        bias: Give the input and output projections a bias.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed("D", "dt_bias", "B_bias", "C_bias")

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        expand: float = 2,
        headdim: int = 64,
        ngroups: int = 1,
        rope_fraction: float = 0.5,
        A_floor: float = 1e-4,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        d = self.d_inner = int(expand * dim)
        if d % headdim:
            raise ValueError(f"Mamba3: {d} inner channels do not divide into heads of {headdim}")
        h = self.num_heads = d // headdim
        if h % ngroups:
            raise ValueError(f"Mamba3: {h} heads do not divide into {ngroups} groups")
        self.d_state, self.ngroups, self.A_floor = d_state, ngroups, A_floor
        self.num_angles = int(rope_fraction * d_state) // 2
        self.in_proj = nn.Linear(dim, sum(self._widths()), bias=bias, **dd)
        self.dt_bias = nn.Parameter(torch.empty(h, **dd))
        self.B_norm = nn.RMSNorm(d_state, eps=1e-5, **dd)
        self.C_norm = nn.RMSNorm(d_state, eps=1e-5, **dd)
        self.B_bias = nn.Parameter(torch.empty(h, d_state, **dd))
        self.C_bias = nn.Parameter(torch.empty(h, d_state, **dd))
        self.D = nn.Parameter(torch.empty(h, **dd))
        self.out_proj = nn.Linear(d, dim, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize what belongs to the scan; linear layers and norms initialize themselves."""
        init_dt_bias_(self.dt_bias)
        for p in (self.B_bias, self.C_bias, self.D):
            nn.init.ones_(p)

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, dim) → the same; `reset` (b, l) is True where a packed sequence starts."""
        return self.run(x, None, reset)[0]

    def run(
        self, x: Tensor, state: Optional[Mamba3State] = None, reset: Optional[Tensor] = None
    ) -> tuple[Tensor, Mamba3State]:
        """As `forward`, after `state` (see `initial_state`); also returns the state after the last token."""
        y, state = trapezoidal_scan(**self._arguments(x), D=self.D, state=state, reset=reset)
        return self.out_proj(y.flatten(-2)), state

    def step(self, x: Tensor, state: Mamba3State) -> tuple[Tensor, Mamba3State]:
        """One token (b, dim) after `state` (see `initial_state`): its output (b, dim) and the next state."""
        y, state = trapezoidal_scan_step(**self._arguments(x), D=self.D, state=state)
        return self.out_proj(y.flatten(-2)), state

    def initial_state(self, batch: int) -> Mamba3State:
        """What precedes a sequence: zeros."""
        h = self.num_heads
        return _nothing(self.D, batch, h, self.d_inner // h, self.d_state, self.num_angles)

    def _widths(self) -> list[int]:
        """Of z, x, B, C, dt, A, trap and angles, as `in_proj` gives them."""
        width, h = self.ngroups * self.d_state, self.num_heads
        return [self.d_inner, self.d_inner, width, width, h, h, h, self.num_angles]

    def _arguments(self, x: Tensor) -> dict[str, Tensor]:
        """Those of the scan that depend on the tokens, and the biases."""
        z, v, b, c, dt, a, trap, angles = self.in_proj(x).split(self._widths(), dim=-1)
        b, c = (m.unflatten(-1, (self.ngroups, -1)) for m in (b, c))
        z, v = (m.unflatten(-1, (self.num_heads, -1)) for m in (z, v))
        dtype = torch.promote_types(x.dtype, torch.float32)
        dt = F.softplus(dt.to(dtype) + self.dt_bias)
        A = -_heavy_tail(a.to(dtype)).clamp(min=self.A_floor)
        angles = angles.unsqueeze(-2).expand(*angles.shape[:-1], self.num_heads, -1)
        return {
            "q": self.C_norm(c), "k": self.B_norm(b), "v": v, "dt": dt, "a_dt": A * dt, "trap": trap, "angles": angles,
            "q_bias": self.C_bias, "k_bias": self.B_bias, "z": z,
        }  # fmt: skip


def _check(operator: str, tensors: dict[str, Any], state: Optional[Mamba3State]) -> None:
    *lead, h, p = tensors["v"].shape
    (g, n), s = tensors["q"].shape[-2:], tensors["angles"].shape[-1]
    shapes = dict.fromkeys(("q", "k"), (*lead, g, n)) | dict.fromkeys(("dt", "a_dt", "trap"), (*lead, h))
    shapes |= {"v": (*lead, h, p), "z": (*lead, h, p), "D": (h,), "q_bias": (h, n), "k_bias": (h, n)}
    shapes |= {"angles": (*lead, h, s)}
    if state is not None:
        b = lead[0]
        shapes |= {"angle": (b, h, s), "ssm": (b, h, p, n), "state.k": (b, h, n), "state.v": (b, h, p)}
        tensors |= {"angle": state.angle, "ssm": state.ssm, "state.k": state.k, "state.v": state.v}
    for name, x in tensors.items():
        if x is not None:
            expect(operator, name, x, shapes[name])
    if h % g:
        raise RuntimeError(f"{operator}: the groups of q and k ({g}) must divide {h} heads")
    if 2 * s > n:
        raise RuntimeError(f"{operator}: {s} angles turn {2 * s} states, but there are {n}")


def _nothing(like: Tensor, b: int, h: int, p: int, n: int, s: int) -> Mamba3State:
    """The zeros that precede a sequence."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    shapes = ((h, s), (h, p, n), (h, n), (h, p))
    return Mamba3State(*(like.new_zeros(b, *shape, dtype=dtype) for shape in shapes))


def _heavy_tail(x: Tensor) -> Tensor:
    """Positive, increasing, smooth; where exp and softplus fall off exponentially, this falls like 1 / |x|."""
    return torch.where(x < 0, 1 / (1 - x.clamp(max=0)), 1 + x)


def _rotated(x: Tensor, bias: Tensor, theta: Tensor) -> Tensor:
    """Groups (..., g, n) spread over heads, biased, and their first pairs of neighbours turned by theta (..., h, s)."""
    heads, s = theta.shape[-2:]
    x = x.repeat_interleave(heads // x.shape[-2], dim=-2) + bias
    a, b = x[..., : 2 * s].unflatten(-1, (s, 2)).unbind(-1)
    cos, sin = theta.cos(), theta.sin()
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., 2 * s :]], dim=-1)


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, a_dt: Tensor, own: Tensor, total: Tensor, state: Tensor, reset: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """Outputs (b, l, h, p) and last state (b, h, p, n) of tokens that weigh `own` to themselves, `total` to others."""
    cuts = torch.zeros_like(a_dt[..., 0]) if reset is None else reset.to(a_dt.dtype)
    outputs = []
    for chunk in zip(*(x.split(CHUNK, dim=1) for x in (q, k, v, a_dt, own, total, cuts)), strict=True):
        y, state = _chunk(*chunk, state=state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, a_dt: Tensor, own: Tensor, total: Tensor, cuts: Tensor, *, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for one chunk: tokens i read tokens j <= i since the latest cut, and the state if there is no cut."""
    a, segment = a_dt.cumsum(1).transpose(1, 2), cuts.cumsum(1).unsqueeze(1)  # (b, h, l), (b, 1, l)
    reads = (segment.unsqueeze(-1) == segment.unsqueeze(-2)).tril()
    decay = torch.exp((a.unsqueeze(-1) - a.unsqueeze(-2)).masked_fill(~reads, -math.inf))  # (b, h, l of i, l of j)
    weight = total.transpose(1, 2).unsqueeze(-2) - torch.diag_embed((total - own).transpose(1, 2))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b, h, l, ·)
    y = (q @ k.mT * decay * weight) @ v
    from_state = torch.exp(a.masked_fill(segment > 0, -math.inf)).unsqueeze(-1)  # (b, h, l, 1)
    y = y + from_state * (q @ state.mT)
    to_state = (decay[..., -1, :] * total.transpose(1, 2)).unsqueeze(-1)
    state = from_state[..., -1:, :] * state + (to_state * v).mT @ k
    return y.transpose(1, 2), state


def _weights(trap: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Of a step's end, the token itself, and of its start, the token before."""
    end = torch.sigmoid(trap)
    return end * dt, (1 - end) * dt


def _outer(v: Tensor, k: Tensor, weight: Tensor) -> Tensor:
    return (weight.unsqueeze(-1) * v).unsqueeze(-1) * k.unsqueeze(-2)


def _skip_and_gate(y: Tensor, v: Tensor, D: Optional[Tensor], z: Optional[Tensor]) -> Tensor:
    y = y if D is None else y + D.unsqueeze(-1) * v
    return y if z is None else y * F.silu(z.to(y.dtype))
