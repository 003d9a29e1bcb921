"""S5: one diagonal state space model for all channels, run as a scan (arXiv:2208.04933).

Parameter names are those of github:lindermanlab/S5; complex numbers are stored with a last axis of two. Episodes and
clips of different lengths can be packed in one sequence: `reset` marks where each starts ("Structured State Space
Models for In-Context Reinforcement Learning", arXiv:2303.03982).

Letters: b batch, l token, d channels, p stored states.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers._complex import as_complex, wide
from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.hippo import hippo, init_log_dt_, nplr
from ssmvision.layers.ptd import ptd
from ssmvision.ops import linear_scan, linear_scan_step

_TRUNCATED_STD = 0.87962566103423978  # of a normal distribution cut at two standard deviations


class S5(nn.Module):
    """x_t = Lambda_bar x_{t-1} + B_bar u_t, y_t = Re(C x_t) + D u_t, twice the real part for conjugate pairs.

    Args:
        dim: Channels of input and output.
        d_state: State size; half of it is stored if `conj_sym`.
        blocks: Blocks of the HiPPO matrix that the state starts from.
        discretization: "zoh" or "bilinear".
        bidirectional: Scan in both directions, with a C for each.
        conj_sym: Stored states stand for conjugate pairs.
        clip_eigs: Keep the real part of Lambda below -1e-4.
        init: "legs", or "ptd" (see `ptd.ptd`).
        C_init: "trunc_standard_normal" or "lecun_normal" in the basis of HiPPO, or "complex_normal" in that of states.
        dt_min: Smallest initial step size.
        dt_max: Largest initial step size.
        step_rescale: Factor of all step sizes: 2 for a signal sampled half as densely as in training.
        lr: Learning rate of Lambda, B and step sizes; None for that of the other parameters.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        blocks: int = 1,
        discretization: str = "zoh",
        bidirectional: bool = False,
        conj_sym: bool = True,
        clip_eigs: bool = False,
        init: str = "legs",
        C_init: str = "lecun_normal",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        step_rescale: float = 1.0,
        lr: Optional[float] = 1e-3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if d_state % (2 * blocks if conj_sym else blocks):
            pairs = " of conjugate pairs" if conj_sym else ""
            raise ValueError(f"d_state {d_state} does not divide into {blocks} blocks{pairs}")
        for name, value, known in (
            ("discretization", discretization, ("zoh", "bilinear")),
            ("init", init, ("legs", "ptd")),
            ("C_init", C_init, ("trunc_standard_normal", "lecun_normal", "complex_normal")),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
        dd = {"device": device, "dtype": dtype}
        p = d_state // 2 if conj_sym else d_state
        self.dim, self.d_state, self.blocks, self.discretization = dim, d_state, blocks, discretization
        self.bidirectional, self.conj_sym, self.clip_eigs = bidirectional, conj_sym, clip_eigs
        self.init, self.C_init, self.dt_range, self.step_rescale = init, C_init, (dt_min, dt_max), step_rescale
        self.Lambda_re = nn.Parameter(torch.empty(p, **dd))
        self.Lambda_im = nn.Parameter(torch.empty(p, **dd))
        self.B = nn.Parameter(torch.empty(p, dim, 2, **dd))
        self._outputs = ("C1", "C2") if bidirectional and C_init != "complex_normal" else ("C",)
        width = 2 * p if bidirectional and C_init == "complex_normal" else p
        for name in self._outputs:
            self.register_parameter(name, nn.Parameter(torch.empty(dim, width, 2, **dd)))
        self.D = nn.Parameter(torch.empty(dim, **dd))
        self.log_step = nn.Parameter(torch.empty(p, 1, **dd))
        self.own_options = undecayed("Lambda_re", "Lambda_im", "B", "log_step", lr=lr) | undecayed("D")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Lambda by `init`, B and C random in its basis, D normal, step sizes log-uniform."""
        Lambda, V, V_inv = (
            x.to(self.B.device) for x in _initial_basis(self.init, self.d_state // self.blocks, self.conj_sym)
        )
        self.Lambda_re.copy_(Lambda.real.repeat(self.blocks))
        self.Lambda_im.copy_(Lambda.imag.repeat(self.blocks))
        V, V_inv = torch.block_diag(*[V] * self.blocks), torch.block_diag(*[V_inv] * self.blocks)
        B = _lecun_normal((self.d_state, self.dim), self.d_state, self.B.device)
        self.B.copy_(torch.view_as_real(V_inv @ B.to(V)))
        for name in self._outputs:
            C = self.get_parameter(name)
            if self.C_init == "complex_normal":
                nn.init.normal_(C, std=math.sqrt(0.5))
                continue
            fan_in = self.d_state * (self.dim if self.C_init == "lecun_normal" else 1)
            drawn = torch.view_as_complex(_lecun_normal((self.dim, self.d_state, 2), fan_in, C.device))
            C.copy_(torch.view_as_real(drawn @ V))
        nn.init.normal_(self.D)
        init_log_dt_(self.log_step, *self.dt_range)

    def forward(self, u: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, dim) → the same; `reset` (b, l) is True where a packed sequence starts."""
        return self.run(u, None, reset)[0]

    def run(self, u: Tensor, state: Optional[Tensor] = None, reset: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """As `forward`, after `state` (see `initial_state`); also returns the state after the last token, (b, p)."""
        if self.bidirectional and (state is not None or reset is not None):
            raise ValueError("a bidirectional S5 takes neither a state nor resets: its second direction has no past")
        Lambda_bar, B_bar = self.discrete()
        drive = _drive(u, B_bar)
        x, last = linear_scan(Lambda_bar, drive, state, reset)
        if self.bidirectional:
            x = torch.cat([x, linear_scan(Lambda_bar, drive, reverse=True)[0]], -1)
        return self._read(x, u), last

    def step(self, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token (b, dim) after `state` (b, p): its output (b, dim) and the next state."""
        if self.bidirectional:
            raise ValueError("a bidirectional layer cannot run step by step")
        Lambda_bar, B_bar = self.discrete()
        state = linear_scan_step(Lambda_bar, _drive(u, B_bar), state)
        return self._read(state, u), state

    def initial_state(self, batch: int) -> Tensor:
        """What precedes a sequence: zeros (b, p), complex."""
        return as_complex(self.B.new_zeros(batch, len(self.B), 2))

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Lambda_bar (p) and B_bar (p, dim), complex."""
        real = wide(self.Lambda_re).clamp(max=-1e-4) if self.clip_eigs else wide(self.Lambda_re)
        Lambda, B = torch.complex(real, wide(self.Lambda_im)), as_complex(self.B)
        step = self.step_rescale * torch.exp(wide(self.log_step)[:, 0])
        if self.discretization == "zoh":
            Lambda_bar = torch.exp(Lambda * step)
            return Lambda_bar, ((Lambda_bar - 1) / Lambda)[:, None] * B
        resolvent = 1 / (1 - step / 2 * Lambda)
        return resolvent * (1 + step / 2 * Lambda), (resolvent * step)[:, None] * B

    def _read(self, x: Tensor, u: Tensor) -> Tensor:
        C = torch.cat([as_complex(self.get_parameter(name)) for name in self._outputs], -1)
        C = torch.view_as_real((2 * C if self.conj_sym else C).conj().resolve_conj()).flatten(1)
        return (F.linear(torch.view_as_real(x).flatten(-2), C) + self.D * u).to(u.dtype)


class S5Layer(nn.Module):
    """S5 with normalization, gated activation and residual (official SequenceLayer).

    Args:
        dim: Channels.
        activation: "gelu"; or "full_glu", "half_glu1" or "half_glu2", which gate it by linear maps.
        norm: "batch" or "layer".
        do_norm: Normalize at all.
        prenorm: Before S5, else after the residual.
        do_gtrxl_norm: Normalize the output of S5 too, with the same parameters.
        dropout: Rate after the activation and, as in the official code, once more after a gate; whole channels.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **s5: Of `S5`.
    """

    def __init__(
        self,
        dim: int,
        activation: str = "gelu",
        norm: str = "layer",
        do_norm: bool = True,
        prenorm: bool = True,
        do_gtrxl_norm: bool = False,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **s5: Any,
    ) -> None:
        super().__init__()
        if activation not in ("gelu", "full_glu", "half_glu1", "half_glu2"):
            raise ValueError(f"activation {activation!r} is not one of gelu, full_glu, half_glu1, half_glu2")
        if norm not in ("batch", "layer"):
            raise ValueError(f"norm {norm!r} is not 'batch' or 'layer'")
        dd = {"device": device, "dtype": dtype}
        self.activation, self.do_norm, self.prenorm, self.do_gtrxl_norm = activation, do_norm, prenorm, do_gtrxl_norm
        if do_norm or do_gtrxl_norm:
            self.norm = nn.BatchNorm1d(dim, **dd) if norm == "batch" else nn.LayerNorm(dim, eps=1e-6, **dd)
        self.seq = S5(dim, **s5, **dd)
        if activation == "full_glu":
            self.out1 = nn.Linear(dim, dim, **dd)
        if activation != "gelu":
            self.out2 = nn.Linear(dim, dim, **dd)
        self.drop = nn.Dropout1d(dropout)

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, dim) → the same; `reset` (b, l) is True where a packed sequence starts."""
        return self.run(x, None, reset)[0]

    def run(self, x: Tensor, state: Optional[Tensor] = None, reset: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
        """As `forward`, after `state`; also returns the state after the last token."""
        y, state = self.seq.run(self._before(x), state, reset)
        return self._after(x, y), state

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token (b, dim) after `state`: its output (b, dim) and the next state."""
        y, state = self.seq.step(self._before(x[:, None])[:, 0], state)
        return self._after(x[:, None], y[:, None])[:, 0], state

    def initial_state(self, batch: int) -> Tensor:
        """What precedes a sequence: zeros (b, p), complex."""
        return self.seq.initial_state(batch)

    def _before(self, x: Tensor) -> Tensor:
        return self._normalized(x) if self.do_norm and self.prenorm else x

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        y = self._normalized(y) if self.do_gtrxl_norm else y
        x = x + self._dropped(self._gated(y))
        return self._normalized(x) if self.do_norm and not self.prenorm else x

    def _normalized(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2) if isinstance(self.norm, nn.BatchNorm1d) else self.norm(x)

    def _gated(self, y: Tensor) -> Tensor:
        active = F.gelu(y, approximate="tanh")
        if self.activation == "gelu":
            return active
        active = self._dropped(active)
        gate = torch.sigmoid(self.out2(active))
        return {"full_glu": self._out1, "half_glu1": lambda a: a, "half_glu2": lambda _: y}[self.activation](
            active
        ) * gate

    def _out1(self, active: Tensor) -> Tensor:
        return self.out1(active)

    def _dropped(self, x: Tensor) -> Tensor:
        return self.drop(x.transpose(1, 2)).transpose(1, 2)


class S5Encoder(nn.Module):
    """A stack of `S5Layer`s (official StackedEncoderModel).

    Args:
        dim: Channels.
        depth: Layers.
        in_chans: Channels of the input, mapped to `dim`; None for `dim` of them and no map.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **layer: Of `S5Layer` and `S5`.
    """

    def __init__(
        self, dim: int, depth: int, in_chans: Optional[int] = None, device: Any = None, dtype: Any = None, **layer: Any
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.encoder = nn.Identity() if in_chans is None else nn.Linear(in_chans, dim, **dd)
        self.layers = nn.ModuleList(S5Layer(dim, **layer, **dd) for _ in range(depth))

    def forward(self, x: Tensor, reset: Optional[Tensor] = None) -> Tensor:
        """(b, l, in_chans) → (b, l, dim); `reset` (b, l) is True where a packed sequence starts."""
        return self.run(x, None, reset)[0]

    def run(
        self, x: Tensor, states: Optional[list[Tensor]] = None, reset: Optional[Tensor] = None
    ) -> tuple[Tensor, list[Tensor]]:
        """As `forward`, after `states`; also returns each layer's state after the last token."""
        x, last = self.encoder(x), []
        for index, layer in enumerate(self._stack()):
            x, state = layer.run(x, None if states is None else states[index], reset)
            last.append(state)
        return x, last

    def step(self, x: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """One token (b, in_chans) after `states`: its output (b, dim) and the next states."""
        x, last = self.encoder(x), []
        for layer, state in zip(self._stack(), states, strict=True):
            x, state = layer.step(x, state)
            last.append(state)
        return x, last

    def initial_state(self, batch: int) -> list[Tensor]:
        """What precedes a sequence: zeros (b, p) for every layer."""
        return [layer.initial_state(batch) for layer in self._stack()]

    def _stack(self) -> list[S5Layer]:
        return [layer for layer in self.layers if isinstance(layer, S5Layer)]


class S5Classifier(nn.Module):
    """Sequences to log-probabilities of classes (official BatchClassificationModel).

    Args:
        dim: Channels.
        depth: Layers.
        in_chans: Channels of the input.
        num_classes: Classes.
        pool: "pool" for the mean over tokens, "last" for the last token.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **layer: Of `S5Layer` and `S5`.
    """

    def __init__(
        self, dim: int, depth: int, in_chans: int, num_classes: int, pool: str = "pool", device: Any = None,
        dtype: Any = None, **layer: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if pool not in ("pool", "last"):
            raise ValueError(f"pool {pool!r} is not 'pool' or 'last'")
        self.pool = pool
        self.encoder = S5Encoder(dim, depth, in_chans, device=device, dtype=dtype, **layer)
        self.decoder = nn.Linear(dim, num_classes, device=device, dtype=dtype)

    def forward(self, x: Tensor, lengths: Optional[Tensor] = None) -> Tensor:
        """(b, l, in_chans) → (b, num_classes), log-probabilities; only the first `lengths` (b) tokens are pooled."""
        x = self.encoder(x)
        if self.pool == "last":
            x = x[:, -1] if lengths is None else x[torch.arange(len(x), device=x.device), lengths - 1]
        elif lengths is None:
            x = x.mean(1)
        else:
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            x = (x * valid[..., None]).sum(1) / lengths[:, None]
        return self.decoder(x).log_softmax(-1)


def s5_from_flax(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the official flax modules, by "/"-joined paths, under our names."""
    found = {}
    for path, x in weights.items():
        name = re.sub(r"layers_(\d+)", r"layers.\1", path.removeprefix("params/").removeprefix("batch_stats/"))
        name = name.replace("/", ".")
        if name.endswith(".kernel"):
            x = x.T.contiguous()
        for flax, ours in (("kernel", "weight"), ("scale", "weight"), ("mean", "running_mean"), ("var", "running_var")):
            name = re.sub(rf"\.{flax}$", f".{ours}", name)
        found[name] = x
        if name.endswith("running_mean"):
            found[name.replace("running_mean", "num_batches_tracked")] = torch.zeros((), dtype=torch.long)
    return found


def _drive(u: Tensor, B_bar: Tensor) -> Tensor:
    """B_bar u, (..., p) complex, by one real product whose outputs are re, im, re, im, ..."""
    weight = torch.view_as_real(B_bar).transpose(1, 2).flatten(0, 1)
    return torch.view_as_complex(F.linear(wide(u).to(weight.dtype), weight).unflatten(-1, (-1, 2)))


def _initial_basis(init: str, size: int, conj_sym: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors and their inverse of one block; of all states, or of one of each conjugate pair."""
    if init == "ptd":
        system = ptd(size)
        found = system.Lambda, system.V, system.V_inv
        return found if conj_sym else _with_conjugates(*found)
    if conj_sym:
        Lambda, _, _, V = nplr("legs", size)
    else:  # of any size: an odd one has a real eigenvalue
        normal = hippo("legsd", size)[0]
        imaginary, V = torch.linalg.eigh(-1j * normal)
        Lambda = torch.complex(normal.diagonal(), imaginary)
    return Lambda, V, V.mH


def _with_conjugates(Lambda: Tensor, V: Tensor, V_inv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In ascending order of the imaginary part, as the official eigenvalues are."""
    pairs = Lambda.conj().flip(0), V.conj().flip(1), V_inv.conj().flip(0)
    return torch.cat([Lambda, pairs[0]]), torch.cat([V, pairs[1]], 1), torch.cat([V_inv, pairs[2]])


def _lecun_normal(shape: tuple[int, ...], fan_in: int, device: torch.device) -> Tensor:
    std = 1 / math.sqrt(fan_in)
    drawn = torch.empty(shape, dtype=torch.float64, device=device)
    return nn.init.trunc_normal_(
        drawn, std=std / _TRUNCATED_STD, a=-2 * std / _TRUNCATED_STD, b=2 * std / _TRUNCATED_STD
    )
