"""`causal_conv1d` in Triton: a program owns a tile of steps and channels, and reads it once per tap of the kernel.

Neighbouring taps read almost the same rows, so that all but the first find them in the cache. The gradient takes two
passes: one brings the gradient in front of the activation into the order of the steps; in the other, every token
collects from the steps that saw it. Each writes every number once.

Letters: b batch, k route, d channel, l token, t step along a route, w tap of the kernel, i steps between two tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import Gradients, empty_like_layout
from ._common import Launch, Variant, power_of_two, sigmoid, strides

_TILE = 2048  # steps times channels
_CHANNELS = 64
_WARPS = 4


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, reset: Tensor | None, silu: bool, out: Tensor
) -> None:
    """Fill `out`; shapes as in `ops.causal_conv1d._forward`."""
    _forward_launch(x, weight, bias, routes, reset, silu, out).run()


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, reset: Tensor | None, silu: bool
) -> Gradients:
    """Gradients of x, weight and bias."""
    grads = _allocate_grads(x, weight)
    for launch in _backward_launches(dy, x, weight, bias, routes, reset, silu, grads):
        launch.run()
    dx, _, sums = grads
    total = sums.sum((0, 1))  # in a fixed order, so that repeated runs agree to the last bit
    return dx, total[:, :-1].transpose(1, 2), total[:, -1]


def _allocate_grads(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of x; in front of the activation, by steps; and what each tile finds of weight and, as one more tap, of bias."""
    (b, _, d, length), (k, _, width) = x.shape, weight.shape
    tiles = triton.cdiv(length, _tile(d)["STEPS"])
    dx = empty_like_layout(x, x.shape)
    return dx, weight.new_empty(b, k, length, d), weight.new_empty(b, tiles, k, width + 1, d)


def _forward_launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, reset: Tensor | None, silu: bool, y: Tensor
) -> Launch:
    arguments = {"x_ptr": x, **strides("x", x.squeeze(1), "b", "d", "l"), "bias_ptr": _contiguous(bias)}
    arguments |= {"y_ptr": y, **strides("y", y, "b", "k", "d", "l")}
    return _launch(_forward_kernel, x, weight, routes, reset, arguments, {"ROUTES": weight.shape[0], "SILU": silu})


def _backward_launches(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, routes: Tensor | None, reset: Tensor | None, silu: bool,
    grads: tuple[Tensor, Tensor, Tensor],
) -> tuple[Launch, Launch]:  # fmt: skip
    dx, g, sums = grads
    by_steps = {"x_ptr": x, **strides("x", x.squeeze(1), "b", "d", "l"), "bias_ptr": _contiguous(bias)}
    by_steps |= {"dy_ptr": dy, **strides("dy", dy, "b", "k", "d", "l"), "g_ptr": g, "sums_ptr": sums}
    by_tokens = {"g_ptr": g, "dx_ptr": dx, **strides("dx", dx.squeeze(1), "b", "d", "l")}
    by_tokens |= {"visits_ptr": None if routes is None else torch.argsort(routes, -1)}
    k = weight.shape[0]
    return (
        _launch(_steps_kernel, x, weight, routes, reset, by_steps, {"ROUTES": k, "SILU": silu}),
        _launch(_tokens_kernel, x, weight, routes, reset, by_tokens, {"ROUTES": k}),
    )


def _launch(
    kernel: Any, x: Tensor, weight: Tensor, routes: Tensor | None, reset: Tensor | None, arguments: dict[str, Any],
    constants: dict[str, Any],
) -> Launch:  # fmt: skip
    (b, _, d, length), (k, _, width), tile = x.shape, weight.shape, _tile(x.shape[2])
    sequences = b if kernel is _tokens_kernel else b * k
    return Launch(
        kernel,
        (sequences * triton.cdiv(length, tile["STEPS"]) * triton.cdiv(d, tile["CHANNELS"]),),
        {
            **arguments,
            "weight_ptr": weight.transpose(1, 2).contiguous(),
            "routes_ptr": _contiguous(routes),
            "reset_ptr": _contiguous(reset),
            **strides("reset", _contiguous(reset), "b", "k"),
            "length": length,
            "channels": d,
        },
        {**constants, **tile, "WIDTH": width},
        _WARPS,
    )


def _tile(d: int) -> dict[str, int]:
    channels = min(_CHANNELS, power_of_two(d, at_least=16))
    return {"STEPS": _TILE // channels, "CHANNELS": channels}


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@triton.jit(do_not_specialize=["length"])
def _forward_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, routes_ptr: tl.tensor, reset_ptr: tl.tensor,
    y_ptr: tl.tensor, length: tl.tensor, channels: tl.tensor, x_b: tl.tensor, x_d: tl.tensor, x_l: tl.tensor,
    y_b: tl.tensor, y_k: tl.tensor, y_d: tl.tensor, y_l: tl.tensor, reset_b: tl.tensor, reset_k: tl.tensor,
    ROUTES: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """The convolution along one route, a tile of steps at a time, each put where its token is."""
    sequence, _, t, c = _place(length, channels, STEPS, CHANNELS)
    batch, k = sequence // ROUTES, sequence % ROUTES
    x_ptr += batch * x_b
    route, resets = k * length, batch * reset_b + k * reset_k
    y = _bias(bias_ptr, k * channels + c, c < channels, STEPS)
    seen = t < length
    for i in tl.static_range(WIDTH):
        x, further = _row(x_ptr, routes_ptr, reset_ptr, t, i, c, seen, route, resets, channels, x_d, x_l)
        y += _tap(weight_ptr, k, WIDTH - 1 - i, c, channels, WIDTH) * x
        seen = further
    if SILU:
        y *= sigmoid(y)
    place = batch * y_b + k * y_k + _token(routes_ptr, route, t, t < length) * y_l + c * y_d
    tl.store(y_ptr + place, y, mask=(t < length) & (c < channels))


@triton.jit(do_not_specialize=["length"])
def _steps_kernel(
    x_ptr: tl.tensor, weight_ptr: tl.tensor, bias_ptr: tl.tensor, routes_ptr: tl.tensor, reset_ptr: tl.tensor,
    dy_ptr: tl.tensor, g_ptr: tl.tensor, sums_ptr: tl.tensor, length: tl.tensor, channels: tl.tensor, x_b: tl.tensor,
    x_d: tl.tensor, x_l: tl.tensor, dy_b: tl.tensor, dy_k: tl.tensor, dy_d: tl.tensor, dy_l: tl.tensor,
    reset_b: tl.tensor, reset_k: tl.tensor, ROUTES: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient in front of the activation along one route, and what a tile adds to those of weight and bias."""
    sequence, tile, t, c = _place(length, channels, STEPS, CHANNELS)
    batch, k = sequence // ROUTES, sequence % ROUTES
    x_ptr += batch * x_b
    route, resets = k * length, batch * reset_b + k * reset_k
    inside = (t < length) & (c < channels)
    place = batch * dy_b + k * dy_k + _token(routes_ptr, route, t, t < length) * dy_l + c * dy_d
    g = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = _bias(bias_ptr, k * channels + c, c < channels, STEPS)
        seen = t < length
        for i in tl.static_range(WIDTH):
            x, further = _row(x_ptr, routes_ptr, reset_ptr, t, i, c, seen, route, resets, channels, x_d, x_l)
            y += _tap(weight_ptr, k, WIDTH - 1 - i, c, channels, WIDTH) * x
            seen = further
        gate = sigmoid(y)
        g *= gate * (1 + y * (1 - gate))
    tl.store(g_ptr + (sequence * length + t) * channels + c, g, mask=inside)

    tiles = tl.cdiv(length, STEPS)
    sums_ptr += ((batch * tiles + tile) * ROUTES + k) * (WIDTH + 1) * channels + c
    seen = t < length
    for i in tl.static_range(WIDTH):
        x, further = _row(x_ptr, routes_ptr, reset_ptr, t, i, c, seen, route, resets, channels, x_d, x_l)
        tl.store(sums_ptr + (WIDTH - 1 - i) * channels, tl.sum(g * x, 0, keep_dims=True), mask=c < channels)
        seen = further
    tl.store(sums_ptr + WIDTH * channels, tl.sum(g, 0, keep_dims=True), mask=c < channels)


@triton.jit(do_not_specialize=["length"])
def _tokens_kernel(
    g_ptr: tl.tensor, weight_ptr: tl.tensor, routes_ptr: tl.tensor, visits_ptr: tl.tensor, reset_ptr: tl.tensor,
    dx_ptr: tl.tensor, length: tl.tensor, channels: tl.tensor, dx_b: tl.tensor, dx_d: tl.tensor, dx_l: tl.tensor,
    reset_b: tl.tensor, reset_k: tl.tensor, ROUTES: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of a tile of tokens: of each, from the steps of every route whose windows it is in."""
    batch, _, token, c = _place(length, channels, STEPS, CHANNELS)
    dx = tl.zeros((STEPS, CHANNELS), tl.float32)
    for k in range(ROUTES):
        t = _token(visits_ptr, k * length, token, token < length)  # when route k visits the token
        rows = (batch * ROUTES + k) * length
        seen = token < length
        for i in tl.static_range(WIDTH):
            if i > 0:
                seen = seen & (t + i < length)
                if reset_ptr is not None:
                    resets = batch * reset_b + k * reset_k + _token(routes_ptr, k * length, t + i, seen)
                    seen = _unbroken(reset_ptr, resets, seen)
            g = tl.load(g_ptr + (rows + t + i) * channels + c, mask=seen & (c < channels), other=0.0)
            dx += _tap(weight_ptr, k, WIDTH - 1 - i, c, channels, WIDTH) * g
    tl.store(dx_ptr + batch * dx_b + token * dx_l + c * dx_d, dx, mask=(token < length) & (c < channels))


@triton.jit
def _place(length: tl.tensor, channels: tl.tensor, STEPS: tl.constexpr, CHANNELS: tl.constexpr) -> Any:
    """This program's sequence and tile of it, and the tile's steps, as a column, and channels, as a row."""
    blocks = tl.cdiv(channels, CHANNELS)
    tiles = tl.cdiv(length, STEPS)
    tile = tl.program_id(0) // blocks
    t = tile % tiles * STEPS + tl.arange(0, STEPS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return (tile // tiles).to(tl.int64), tile % tiles, t.to(tl.int64)[:, None], c[None, :]


@triton.jit
def _row(
    x_ptr: tl.tensor, routes_ptr: tl.tensor, reset_ptr: tl.tensor, t: tl.tensor, i: tl.constexpr, c: tl.tensor,
    seen: tl.tensor, route: tl.tensor, resets: tl.tensor, channels: tl.tensor, x_d: tl.tensor, x_l: tl.tensor,
) -> Any:  # fmt: skip
    """The inputs i steps before t where they are `seen`, and whether those one step further back are seen as well."""
    token = _token(routes_ptr, route, t - i, seen)
    x = tl.load(x_ptr + token * x_l + c * x_d, mask=seen & (c < channels), other=0.0)
    return x.to(tl.float32), _unbroken(reset_ptr, resets + token, seen & (t > i))


@triton.jit
def _unbroken(reset_ptr: tl.tensor, place: tl.tensor, seen: tl.tensor) -> Any:
    """Where no sequence starts."""
    if reset_ptr is None:
        return seen
    else:
        return seen & (tl.load(reset_ptr + place, mask=seen, other=0) == 0)


@triton.jit
def _token(routes_ptr: tl.tensor, route: tl.tensor, t: tl.tensor, there: tl.tensor) -> Any:
    """What the route visits at step t."""
    if routes_ptr is None:
        return t
    else:
        return tl.load(routes_ptr + route + t, mask=there, other=0)


@triton.jit
def _tap(
    weight_ptr: tl.tensor, k: tl.tensor, w: tl.constexpr, c: tl.tensor, channels: tl.tensor, WIDTH: tl.constexpr
) -> Any:
    return tl.load(weight_ptr + (k * WIDTH + w) * channels + c, mask=c < channels, other=0.0)


@triton.jit
def _bias(bias_ptr: tl.tensor, place: tl.tensor, inside: tl.tensor, STEPS: tl.constexpr) -> Any:
    """What the sum over the taps starts with."""
    if bias_ptr is None:
        return tl.zeros((STEPS, place.shape[1]), tl.float32)
    else:
        return tl.broadcast_to(tl.load(bias_ptr + place, mask=inside, other=0.0), (STEPS, place.shape[1]))


def variants(dtype: torch.dtype, _lanes: int) -> list[Variant]:
    """Launches for the kernel report, with x in `dtype`: both directions of a Vim block."""
    b, k, d, length, width = 8, 2, 384, 197, 4

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y = empty(b, 1, length, d, dtype=dtype).transpose(-1, -2), empty(b, k, length, d).transpose(-1, -2)
    weight, bias = empty(k, d, width), empty(k, d)
    routes, reset = empty(k, length, dtype=torch.int64), empty(b, 1, length, dtype=torch.bool)
    ahead = _forward_launch(x, weight, bias, routes, reset, True, y)
    steps, tokens = _backward_launches(y, x, weight, bias, routes, reset, True, _allocate_grads(x, weight))
    return [
        Variant("causal_conv1d forward", ahead, ("x_ptr",), 128),
        Variant("causal_conv1d backward by steps", steps, ("x_ptr", "dy_ptr"), 232),
        Variant("causal_conv1d backward by tokens", tokens, ("g_ptr",), 232),
    ]
