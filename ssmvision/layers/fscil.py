"""The neck and head of Mamba-FSCIL, which learns new classes from a few pictures (arXiv:2407.06136), and its losses."""

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmvision.layers.mamba import S6Branch
from ssmvision.layers.s6 import auto_dt_rank, cross_routes
from ssmvision.layers.ss2d import SS2D
from ssmvision.ops import routes as scan_routes


class Scanned(NamedTuple):
    """What a branch computes from a map: its output and what the class-sensitive losses read.

    Attributes:
        y: (b, d, h * w).
        gate: The gate before its activation, (b, d, h * w) or (b, h, w, d).
        dts: Low-rank step sizes, (b, k, r, h * w) along k routes.
        Bs: Input matrices, (b, k, n, h * w).
        Cs: Output matrices, (b, k, n, h * w).
    """

    y: Tensor
    gate: Tensor
    dts: Tensor
    Bs: Tensor
    Cs: Tensor


class NeckOutput(NamedTuple):
    """What `FSCILNeck` returns.

    Attributes:
        out: Features, (b, out_channels).
        residual: What the newest branch was added to, (b, out_channels).
        base: The branch of the base classes.
        novel: The branch of the novel classes, if there is one.
    """

    out: Tensor
    residual: Tensor
    base: Scanned
    novel: Optional[Scanned]

    @property
    def main(self) -> Tensor:
        """The gate of the newest branch."""
        return (self.novel or self.base).gate


class FourOrderMamba(S6Branch):
    """One Mamba over a map in four orders, along rows, columns and both reversed, summed; without output projection.

    Args:
        dim: Channels of input and output.
        d_state: Size of the state per channel.
        dt_rank: Rank of the step-size projection; None for ceil(dim / 16).
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self, dim: int, d_state: int, dt_rank: Optional[int] = None, device: Any = None, dtype: Any = None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, d_state, d_conv=4, dt_rank=dt_rank or auto_dt_rank(dim), **dd)
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Scanned:
        """(b, h, w, dim) → its scan."""
        routes = _routes(x)
        u, z = self.in_proj(x).flatten(1, 2).transpose(1, 2).chunk(2, dim=1)
        # The parameters are those of all routes, so these are entries of one batch.
        y = self.mix(*(m[..., routes].transpose(1, 2).flatten(0, 1) for m in (u, z)))
        back = scan_routes.inverse(routes).unsqueeze(1).expand(-1, self.d_inner, -1).repeat(x.shape[0], 1, 1)
        y = y.gather(2, back).unflatten(0, (-1, len(routes))).sum(1)
        coefficients = self.coefficients(self.convolve(u)[0].transpose(1, 2))
        # The official code undoes the reversed orders along channels. Losses rely on it, features do not.
        gate = 2 * (z + z.flip(1, 2))
        return Scanned(y, gate, *(m.transpose(1, 2).unsqueeze(1) for m in coefficients))


class GatedSS2D(SS2D):
    """`SS2D` with a gate and without output projection.

    Args:
        dim: Channels of input and output.
        d_state: Size of the state per channel.
        dt_rank: Rank of the step-size projection; None for ceil(dim / 16).
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self, dim: int, d_state: int, dt_rank: Optional[int] = None, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(
            dim, d_state, ssm_ratio=1, dt_rank=dt_rank, conv_bias=True, gate=True, device=device, dtype=dtype
        )
        del self.out_proj

    def forward(self, x: Tensor) -> Scanned:  # type: ignore[override]  # a part of SS2D's, with more results
        """(b, h, w, dim) → its scan."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.act(self.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        y = self.out_norm(self.scan(u)) * self.act(z)
        return Scanned(y.flatten(1, 2).transpose(1, 2), z, *self._coefficients(u))

    def scan(self, u: Tensor) -> Tensor:
        """The four scans alone, (b, h, w, d_inner) → the same."""
        y = self.scan_tokens(u.flatten(1, 2), _routes(u))
        return y.transpose(1, 2).reshape(u.shape)

    def _coefficients(self, u: Tensor) -> tuple[Tensor, ...]:
        """Of all routes, in the order in which each visits the tokens."""
        visited = u.flatten(1, 2)[:, _routes(u)]  # (b, k, l, d)
        projected = torch.einsum("bkld,kcd->bkcl", visited, self.x_proj_weight)
        return projected.split([self.dt_rank, self.d_state, self.d_state], dim=2)


class FSCILNeck(nn.Module):
    """Features of a backbone's last map: its mean, plus a selective scan, plus another that only new classes train.

    Args:
        in_channels: Channels of the map.
        out_channels: Channels of the features.
        feat_size: Height and width of the map.
        mid_channels: Hidden channels of the projections; None for 2 in_channels.
        d_state: Size of the state per channel.
        dt_rank: Rank of the step-size projection; None for ceil(out_channels / 16).
        version: "ssm", one Mamba over four orders, or "ss2d", VMamba's scan with parameters for each direction.
        num_layers: Convolutions of the projection before the scan.
        num_layers_new: The same in the branch of new classes; None for num_layers.
        use_new_branch: Have that branch.
        use_residual_proj: Project the mean of the map; otherwise in_channels must be out_channels.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        in_channels: int = 512,
        out_channels: int = 512,
        feat_size: int = 2,
        mid_channels: Optional[int] = None,
        d_state: int = 256,
        dt_rank: Optional[int] = None,
        version: str = "ssm",
        num_layers: int = 2,
        num_layers_new: Optional[int] = None,
        use_new_branch: bool = False,
        use_residual_proj: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if version not in ("ssm", "ss2d"):
            raise ValueError(f"FSCILNeck: version must be 'ssm' or 'ss2d', not {version!r}")
        if not use_residual_proj and in_channels != out_channels:
            raise ValueError(f"FSCILNeck: {in_channels} channels become {out_channels} only with use_residual_proj")
        dd = {"device": device, "dtype": dtype}
        self.feat_size, self.use_new_branch = feat_size, use_new_branch
        widths = (in_channels, mid_channels or 2 * in_channels, out_channels)
        block = FourOrderMamba if version == "ssm" else GatedSS2D
        pos_embed = (1, feat_size**2, out_channels)
        self.mlp_proj = _projection(widths, num_layers, feat_size, dd)
        self.pos_embed = nn.Parameter(torch.empty(pos_embed, **dd))
        self.block = block(out_channels, d_state, dt_rank, **dd)
        if use_new_branch:
            self.mlp_proj_new = _projection(widths, num_layers_new or num_layers, feat_size, dd)
            self.pos_embed_new = nn.Parameter(torch.empty(pos_embed, **dd))
            self.block_new = block(out_channels, d_state, dt_rank, **dd)
        self.residual_proj = nn.Linear(in_channels, out_channels, bias=False, **dd) if use_residual_proj else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Position embeddings, scans, and a gate of the new branch that lets nothing through before it has learned."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.block.reset_parameters()
        if self.use_new_branch:
            nn.init.trunc_normal_(self.pos_embed_new, std=0.02)
            self.block_new.reset_parameters()
            nn.init.zeros_(self.block_new.in_proj.weight[self.pos_embed_new.shape[-1] :])

    def forward(self, x: Tensor) -> NeckOutput:
        """A map (b, in_channels, feat_size, feat_size) → `NeckOutput`; the new branch sends no gradient to the map."""
        if x.shape[2:] != (self.feat_size, self.feat_size):
            raise ValueError(f"FSCILNeck: the map is {tuple(x.shape[2:])}, expected {(self.feat_size,) * 2}")
        residual = x.mean((2, 3))
        residual = residual if self.residual_proj is None else self.residual_proj(residual)
        base = self.block(_tokens(self.mlp_proj(x), self.pos_embed))
        out = residual + base.y.mean(-1)
        if not self.use_new_branch:
            return NeckOutput(out, residual, base, None)
        novel = self.block_new(_tokens(self.mlp_proj_new(x.detach()), self.pos_embed_new))
        return NeckOutput(out + novel.y.mean(-1), out, base, novel)


class ETFHead(nn.Module):
    """A classifier that is not trained: one direction per class, all equally far apart (NC-FSCIL, arXiv:2302.03004).

    The directions form a simplex equiangular tight frame, where trained classifiers end up; those of classes to come
    are there from the beginning, so that learning a class moves no other. With U of orthonormal columns they are the
    rows of sqrt(k / (k - 1)) (1 - 1/k) U^T: unit vectors with cosines -1 / (k - 1).

    Args:
        in_features: Features, at least `num_classes`.
        num_classes: Classes k of all sessions, at least 2.
        seed: Of the frame's orientation.
        device: Device of the frame.
        dtype: Type of the frame.
    """

    weight: Tensor

    def __init__(
        self, in_features: int, num_classes: int, seed: int = 0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        if not 2 <= num_classes <= in_features:
            raise ValueError(f"ETFHead: num_classes must be 2 to in_features = {in_features}, not {num_classes}")
        drawn = torch.randn(
            in_features, num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        U = torch.linalg.qr(drawn)[0]
        frame = (U - U.mean(1, keepdim=True)) * (num_classes / (num_classes - 1)) ** 0.5
        self.register_buffer("weight", frame.T.contiguous().to(device=device, dtype=dtype or torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """Features (b, in_features) → cosines with the classes, (b, num_classes)."""
        return F.linear(F.normalize(x, dim=-1), self.weight)


def dot_regression_loss(cosines: Tensor, target: Tensor) -> Tensor:
    """Pull features toward the fixed direction of their class, and push them from none (NC-FSCIL, arXiv:2302.03004).

    Args:
        cosines: Of `ETFHead`, (b, classes).
        target: Classes (b,).

    Returns:
        The mean of (cosine - 1)^2 / 2.
    """
    return 0.5 * (cosines.gather(1, target[:, None]) - 1).square().mean()


def suppression_loss(main: Tensor, novel: Tensor) -> tuple[Tensor, Tensor]:
    """Quiet the new branch for base classes, and reward it for novel ones.

    Args:
        main: `NeckOutput.main`.
        novel: Boolean (b,), True for samples of novel classes.

    Returns:
        Norms of the gates of base and, negative, of novel samples, over their number of elements; NaN without any.
    """
    base, new = main[~novel], main[novel]
    return base.norm() / base.numel(), -new.norm() / new.numel()


def separation_loss(coefficients: Tensor, novel: Tensor, dims: tuple[int, ...] = (0, 1, 3)) -> Tensor:
    """Let coefficients of base and novel classes point in different directions.

    Args:
        coefficients: dts, Bs or Cs of `Scanned`.
        novel: Boolean (b,), True for samples of novel classes; of both kinds there must be some.
        dims: Averaged over, the batch among them.

    Returns:
        The mean absolute difference between the cosine similarities of both means and the identity.
    """
    means = torch.stack([coefficients[group].mean(dims).flatten() for group in (~novel, novel)])
    directions = F.normalize(means, dim=1)
    return (directions @ directions.T - torch.eye(2, device=means.device, dtype=means.dtype)).abs().mean()


def _routes(x: Tensor) -> Tensor:
    """Along rows, back, along columns, back, over x (b, h, w, c): (4, h * w). VMamba swaps the middle two."""
    return cross_routes(x)[[0, 2, 1, 3]]


def _projection(widths: tuple[int, int, int], layers: int, size: int, dd: dict[str, Any]) -> nn.Sequential:
    """Convolutions of single pixels; between them norms over the whole map and leaky ReLUs."""
    dim, mid, out = widths
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Conv2d(dim, mid, 1, **dd), nn.LayerNorm([mid, size, size], **dd), nn.LeakyReLU(0.1)]
        dim = mid
    return nn.Sequential(*modules, nn.Conv2d(dim, out, 1, bias=False, **dd))


def _tokens(x: Tensor, pos_embed: Tensor) -> Tensor:
    """A map (b, d, h, w) with its position embedding (1, h * w, d), channels last."""
    x = x.permute(0, 2, 3, 1)
    return x + pos_embed.unflatten(1, x.shape[1:3])
