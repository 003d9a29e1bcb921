"""`causal_conv1d`, the short depthwise convolution in front of a scan, along the same routes.

Letters: b batch, k route, d channel, l token, t step along a route, w width of the kernel.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend
from ._library import (
    Gradients,
    Kernel,
    cast,
    cast_token,
    empty_like_layout,
    expect,
    expect_real,
    expect_reset,
    expect_routes,
    no_autocast,
    register,
    settle,
)  # fmt: skip
from .reference import causal_conv1d as reference

MAX_WIDTH = 16  # as in cpu/csrc/causal_conv1d.cpp


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    silu: bool = False,
    routes: Optional[Tensor] = None,
    reset: Optional[Tensor] = None,
    backend: str = "auto",
) -> Tensor:
    """Depthwise causal convolution (Mamba, arXiv:2312.00752, figure 3) along one or several routes.

        y[route[t]] = bias + sum_j weight[j] x[route[t - w + 1 + j]], zero before the first step and the latest reset

    Args:
        x: Tokens (b, d, l), shared by all routes.
        weight: (k, d, w), or (d, w) for one pass over the tokens in order; w is at most 16.
        bias: (k, d) or (d,).
        silu: Apply SiLU to the result.
        routes: int64 (k, l), permutations; see `ssmvision.ops.routes`. None goes 0, 1, 2, ...
        reset: Boolean, (b, l) or (b, k, l): where True, a packed sequence starts; it sees nothing of what came before.
        backend: "auto", "cpu", "triton" or "reference"; see `ssmvision.ops.backend_info`.

    Returns:
        (b, k, d, l), or (b, d, l) if weight is (d, w), in x's dtype; tokens stay in their places.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    if not torch.jit.is_scripting():
        found = _backend.shortcut("causal_conv1d", _composite, None, backend, x, weight, bias, silu, routes, reset)
        if found is not None:
            return found
    return torch.ops.ssmvision.causal_conv1d(x, weight, bias, silu, routes, reset, backend)


def causal_conv1d_run(
    x: Tensor,
    state: Optional[Tensor],
    weight: Tensor,
    bias: Optional[Tensor] = None,
    silu: bool = False,
    reset: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` of tokens that come after others, and what `causal_conv1d_step` needs to go on.

    Args:
        x: Tokens (b, d, l).
        state: The w - 1 tokens before, oldest first, (b, d, w - 1); None for zeros, which cost nothing.
        weight: (d, w).
        bias: (d,).
        silu: Apply SiLU to the result.
        reset: Boolean (b, l), True where a packed sequence starts.

    Returns:
        y (b, d, l) in x's dtype; and the last w - 1 tokens, zeros before the latest reset, in the dtype of `state` or
        of `weight`.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    (b, d, tokens), past = x.shape, weight.shape[-1] - 1
    dtype = weight.dtype if state is None else state.dtype
    if state is None:
        y = causal_conv1d(x, weight, bias, silu, None, reset)
    else:
        if not torch.jit.is_scripting():
            expect("causal_conv1d_run", "state", state, (b, d, past))
        x = torch.cat([state.mT.to(x.dtype), x.mT], dim=1).mT  # channels-last, as tokens are the fastest
        y = causal_conv1d(x, weight, bias, silu, None, None if reset is None else F.pad(reset, [past, 0]))[..., past:]
    # A copy: as a slice, a small state would keep all tokens in memory.
    window = F.pad(x, [past - x.shape[-1], 0])
    if reset is not None:
        starts = F.pad(reset, [past - tokens, 0])
        starts_later = starts.flip(-1).cumsum(-1).flip(-1) > starts
        window = window.masked_fill(starts_later.unsqueeze(1), 0)
    return y, window.to(dtype)


def causal_conv1d_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Optional[Tensor] = None, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """One step of `causal_conv1d`, for streams: in plain torch, differentiable; nothing is changed in place.

    Args:
        x: One token (b, d).
        state: The w - 1 tokens before, oldest first, (b, d, w - 1): zeros at the start of a sequence.
        weight: (d, w).
        bias: (d,).
        silu: Apply SiLU to the result.

    Returns:
        y (b, d) in x's dtype; and the next state, in `state`'s dtype.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    expect_real("causal_conv1d_step", {"x": x, "state": state, "weight": weight, "bias": bias})
    (b, _), (d, w) = x.shape, weight.shape
    expect("causal_conv1d_step", "x", x, (b, d))
    expect("causal_conv1d_step", "state", state, (b, d, w - 1))
    if bias is not None:
        expect("causal_conv1d_step", "bias", bias, (d,))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    window = torch.cat([cast(state, dtype), cast(x, dtype).unsqueeze(-1)], dim=-1)
    y = (window * cast(weight, dtype)).sum(-1)
    y = y if bias is None else y + cast(bias, dtype)
    return cast(F.silu(y) if silu else y, x.dtype), cast(window[..., 1:], state.dtype)


def _composite(
    x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, silu: bool = False, routes: Optional[Tensor] = None,
    reset: Optional[Tensor] = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Canonical shapes and float32 in, the caller's shapes and dtype out."""
    expect_real("causal_conv1d", {"x": x, "weight": weight, "bias": bias})
    single = weight.dim() == 2
    if single:
        weight = weight.unsqueeze(0)
        bias = None if bias is None else bias.unsqueeze(0)
    k, d, w = weight.shape
    expect("causal_conv1d", "x", x, (x.shape[0], d, x.shape[-1]))
    if not 0 < w <= MAX_WIDTH:
        raise RuntimeError(f"causal_conv1d: the kernel may be 1 to {MAX_WIDTH} wide, not {w}")
    if bias is not None:
        expect("causal_conv1d", "bias", bias, (k, d))
    expect_routes("causal_conv1d", routes, (k, x.shape[-1]))
    if reset is not None and reset.dim() == 2:
        reset = reset.unsqueeze(1)
    one = reset is not None and reset.shape[1] == 1
    expect_reset("causal_conv1d", reset, (x.shape[0], 1 if one else k, x.shape[-1]))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = _backend.run(
        "causal_conv1d", cast_token(x.unsqueeze(1), dtype), cast(weight, dtype), cast(bias, dtype), routes, reset, silu,
        backend,
    )  # fmt: skip
    y = cast(y, x.dtype)
    return y.squeeze(1) if single else y


def _allocate(x: Tensor, weight: Tensor) -> Tensor:
    return empty_like_layout(x, (x.shape[0], weight.shape[0], *x.shape[2:]), weight.dtype)


def _forward(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    *rest, backend = args
    y = _allocate(x, weight)
    _backend.choose("causal_conv1d", backend, x).forward(x, weight, *rest, out=y)
    return y


def _backward(dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> list[Tensor]:
    *rest, backend = args
    found = _backend.choose("causal_conv1d", backend, x).backward(dy, x, weight, *rest)
    return settle(_allocate_grads(x, weight), found)


def _allocate_grads(x: Tensor, weight: Tensor) -> list[Tensor]:
    return [empty_like_layout(x, x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, dy: Tensor) -> Gradients:
    x, weight, bias, routes, reset = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the reference adjoint is itself differentiable
        with no_autocast(dy):
            dx, dw, db = reference.adjoint(dy, x, weight, bias, routes, reset, ctx.silu)
    else:
        dx, dw, db = torch.ops.ssmvision.causal_conv1d_backward(
            dy, x, weight, bias, routes, reset, ctx.silu, ctx.backend
        )
    return dx, dw, None if bias is None else db, None, None, None, None


_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? routes, Tensor? reset, bool silu, str backend"
register(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, bool silu=False, Tensor? routes=None, "
    "Tensor? reset=None, str backend='auto') -> Tensor",
    _composite,
    Kernel(
        f"causal_conv1d_forward({_TENSORS}) -> Tensor",
        _forward,
        lambda x, weight, *_: _allocate(x, weight),
    ),
    Kernel(
        f"causal_conv1d_backward(Tensor dy, {_TENSORS}) -> Tensor[]",
        _backward,
        lambda dy, x, weight, *_: _allocate_grads(x, weight),
    ),
    _autograd,
    _setup_context,
)
