"""Perturb-then-diagonalize initialization (S4-PTD and S5-PTD, arXiv:2310.01698).

HiPPO matrices diagonalize only in name: the eigenvectors of LegS are so near to each other that float64 loses them
(condition 8e10 for 16 states). S4D drops the part that resists, and its transfer function is then another one. PTD adds
a small perturbation E instead and diagonalizes A + E exactly.

Letters: n state size, s = n / 2 states of which each stands for a conjugate pair, w frequencies.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from ssmvision.layers.hippo import hippo

__all__ = ["PTD", "diagonalize", "ptd", "transfer_function"]

_CANDIDATES, _ATTEMPTS, _MOVES = 16, 500, 300
_MANY = 16  # states, whose perturbations need no improvement
# The eigenvalues of LegS are real, and the fewer there are, the larger the perturbation that makes pairs of them.
_RELATIVE = {2: 6.1e-2, 4: 1e-2, 6: 3e-3, 8: 1e-3, 10: 1e-3, 12: 5e-4, 14: 3e-4}


@dataclass(frozen=True)
class PTD:
    """A perturbed and diagonalized system, one of each conjugate pair kept.

    Args:
        Lambda: Eigenvalues (s), complex128, real and imaginary parts negative, by ascending imaginary part.
        V: Eigenvectors (n, s), complex128: an output vector C becomes C V. Each is as long as its row of V^-1.
        V_inv: (s, n), complex128: an input vector B becomes V^-1 B.
        condition: Condition number of all n eigenvectors, of unit length each.
        deviation: Of the transfer function from that of the unperturbed system, at frequencies up to 2 n^2 and at the
            eigenvalues, relative to its largest value: the worst of 16 random output vectors.
    """

    Lambda: Tensor
    V: Tensor
    V_inv: Tensor
    condition: float
    deviation: float


def ptd(n: int, relative: Optional[float] = None, measure: str = "legs", seed: int = 0) -> PTD:
    """A + E = V diag(Lambda) V^-1 for a Gaussian E, stable by construction.

    Of 16 stable perturbations that which deviates least is taken, and improved upon where n < 16. The default keeps the
    deviation of LegS below 5 % for 2 to 64 states, with a condition near 1e4 for 16 and more; a larger E conditions
    better and deviates more, and near 1e-2 no perturbation of 64 states is stable.

    Args:
        n: State size, even.
        relative: Spectral norm of E over that of A; None for 1e-4, for half of it above 48 states, and below 16 for
            what makes eigenvalues complex.
        measure: One of `hippo.MEASURES`.
        seed: Of the first E.

    Raises:
        ValueError: n is odd; or no perturbation of that size was found that is stable and without real eigenvalues,
            which cannot be stored as conjugate pairs.
    """
    if n % 2:
        raise ValueError(f"the state size {n} is odd: eigenvalues come in conjugate pairs")
    relative = _RELATIVE.get(n, 1e-4 if n <= 48 else 5e-5) if relative is None else relative
    A, B = hippo(measure, n)
    size = relative * torch.linalg.matrix_norm(A, 2)
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[PTD, Tensor]] = []
    for _ in range(_ATTEMPTS):
        E = _gaussian(n, generator)
        if (system := _perturbed(A, B, size, E)) is not None:
            found.append((system, E))
        if len(found) == _CANDIDATES:
            break
    if not found:
        raise ValueError(
            f"no perturbation of relative size {relative:g} makes {measure!r} with {n} states stable and all its "
            "eigenvalues complex"
        )
    best, E = min(found, key=lambda candidate: candidate[0].deviation)
    return _improved(best, E, A, B, size, generator) if n < _MANY else best


def diagonalize(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n) by ascending imaginary, then real part, and eigenvectors (n, n) of a real (n, n) matrix."""
    Lambda, V = torch.linalg.eig(A.double())
    order = Lambda.real.argsort(stable=True)
    order = order[Lambda.imag[order].argsort(stable=True)]
    return Lambda[order], V[:, order]


def transfer_function(Lambda: Tensor, CB: Tensor, omega: Tensor) -> Tensor:
    """G(i omega) = sum_n CB_n / (i omega - Lambda_n) of a diagonal system.

    Args:
        Lambda: All eigenvalues (n), both of each pair.
        CB: Products of output and input coefficients (..., n).
        omega: Angular frequencies (w), real.

    Returns:
        (..., w), complex.
    """
    return (CB[..., None, :] / (1j * omega[:, None] - Lambda)).sum(-1)


def _gaussian(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, n, dtype=torch.float64, generator=generator)


def _perturbed(A: Tensor, B: Tensor, size: Tensor, E: Tensor) -> Optional[PTD]:
    """The system with E, scaled to `size`, added to A; None if it cannot be used."""
    Lambda, V = diagonalize(A + size / torch.linalg.matrix_norm(E, 2) * E)
    usable = Lambda.real.max() < 0 and Lambda.imag.count_nonzero() == len(A)
    return _measured(Lambda, V, A, B) if usable else None


def _improved(best: PTD, E: Tensor, A: Tensor, B: Tensor, size: Tensor, generator: torch.Generator) -> PTD:
    """Ever smaller random moves of E, each kept if the system deviates less.

    Few states are far from having complex eigenvalues: chance alone finds no E for 2 of them that deviates below 5 %.
    """
    n = len(A)
    for move in range(_MOVES):
        E = E / torch.linalg.matrix_norm(E, 2)
        moved = E + 0.5 * 0.99**move / n * _gaussian(n, generator)
        system = _perturbed(A, B, size, moved)
        if system is not None and system.deviation < best.deviation:
            best, E = system, moved
    return best


def _measured(Lambda: Tensor, V: Tensor, A: Tensor, B: Tensor) -> PTD:
    n = len(A)
    C = torch.randn(16, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(V)
    omega = torch.cat([torch.logspace(-2, 0, 20), torch.linspace(1, 2 * n * n, 100)]).double()
    omega = torch.cat([omega, Lambda.imag[Lambda.imag > 0]])
    exact = C @ torch.linalg.solve(1j * omega[:, None, None] * torch.eye(n) - A, B.to(V)).T
    inverse = torch.linalg.inv(V)
    error = transfer_function(Lambda, (C @ V) * (inverse @ B.to(V)), omega) - exact
    deviation = (error.abs().amax(-1) / exact.abs().amax(-1)).max().item()
    half, condition = n // 2, torch.linalg.cond(V).item()
    # With eigenvectors of unit length B begins 1e5 times as large as C, and a usual step of C shakes the kernel.
    balance = (inverse.norm(dim=1) / V.norm(dim=0)).sqrt()
    V, inverse = V * balance, inverse / balance[:, None]
    return PTD(Lambda[:half], V[:, :half], inverse[:half], condition, deviation)
