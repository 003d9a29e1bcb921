"""Refinements of Mamba layers that follow from how their tokens move, and the matrix that decides it.

Paper: "Demystifying the token dynamics of deep selective state space models", ICLR 2025 (arXiv:2410.03292). A deep
stack of residual scans is a flow of its tokens u (l, d). Without the skip D, with step sizes δ_ld =
softplus(dt_proj(S_δ u_l) + bias) and their sums s_ld = Σ_{j ≤ l} δ_jd:

    du_ld / dt = Σ_{j ≤ l} Σ_n (S_C u_l)_n (S_B u_j)_n exp(A_dn (s_ld - s_jd)) δ_jd u_jd

With one A for all states this reads Σ_j (u_lᵀ M u_j) exp(A_d (s_ld - s_jd)) δ_jd u_jd, where M = S_Cᵀ S_B (d, d) is
the input-output matrix; S_δ, S_B and S_C (n, d) are rows of `x_proj`. In one dimension all tokens converge to zero if
M < 0, and diverge, each at a rate of its own, if M > 0.
"""

import math
from typing import Any, List

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_OUTPUT = ("free", "positive", "negative")


class TiedProjection(nn.Module):
    """An `x_proj` whose input-output matrix is definite by construction: S_C = S_B, or S_C = -S_B.

    The paper asks for a positive definite matrix; the parametrization is ours. Where states have decays of their own,
    the matrix between two tokens is Σ_n exp(A_n δ) c_n b_nᵀ with the rows b_n, c_n of S_B, S_C. Its symmetric part is
    positive semidefinite whatever the decays are, if and only if each c_n is a multiple s_n ≥ 0 of b_n, and b_n may
    take √s_n of it: to tie the rows loses none of these matrices. M = S_Bᵀ S_B is positive definite on the span of the
    rows of S_B and zero beyond, where every input-output matrix is zero.

    Args:
        d: Channels.
        dt_rank: Rank of the step-size projection.
        d_state: Size of the state per channel.
        sign: 1 for a positive, -1 for a negative definite matrix.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self, d: int, dt_rank: int, d_state: int, sign: int = 1, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.dt_rank, self.sign = dt_rank, sign
        self.rows = nn.Parameter(torch.empty(dt_rank + d_state, d, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As a linear layer."""
        nn.init.kaiming_uniform_(self.rows, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """Rows of S_δ, S_B and S_C: (r + 2n, d), as the weight of the linear layer that this one replaces."""
        return torch.cat([self.rows, self.sign * self.rows[self.dt_rank :]])

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) → (..., r + 2n)."""
        return F.linear(x, self.weight)


def make_x_proj(
    d: int, dt_rank: int, d_state: int, input_output: str = "free", device: Any = None, dtype: Any = None
) -> Any:
    """The projection to step sizes, B and C: (..., d) → (..., r + 2n).

    Args:
        d: Channels.
        dt_rank: Rank of the step-size projection.
        d_state: Size of the state per channel.
        input_output: "free" for a linear layer; "positive" or "negative" for a definite input-output matrix. A
            negative one drives tokens to zero: it is there to see what that costs.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """
    if input_output not in INPUT_OUTPUT:
        raise ValueError(f"input_output must be one of {', '.join(INPUT_OUTPUT)}, not {input_output!r}")
    dd = {"device": device, "dtype": dtype}
    if input_output == "free":
        return nn.Linear(d, dt_rank + 2 * d_state, bias=False, **dd)
    return TiedProjection(d, dt_rank, d_state, 1 if input_output == "positive" else -1, **dd)


def constrain_input_output(model: nn.Module, input_output: str = "positive") -> int:
    """Constrains every layer of a model that has weights already, in place, and returns how many projections it tied.

    S_B stays as it is, S_C follows from it. Layers whose `x_proj` is a module are constrained (Mamba, BiMamba,
    TriMamba, MambaVisionMixer, PlainMambaMixer); parameters change, so make the optimizer afterwards.

    Args:
        model: A layer or a model.
        input_output: "positive" or "negative".

    Raises:
        ValueError: No layer can be constrained, or the value is another one.
    """
    if input_output not in INPUT_OUTPUT[1:]:
        raise ValueError(f"input_output must be 'positive' or 'negative', not {input_output!r}")
    found: List[Any] = [
        (layer, name, child)
        for layer in model.modules()
        for name, child in layer.named_children()
        if name.startswith("x_proj") and isinstance(child, nn.Linear)
    ]
    for layer, name, child in found:
        r, w = layer.dt_rank, child.weight
        n = (w.shape[0] - r) // 2
        tied = make_x_proj(w.shape[1], r, n, input_output, device=w.device, dtype=w.dtype)
        with torch.no_grad():
            tied.rows.copy_(w[: r + n])
        setattr(layer, name, tied)
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear x_proj to constrain")
    return len(found)


def scan_projections(layer: Any) -> List[Tensor]:
    """The weights (r + 2n, d) that make step sizes, B and C of a layer's scans, in order; empty for other modules."""
    if not hasattr(layer, "dt_rank"):
        return []
    stacked = getattr(layer, "x_proj_weight", None)
    if stacked is not None:
        return list(stacked.reshape(-1, *stacked.shape[-2:]))
    return [child.weight for name, child in layer.named_children() if name.startswith("x_proj")]


def input_output_eigenvalues(S_B: Tensor, S_C: Tensor) -> Tensor:
    """Eigenvalues of (M + Mᵀ) / 2 with M = S_Cᵀ S_B, ascending, without those d - 2n that are zero by its rank.

    The symmetric part, since u_lᵀ M u_l is all that a token adds to its own growth.

    Args:
        S_B: (n, d).
        S_C: (n, d).

    Returns:
        (min(2n, d),), in float64.
    """
    # (M + Mᵀ) / 2 = Vᵀ K V with the rows V of both; with Vᵀ = Q R its nonzero eigenvalues are those of R K Rᵀ.
    rows = torch.cat([S_B, S_C]).double()
    r = torch.linalg.qr(rows.T, mode="r").R
    of_B, of_C = r.split([S_B.shape[0], S_C.shape[0]], dim=1)
    m = of_C @ of_B.T
    found = torch.linalg.eigvalsh((m + m.T) / 2)
    return torch.where(found.abs() > 1e-9 * found.abs().max(), found, 0)  # tied rows leave rounding errors


def soft_sort(scores: Tensor, tau: float) -> Tensor:
    """SoftSort (arXiv:2006.16038): a relaxed permutation that sorts, softmax(-|sort(s)_i - s_j| / τ) over j.

    Args:
        scores: (b, l).
        tau: Temperature; a permutation matrix in the limit of 0 if no scores are equal.

    Returns:
        (b, l, l): row i weighs the tokens that may come to place i, in ascending order of scores.
    """
    ranked = scores.sort(dim=1, stable=True).values
    return torch.softmax(-(ranked.unsqueeze(2) - scores.unsqueeze(1)).abs() / tau, dim=2)


class ImportanceOrder(nn.Module):
    """A mixer over tokens in the order of a learned importance score, put back afterwards: Pᵀ mixer(P x).

    P sorts the scores s = <k, x> by `soft_sort`. Where tokens diverge, those that come late collect from all before
    and grow the fastest, so the order decides how much each contributes. Ascending or descending is the sign of k,
    which is learned. Memory grows with the square of the number of tokens; sequences that were packed into one must
    not be sorted together.

    Ours, as the paper's constants are not known to us: by default tokens are permuted exactly and only gradients see
    the relaxed P (straight-through), so that no token is blended with others and equal scores leave the order as it is.

    Args:
        dim: Channels of a token.
        mixer: Any layer over tokens, (b, l, dim) → the same.
        tau: Temperature of the soft sort, in units of the score.
        hard: Permute exactly; otherwise by the relaxed P itself.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, tau: float = 1.0, hard: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"ImportanceOrder: tau must be positive, not {tau}")
        self.tau, self.hard = tau, hard
        self.score = nn.Linear(dim, 1, bias=False, device=device, dtype=dtype)
        self.mixer = mixer

    def order(self, x: Tensor) -> Tensor:
        """P of tokens (b, l, dim): (b, l, l)."""
        scores = self.score(x).squeeze(2)
        soft = soft_sort(scores, self.tau).to(x.dtype)
        if not self.hard:
            return soft
        places = scores.argsort(dim=1, stable=True)
        exact = F.one_hot(places, x.shape[1]).to(x.dtype)
        return exact + (soft - soft.detach())  # the bracket is zero to the bit

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, dim) → the same."""
        order = self.order(x)
        return order.transpose(1, 2) @ self.mixer(order @ x)
