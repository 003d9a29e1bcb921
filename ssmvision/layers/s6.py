"""What every layer around `selective_scan` shares: how S6 parameters are initialized and read."""

import math
import re
from typing import Any, List, Sequence

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed
from ssmvision.layers.token_dynamics import make_x_proj
from ssmvision.ops import routes


def auto_dt_rank(dim: int) -> int:
    """The papers' rank of the step-size projection, ceil(dim / 16)."""
    return math.ceil(dim / 16)


def init_A_log_(A_log: Tensor) -> None:
    """S4D-real: A = -(1, ..., N) in every channel (Mamba, arXiv:2312.00752, section 3.6)."""
    n = A_log.shape[-1]
    with torch.no_grad():
        A_log.copy_(torch.arange(1, n + 1, device=A_log.device).log().expand_as(A_log))


def init_dt_(weight: Tensor, bias: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1, floor: float = 1e-4) -> None:
    """Step sizes log-uniform in [dt_min, dt_max] at initialization (Mamba, arXiv:2312.00752, section 3.6).

    Args:
        weight: (..., d, r), uniform within ± r^-0.5.
        bias: Added to the projected step before softplus; set to the inverse softplus of the wanted steps.
        dt_min: Smallest step size.
        dt_max: Largest step size.
        floor: Lower bound of the step size.
    """
    init_dt_bias_(bias, dt_min, dt_max, floor)
    torch.nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)


def init_dt_bias_(bias: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1, floor: float = 1e-4) -> None:
    """The bias of `init_dt_`, for layers without a projection."""
    with torch.no_grad():
        steps = torch.empty_like(bias).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=floor)
        bias.copy_(steps + torch.log(-torch.expm1(-steps)))


class S6(nn.Module):
    """The parameters of one selective scan of d channels, under the official names; subclasses call `reset_parameters`.

    Args:
        d: Channels.
        d_state: Size of the state per channel.
        dt_rank: Rank of the step-size projection.
        input_output: Sign of the input-output matrix; see `make_x_proj`.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    own_options = undecayed("A_log", "D", "dt_proj.bias")

    def __init__(
        self, d: int, d_state: int, dt_rank: int, input_output: str = "free", device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.d_inner, self.d_state, self.dt_rank = d, d_state, dt_rank
        self.x_proj = make_x_proj(d, dt_rank, d_state, input_output, **dd)
        self.dt_proj = nn.Linear(dt_rank, d, **dd)
        self.A_log = nn.Parameter(torch.empty(d, d_state, **dd))
        self.D = nn.Parameter(torch.empty(d, **dd))

    def reset_parameters(self) -> None:
        """Initialize what belongs to the scan; linear and convolution layers initialize themselves."""
        init_A_log_(self.A_log)
        nn.init.ones_(self.D)
        init_dt_(self.dt_proj.weight, self.dt_proj.bias)


@register_notrace_function
def state_matrix(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 even where the parameters are stored in half precision."""
    if A_log.dtype == torch.float64:
        return -torch.exp(A_log)
    return -torch.exp(A_log.float())


@register_notrace_function
def cross_routes(x: Tensor) -> Tensor:
    """VMamba's four routes over x (b, h, w, c): (4, h * w)."""
    return routes.cross(x.shape[1], x.shape[2], x.device)


@register_notrace_function
def bidirectional_routes(x: Tensor) -> Tensor:
    """Forward and backward over x (b, l, c): (2, l)."""
    return routes.bidirectional(x.shape[1], x.device)


def checked_directions(directions: Sequence[str]) -> List[str]:
    """A list of scan directions, or a ValueError that names the one which is none."""
    for direction in directions:
        if not re.fullmatch(r"(h|v|w[1-9]\d*)(_flip)?", direction):
            raise ValueError(f"a direction is h, v, w2, w7, …, or such a one with _flip, not {direction!r}")
    return list(directions)


@register_notrace_function
def atrous_routes(x: Tensor) -> Tensor:
    """EfficientVMamba's four routes over x (b, h, w, c) and its padding: (4, t)."""
    return routes.atrous_cross(x.shape[1], x.shape[2], x.device)


@register_notrace_function
def local_routes(x: Tensor, grid: List[int], directions: List[str], cls_in_middle: bool = False) -> Tensor:
    """LocalMamba's routes over a grid of tokens and its padding, with a class token in their middle or without: (k, t).

    Args:
        x: Any tensor on the device.
        grid: [height, width].
        directions: See `routes.local`.
        cls_in_middle: Half of the patches come before a class token, and every route visits it after as many steps.
    """
    stack = routes.local(grid[0], grid[1], directions, x.device)
    return routes.insert(stack, grid[0] * grid[1] // 2) if cls_in_middle else stack


@register_notrace_function
def pad_tokens(x: Tensor, tokens: int) -> Tensor:
    """Tokens (b, l, c) followed by zeros for the padding that routes visit: (b, tokens, c)."""
    if not _for_all_sizes() and tokens == x.shape[1]:
        return x
    # Scattered, not concatenated: a program for all sizes would treat tensors without elements apart.
    return torch.slice_scatter(x.new_zeros(x.shape[0], tokens, x.shape[2]), x, 1, 0, x.shape[1])


@register_notrace_function
def crop_tokens(x: Tensor, tokens: int) -> Tensor:
    """Tokens (..., l, c) without those of the padding: (..., tokens, c)."""
    if not _for_all_sizes():
        return x[..., :tokens, :]
    # A tensor of its own: whether a slice is contiguous depends on the size.
    return F.pad(x, [0, 0, 0, tokens - x.shape[-2]])


def _for_all_sizes() -> bool:
    """Whether a program is being made that cannot ask whether there is padding."""
    return False if torch.jit.is_scripting() else torch.compiler.is_compiling()


@register_notrace_function
def inter_slice_route(x: Tensor, nslices: int) -> Tensor:
    """The route of SegMamba's third branch over x (b, l, c): (1, l)."""
    return routes.raster([nslices, x.shape[1] // nslices], [1, 0], x.device)[None]
