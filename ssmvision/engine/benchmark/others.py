"""The scans that a user could install instead, where they are installed: pip install "ssmvision[benchmark]"."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmvision.ops import causal_conv1d, selective_scan

from .operators import OpShape, _inputs, _native
from .timing import interleaved


@torch.no_grad()
def measure_others(shape: OpShape, repeats: int) -> dict[str, tuple[float, float] | None]:
    """Milliseconds (ours, theirs) of forward passes by package; None where it is not installed."""
    found: dict[str, tuple[float, float] | None] = {}
    for package, pair in (("mambapy", _mambapy), ("transformers", _transformers)):
        found[package] = _time(package, *pair(shape), repeats) if find_spec(package) else None
    return found


def _time(package: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], repeats: int) -> tuple[float, float]:
    a, b = ours(), theirs()
    if (error := ((a - b).abs().max() / b.abs().max()).item()) > 1e-4:
        raise RuntimeError(f"{package} disagrees with us, nothing is measured: error {error:.1e}")
    times = interleaved({"ours": ours, "theirs": theirs}, repeats)
    return times["ours"], times["theirs"]


def _mambapy(shape: OpShape) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Its parallel scan, with decays and drives as it wants them: (b, l, d, n)."""
    from mambapy.pscan import pscan

    inputs = _inputs(shape)
    u, delta, A, B, C, D, bias = inputs

    def theirs() -> Tensor:
        step = F.softplus(delta + bias[:, None]).transpose(1, 2)
        tokens, B_, C_ = u.transpose(1, 2), B[:, 0].transpose(1, 2), C[:, 0].transpose(1, 2)
        h = pscan(torch.exp(step[..., None] * A), (step * tokens)[..., None] * B_[:, :, None])
        return ((h @ C_[..., None]).squeeze(-1) + D * tokens).transpose(1, 2)

    return lambda: _native(*inputs), theirs


def _transformers(shape: OpShape) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Its Mamba mixer without CUDA kernels, and the same mixer on our operators."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=shape.channels // 2, state_size=shape.states, expand=2, num_hidden_layers=1)
    mixer = MambaMixer(config, layer_idx=0).eval()
    x = torch.randn(shape.batch, shape.tokens, shape.channels // 2)
    return lambda: _mixer(mixer, x), lambda: mixer(x)


def _mixer(mixer: Any, x: Tensor) -> Tensor:
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    u = causal_conv1d(u.transpose(1, 2), mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias, silu=True)
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]
    delta, B, C = mixer.x_proj(u.transpose(1, 2)).transpose(1, 2).split(sizes, dim=1)
    y, _ = selective_scan(
        u, delta, -torch.exp(mixer.A_log), B, C, mixer.D, z.transpose(1, 2), mixer.dt_proj.bias, delta_softplus=True,
        dt_proj=mixer.dt_proj.weight,
    )  # fmt: skip
    return mixer.out_proj(y.transpose(1, 2))
