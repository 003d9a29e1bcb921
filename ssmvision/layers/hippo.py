"""HiPPO: state matrices that remember a signal by its coefficients in a basis of functions, and what is made of them.

x' = A x + B u keeps the best approximation of u's past under a measure (HiPPO, arXiv:2008.07669; "How to Train Your
HiPPO", arXiv:2206.12037). S4 (2111.00396) diagonalizes A up to a correction of low rank, S4D (2206.11893) drops the
correction. All matrices are float64; they agree with github:state-spaces/s4.

Letters: n state size, r rank, s = n / 2 states of which each stands for a conjugate pair.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import Tensor

__all__ = [
    "DIAGONAL_INITS", "MEASURES", "NPLR_MEASURES", "diagonal_init", "hippo", "hippo_low_rank", "init_log_dt_", "nplr",
]  # fmt: skip


def _legs(n: int) -> tuple[Tensor, Tensor]:
    root = (2 * _steps(n) + 1).sqrt()
    return -(torch.outer(root, root).tril(-1) + torch.diag(_steps(n) + 1)), root


def _legsd(n: int) -> tuple[Tensor, Tensor]:
    A, B = _legs(n)
    return A + 0.5 * torch.outer(B, B), 0.5 * B


def _legt(n: int) -> tuple[Tensor, Tensor]:
    root = (2 * _steps(n) + 1).sqrt()
    sign = _alternating(n).triu(1) + torch.ones(n, n, dtype=torch.float64).tril()
    return -0.5 * torch.outer(root, root) * sign, 0.5 * root


def _lmu(n: int) -> tuple[Tensor, Tensor]:
    odd = 2 * _steps(n) + 1
    sign = torch.ones(n, n, dtype=torch.float64).triu(1) + _alternating(n).tril()
    return -odd[:, None] * sign, _alternating(n)[0] * odd


def _lagt(n: int, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    return _lower(n, 0.5), beta * torch.ones(n, dtype=torch.float64)


def _tlagt(n: int, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    return _lower(n, (1 + beta) / 2), beta * torch.ones(n, dtype=torch.float64)


def _glagt(n: int, alpha: float = 0.0, beta: float = 0.01) -> tuple[Tensor, Tensor]:
    steps, offset = _steps(n), torch.tensor(alpha, dtype=torch.float64)
    choose = torch.lgamma(steps + offset + 1) - torch.lgamma(steps + 1)
    norm = torch.exp(0.5 * choose)
    scale = torch.exp(-0.5 * torch.lgamma(1 - offset)) * beta ** ((1 - alpha) / 2)
    B = torch.exp(choose - torch.lgamma(offset + 1)) / norm * scale
    return _lower(n, (1 + beta) / 2) * norm / norm[:, None], B


def _fourier(n: int, frequency: float = math.pi, damping: float = 1.0, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """Oscillators at `frequency` * (0, 1, 2, ...), damped through the input vector."""
    B = _fourier_input(n)
    return _oscillators(n, frequency) - damping * torch.outer(B, B), gain * B


def _fourier_diag(n: int) -> tuple[Tensor, Tensor]:
    return _oscillators(n, 2 * math.pi) - 0.5 * torch.eye(n, dtype=torch.float64), _fourier_input(n)


MEASURES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "legs": _legs,
    "legsd": _legsd,
    "legt": _legt,
    "lmu": _lmu,
    "lagt": _lagt,
    "tlagt": _tlagt,
    "glagt": _glagt,
    "fourier": _fourier,
    "fout": _fourier,
    "fourier_decay": lambda n: _fourier(n, damping=0.5, gain=0.5),
    "fourier2": lambda n: _fourier(n, frequency=2 * math.pi, damping=2.0, gain=2.0),
    "fourier_diag": _fourier_diag,
    "foud": _fourier_diag,
}

# A + P^T P is normal; of the others no correction of low rank is known, or none is needed.
_LOW_RANK: dict[str, Callable[[int], Tensor]] = {
    "legs": lambda n: (_steps(n) + 0.5).sqrt()[None],
    "legsd": lambda n: torch.zeros(1, n, dtype=torch.float64),
    "legt": lambda n: _odd_and_even((_steps(n) + 0.5).sqrt()),
    "lagt": lambda n: torch.full((1, n), math.sqrt(0.5), dtype=torch.float64),
    "fourier": lambda n: _fourier_input(n)[None],
    "fout": lambda n: _fourier_input(n)[None],
    "fourier_decay": lambda n: _fourier_input(n)[None] * math.sqrt(0.5),
    "fourier2": lambda n: _fourier_input(n)[None] * math.sqrt(2),
    "fourier_diag": lambda n: torch.zeros(1, n, dtype=torch.float64),
    "foud": lambda n: torch.zeros(1, n, dtype=torch.float64),
}
NPLR_MEASURES = tuple(_LOW_RANK)


def hippo(measure: str, n: int, **measure_args: float) -> tuple[Tensor, Tensor]:
    """State and input matrix of a measure, with the sign of x' = A x + B u.

    Args:
        measure: "legs" (all of the past, scaled), "legt" (a sliding window; "lmu" in another scaling), "lagt", "tlagt",
            "glagt" (exponentially fading past), "fourier" or "fout" (sliding window, Fourier basis), its relatives
            "fourier_decay", "fourier2", "fourier_diag" or "foud", and "legsd" (the normal part of "legs").
        n: State size; even for Fourier bases.
        **measure_args: `beta` of "lagt", "tlagt" and "glagt", `alpha` of "glagt".

    Returns:
        A (n, n) and B (n), float64.

    Raises:
        ValueError: A measure that does not exist.
    """
    return _known(measure, MEASURES)(n, **measure_args)


def hippo_low_rank(measure: str, n: int, rank: int = 1) -> Tensor:
    """The correction P (rank, n) with which A + P^T P is normal (S4, arXiv:2111.00396, theorem 1).

    Raises:
        ValueError: A measure without such a correction, or a rank below that of its correction.
    """
    P = _known(measure, _LOW_RANK)(n)
    if rank < len(P):
        raise ValueError(f"the low-rank correction of {measure!r} has rank {len(P)}, not {rank}")
    return torch.cat([P, P.new_zeros(rank - len(P), n)])


def nplr(measure: str, n: int, rank: int = 1, B_clip: Optional[float] = 2.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A = V (diag(W) - P^T P*) V^H, one of each conjugate pair of eigenvalues kept (S4, arXiv:2111.00396, theorem 1).

    Args:
        measure: One of `NPLR_MEASURES`.
        n: State size, even.
        rank: Rows of P.
        B_clip: Largest imaginary part of B, as in the official initialization; None for B as it is. That of "legs" has
            entries up to 0.64 n, in the states that oscillate fastest.

    Returns:
        W (s) with imaginary parts <= 0, ascending; P (rank, s), B (s) and V (n, s), complex128. The phases of V's
        columns, and with them those of P and B, are arbitrary.
    """
    if n % 2:
        raise ValueError(f"the state size {n} is odd: eigenvalues come in conjugate pairs")
    (A, B), P = hippo(measure, n), hippo_low_rank(measure, n, rank)
    normal = A + P.T @ P
    imaginary, V = torch.linalg.eigh(-1j * normal)
    imaginary, V = imaginary[: n // 2], V[:, : n // 2]
    if imaginary[-1].abs() < 1e-4:
        # The eigenvalue 0 of a Fourier basis is a pair of its own: eigh gives any basis of its plane.
        V = V.clone()
        V[:, -1] = 0
        V[:2, -1] = torch.tensor([1, 1j], dtype=V.dtype) * math.sqrt(0.5)
    W = torch.complex(normal.diagonal().mean().expand(n // 2), imaginary)
    B, P = V.mH @ B.to(V), P.to(V) @ V.conj()
    return W, P, B if B_clip is None else torch.complex(B.real, B.imag.clamp(-B_clip, B_clip)), V


DIAGONAL_INITS = ("lin", "inv", "inv2", "quad", "real", "random", *(m for m in NPLR_MEASURES if m != "legt"))


def diagonal_init(init: str, n: int, B_clip: Optional[float] = 2.0) -> tuple[Tensor, Tensor]:
    """Eigenvalues and input vector of S4D (arXiv:2206.11893, section 4).

    Args:
        init: "lin", "inv", "inv2", "quad", "real"; "random", drawn anew at each call, which others are held against: a
            log-normal real part around the -1/2 of most others, a half-normal imaginary part; or a measure of
            `NPLR_MEASURES` ("legs", ...) whose low-rank correction is dropped, but "legt", all of whose damping is in
            its correction of rank 2. With or without "diag-" before it.
        n: State size, even.
        B_clip: See `nplr`; for measures.

    Returns:
        A and B (s), complex128; each stands for a conjugate pair.

    Raises:
        ValueError: An initialization that does not exist, or "legt".

    Warns:
        UserWarning: A measure whose damping is all in the dropped correction ("lagt", "fourier", ...): A is imaginary.
    """
    init, steps = init.removeprefix("diag-"), _steps(n // 2)
    if init == "legt":
        raise ValueError(
            "no state of 'legt' fades without its low-rank correction: use S4Kernel with rank=2, or 'legs'"
        )
    if init not in DIAGONAL_INITS:
        raise ValueError(f"there is no initialization {init!r}; known: {', '.join(DIAGONAL_INITS)}")
    if init in _LOW_RANK:
        W, _, B, _ = nplr(init, n, B_clip=B_clip)
        if W.real.max() > -1e-9:
            kept = "S4Kernel keeps it, and 'legs' or 'foud' fade without"
            warnings.warn(f"no state of {init!r} fades without its low-rank correction: {kept}", stacklevel=2)
        return W, B
    ones = torch.ones(n // 2, dtype=torch.complex128)
    if init == "real":
        return torch.complex(-(steps + 1), torch.zeros_like(steps)), ones
    if init == "random":
        return torch.complex(-0.5 * torch.randn_like(steps).exp(), -torch.randn_like(steps).abs()), ones
    imaginary = {
        "lin": math.pi * steps,
        "inv": n / math.pi * (n / (2 * steps + 1) - 1),
        "inv2": n / math.pi * (n / (steps + 1) - 1),
        "quad": (1 + 2 * steps) ** 2 / math.pi,
    }[init]
    return torch.complex(torch.full_like(steps, -0.5), -imaginary), ones


def init_log_dt_(log_dt: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1) -> None:
    """Logarithms of step sizes, log-uniform in [dt_min, dt_max].

    A step dt covers about 1 / dt tokens ("How to Train Your HiPPO", arXiv:2206.12037, section 3.3): choose
    [1 / longest, 1 / shortest] dependence. Path-X, with 16384 tokens, needs dt_min = 1e-4.
    """
    torch.nn.init.uniform_(log_dt, math.log(dt_min), math.log(dt_max))


def _known(measure: str, table: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    if measure not in table:
        raise ValueError(f"there is no measure {measure!r} here; known: {', '.join(table)}")
    return table[measure]


def _steps(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float64)


def _alternating(n: int) -> Tensor:
    """(-1)^(row - column), (n, n)."""
    sign = 1 - 2 * (_steps(n) % 2)
    return torch.outer(sign, sign)


def _lower(n: int, diagonal: float) -> Tensor:
    return -torch.ones(n, n, dtype=torch.float64).tril(-1) - diagonal * torch.eye(n, dtype=torch.float64)


def _odd_and_even(P: Tensor) -> Tensor:
    odd = (torch.arange(len(P)) % 2).bool()
    return torch.stack([P.masked_fill(~odd, 0), P.masked_fill(odd, 0)])


def _oscillators(n: int, frequency: float) -> Tensor:
    between = torch.stack([torch.zeros(n // 2, dtype=torch.float64), frequency * _steps(n // 2)], -1).flatten()[1:]
    return torch.diag(between, -1) - torch.diag(between, 1)


def _fourier_input(n: int) -> Tensor:
    B = torch.zeros(n, dtype=torch.float64)
    B[::2] = math.sqrt(2)
    B[0] = 1
    return B
