"""`selective_scan` in Triton: a program is one warp that owns a tile of channels and walks along time.

Lanes run over channels and a lane keeps all states of its channel, so that the recurrence and the sum over states need
no exchange between lanes. Tokens come and go in tiles of 8 steps by 16-byte loads and stores, which are dealt to the
lanes through shared memory. Forward, a program may walk several routes in turn and add up what they give to a token;
where there are too few programs for that, every route has its own and the sums are taken afterwards. Backward, states
are recomputed chunk by chunk from saved ones. Each number in memory has one writer.

A row of the tensors of states, (b, k, n, d), is addressed by a runtime stride of one, `lane`. Triton cannot know that
it is one, so it does not give a lane several channels, which would spread the states of a channel over lanes.

Letters: b batch, k route, d channel, n state, g group of channels, l token, t step along a route, r rank of delta.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import CHUNK, Gradients, no_autocast
from ._common import LOG2E, Launch, Variant, power_of_two, sigmoid, softplus, strides, warp_size

_STEPS = 8  # of a tile; `_rows` and `_tile` know this number
_STATES, _STATES_BACKWARD = 16, 16  # at most so many per lane; others follow in turn, or in programs of their own
_ENOUGH = 256  # programs that keep a GPU busy: with fewer, routes run in programs of their own
_REGISTERS, _REGISTERS_BACKWARD = 128, 232
# Not compiled for their values: numbers that change from call to call; and pointers to states. Told that a tensor is
# small, the compiler for AMD gives each state of a lane an address of its own, and its registers spill.
_GENERIC = [
    "length", "steps", "chunks", "rank", "lane", "A_ptr", "initial_ptr", "last_ptr", "saved_ptr", "states_ptr",
    "dlast_ptr", "dA_ptr", "dB_ptr", "dC_ptr", "dinitial_ptr",
]  # fmt: skip


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    dt_proj: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, routes: Tensor | None,
    delta_softplus: bool, merge: bool, out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out` = (y, last state, checkpoints); shapes as in `ops.selective_scan._forward`."""
    y, last, checkpoints = out
    parts = _allocate_output(y, u, A, warp_size(u))
    if _partial(routes, u):
        parts.zero_()
    tensors = (u, delta, A, B, C, D, delta_bias, dt_proj, initial_state, reset, routes)
    _forward_launch(*tensors, delta_softplus, (parts, last, checkpoints), warp_size(u)).run()
    if parts.shape != y.shape:
        torch.sum(parts, 1, keepdim=True, dtype=y.dtype, out=y)
    elif parts is not y:
        y.copy_(parts)


def backward(
    dy: Tensor, dlast: Tensor | None, checkpoints: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, delta_bias: Tensor | None, dt_proj: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, routes: Tensor | None, delta_softplus: bool, merge: bool,
) -> Gradients:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, delta_bias, dt_proj and initial_state."""
    del merge  # dy has one route then, and is read for all of them
    lanes, n = warp_size(u), A.shape[-1]
    grads = _allocate_grads(u, A, B, C, lanes)
    if _partial(routes, u):
        for name in ("du", "ddelta", "dB", "dC"):
            grads[name].zero_()
    tensors = (u, delta, A, B, C, D, delta_bias, dt_proj, initial_state, reset, routes)
    _backward_launch(dy, dlast, checkpoints, *tensors, delta_softplus, grads, lanes).run()
    # What several programs found is added in a fixed order, so that repeated runs agree to the last bit.
    draw, du = grads["ddelta"].sum(2).transpose(-1, -2), grads["du"].sum(2).transpose(-1, -2)
    ddelta, dproj = draw, None
    if dt_proj is not None:
        with no_autocast(u):  # a backward pass may run inside the caller's autocast region
            ddelta = (draw.transpose(-1, -2) @ dt_proj).transpose(-1, -2)
            dproj = (draw @ delta.to(draw.dtype).transpose(-1, -2)).sum(0)
    return (
        du.sum(1, keepdim=True) if u.shape[1] == 1 else du,
        ddelta,
        grads["dA"].sum(0).transpose(-1, -2),
        _per_group(grads["dB"], B, n),
        _per_group(grads["dC"], C, n),
        None if D is None else grads["dD"].sum(0),
        None if delta_bias is None else grads["dbias"].sum((0, 2)),
        dproj,
        None if initial_state is None else grads["dinitial"].transpose(-1, -2),
    )


def _allocate_output(y: Tensor, u: Tensor, A: Tensor, lanes: int) -> Tensor:
    """Where programs write y: `y` itself if it can be; by routes if these run apart.

    Sums over routes pass through memory, which is what bounds a scan along several routes of few states. Of bfloat16
    tokens they do so in bfloat16: it has the range of float32, and y is rounded to it in the end.
    """
    (b, parts, d, length), (k, _, n) = y.shape, A.shape
    narrow = u.dtype == torch.bfloat16 and parts < k and n <= _STATES
    apart = parts < k and not walks_together(b, k, d, lanes)
    if y.stride(2) == 1 and not narrow and not apart:
        return y
    return y.new_empty(b, k if apart else parts, length, d, dtype=u.dtype if narrow else y.dtype).mT


def walks_together(b: int, k: int, d: int, lanes: int) -> bool:
    """Whether a program walks all routes of its channels, as it does where there are enough programs."""
    return k == 1 or b * triton.cdiv(d, lanes) >= _ENOUGH


def _allocate_grads(u: Tensor, A: Tensor, B: Tensor, C: Tensor, lanes: int) -> dict[str, Tensor]:
    """What programs find: of u and delta by blocks of states, of B and C by tiles or channels, others by samples."""
    (b, _, d, length), (k, _, n) = u.shape, A.shape
    blocks = triton.cdiv(n, _STATES_BACKWARD)
    found = {name: A.new_empty(b, k, blocks, length, d) for name in ("du", "ddelta")}
    for name, x in (("dB", B), ("dC", C)):
        parts = triton.cdiv(d, lanes) if _uniform(x, d, lanes) else d
        found[name] = A.new_empty(b, k, parts, length, n)
    found |= {name: A.new_empty(b, k, n, d) for name in ("dA", "dinitial")}
    return found | {"dD": A.new_empty(b, k, d), "dbias": A.new_empty(b, k, blocks, d)}


def _per_group(parts: Tensor, x: Tensor, n: int) -> Tensor:
    """Gradients of B or C by tiles or channels, (b, k, parts, l, n), as (b, k, g, n, l)."""
    return parts.unflatten(2, (x.shape[2], -1)).sum(3).transpose(-1, -2)


def _uniform(x: Tensor, d: int, lanes: int) -> bool:
    """Whether the channels of any tile share one group of B or C."""
    groups = x.shape[2]
    return groups == 1 or d // groups % lanes == 0


def _partial(routes: Tensor | None, u: Tensor) -> bool:
    """Whether routes may leave tokens unvisited, whose outputs are then zero."""
    return routes is not None and routes.shape[1] != u.shape[-1]


def _forward_launch(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    dt_proj: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, routes: Tensor | None,
    delta_softplus: bool, out: tuple[Tensor, Tensor, Tensor], lanes: int,
) -> Launch:  # fmt: skip
    y, last, checkpoints = out
    k, walks = A.shape[0], A.shape[0] // y.shape[1]  # routes that a program walks in turn
    block = min(_STATES, power_of_two(A.shape[2]))
    arguments, constants = _shared(u, delta, A, B, C, D, delta_bias, dt_proj, initial_state, reset, routes, lanes)
    arguments |= {"y_ptr": y, **strides("y", y.mT, "b", "k", "l")}
    arguments |= {"last_ptr": last, "saved_ptr": checkpoints}
    constants |= {"WALKS": walks, "RELOAD": lanes == 32, "BLOCK": block, "SOFTPLUS": delta_softplus}
    grid = (u.shape[0] * (k // walks) * triton.cdiv(u.shape[2], lanes),)
    # With few states, NVIDIA's assembler unrolls loops as far as registers go, and then spills: it gets eight less.
    registers = _REGISTERS if block > 2 else _REGISTERS - 8
    return Launch(_forward_kernel, grid, arguments, constants, num_warps=1, registers=registers)


def _backward_launch(
    dy: Tensor, dlast: Tensor | None, checkpoints: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, delta_bias: Tensor | None, dt_proj: Tensor | None, initial_state: Tensor | None,
    reset: Tensor | None, routes: Tensor | None, delta_softplus: bool, grads: dict[str, Tensor], lanes: int,
) -> Launch:  # fmt: skip
    block = min(_STATES_BACKWARD, power_of_two(A.shape[2]))
    arguments, constants = _shared(u, delta, A, B, C, D, delta_bias, dt_proj, initial_state, reset, routes, lanes)
    programs = u.shape[0] * A.shape[0] * triton.cdiv(A.shape[2], _STATES_BACKWARD) * triton.cdiv(u.shape[2], lanes)
    dlast = None if dlast is None else dlast.transpose(-1, -2).contiguous()
    arguments |= {**_tokens("dy", dy, "b", "k"), "dlast_ptr": dlast, "saved_ptr": checkpoints}
    arguments |= {"states_ptr": A.new_empty(programs, CHUNK // _STEPS + _STEPS, block, lanes)}
    arguments |= {f"{name}_ptr": x for name, x in grads.items()}
    constants |= {"BLOCK": block, "SOFTPLUS": delta_softplus}
    return Launch(_backward_kernel, (programs,), arguments, constants, num_warps=1, registers=_REGISTERS_BACKWARD)


def _shared(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None,
    dt_proj: Tensor | None, initial_state: Tensor | None, reset: Tensor | None, routes: Tensor | None, lanes: int,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Arguments and constants of both kernels; parameters have their channels last."""
    (d, length), (k, _, n) = u.shape[2:], A.shape
    steps = length if routes is None else routes.shape[1]
    transposed = {"A": A, "proj": dt_proj, "initial": initial_state}
    contiguous = {"D": D, "bias": delta_bias, "reset": reset, "routes": routes}
    arguments: dict[str, Any] = {
        f"{name}_ptr": None if x is None else x.transpose(-1, -2).contiguous() for name, x in transposed.items()
    }
    arguments |= {f"{name}_ptr": None if x is None else x.contiguous() for name, x in contiguous.items()}
    arguments |= strides("reset", arguments["reset_ptr"], "b", "k")
    arguments |= {**_tokens("u", u, "b", "k"), **_tokens("delta", delta, "b", "k")}
    for name, x in (("B", B), ("C", C)):
        arguments |= {**_tokens(name, x, "b", "k", "g"), f"{name}_per": d // x.shape[2]}
    arguments |= {"length": length, "steps": steps, "chunks": triton.cdiv(steps, CHUNK), "lane": 1}
    arguments |= {"rank": 0 if dt_proj is None else dt_proj.shape[-1]}
    constants = {
        "ROUTES": k, "STATES": n, "DIM": d,
        "UNIFORM_B": _uniform(B, d, lanes), "UNIFORM_C": _uniform(C, d, lanes),
        "CHUNK": CHUNK, "STEPS": _STEPS, "CHANNELS": lanes,
    }  # fmt: skip
    return arguments, constants


def _tokens(name: str, x: Tensor, *axes: str) -> dict[str, Any]:
    """Arguments for tokens (*axes, features, l), copied if the features of a token do not lie side by side."""
    x = x.mT if x.stride(-2) == 1 or x.shape[-2] == 1 else x.mT.contiguous()
    return {f"{name}_ptr": x, **strides(name, x, *axes, "l")}


@triton.jit(do_not_specialize=_GENERIC)
def _forward_kernel(
    u_ptr: tl.tensor, delta_ptr: tl.tensor, A_ptr: tl.tensor, B_ptr: tl.tensor, C_ptr: tl.tensor, D_ptr: tl.tensor,
    bias_ptr: tl.tensor, proj_ptr: tl.tensor, initial_ptr: tl.tensor, reset_ptr: tl.tensor, routes_ptr: tl.tensor,
    y_ptr: tl.tensor, last_ptr: tl.tensor, saved_ptr: tl.tensor, length: tl.tensor, steps: tl.tensor, chunks: tl.tensor,
    rank: tl.tensor, lane: tl.tensor, u_b: tl.tensor, u_k: tl.tensor, u_l: tl.tensor, delta_b: tl.tensor,
    delta_k: tl.tensor, delta_l: tl.tensor, B_b: tl.tensor, B_k: tl.tensor, B_g: tl.tensor, B_l: tl.tensor,
    B_per: tl.tensor, C_b: tl.tensor, C_k: tl.tensor, C_g: tl.tensor, C_l: tl.tensor, C_per: tl.tensor,
    reset_b: tl.tensor, reset_k: tl.tensor, y_b: tl.tensor, y_k: tl.tensor, y_l: tl.tensor, WALKS: tl.constexpr,
    RELOAD: tl.constexpr, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr, ROUTES: tl.constexpr, STATES: tl.constexpr,
    DIM: tl.constexpr, UNIFORM_B: tl.constexpr, UNIFORM_C: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of channels of one sample along one route, or along several and in several blocks of states in turn."""
    tile = tl.program_id(0) % tl.cdiv(DIM, CHANNELS)
    c = tile * CHANNELS + tl.arange(0, CHANNELS)
    known = c < DIM
    batch = (tl.program_id(0) // tl.cdiv(DIM, CHANNELS) // (ROUTES // WALKS)).to(tl.int64)
    first = tl.program_id(0) // tl.cdiv(DIM, CHANNELS) % (ROUTES // WALKS) * WALKS
    for walk in tl.range(0, WALKS * tl.cdiv(STATES, BLOCK), disable_licm=not RELOAD):
        k = first + walk // tl.cdiv(STATES, BLOCK)
        n = walk % tl.cdiv(STATES, BLOCK) * BLOCK
        inside = _inside(n, known, STATES, BLOCK)
        states = _places(n, c, lane, DIM, BLOCK)
        if not RELOAD:
            A2 = tl.load(A_ptr + k * STATES * DIM + states, mask=inside, other=0.0) * LOG2E
        h = tl.zeros((BLOCK, CHANNELS), tl.float32)
        if initial_ptr is not None:
            h = tl.load(initial_ptr + (batch * ROUTES + k) * STATES * DIM + states, mask=inside, other=0.0)
        skip = _skip(D_ptr, k * DIM + c, known & (n == 0), CHANNELS)
        B_row = _coefficients(B_ptr + batch * B_b + k * B_k + n, c, B_per, B_g, UNIFORM_B, BLOCK)
        C_row = _coefficients(C_ptr + batch * C_b + k * C_k + n, c, C_per, C_g, UNIFORM_C, BLOCK)
        for chunk in tl.range(0, chunks, disable_licm=True):
            save = saved_ptr + ((batch * ROUTES + k) * chunks + chunk) * STATES * DIM
            tl.store(save + states, h, mask=inside)
            for start in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, steps), STEPS, disable_licm=True):
                s = start + tl.arange(0, STEPS)
                token = _token(routes_ptr, k, s, steps)
                u_place = batch * u_b + k * u_k + token[:, None] * u_l + c[None, :]
                u = tl.load(u_ptr + u_place, mask=known[None, :], other=0.0)
                delta_row = delta_ptr + batch * delta_b + k * delta_k
                dt = _raw_steps(delta_row, delta_l, proj_ptr, bias_ptr, k, token, c, known, rank, DIM)
                dt = tl.where((s < steps)[:, None], softplus(dt) if SOFTPLUS else dt, 0.0)
                # The tuples turn, so that a loop need not be unrolled, whose steps would all be begun at once.
                us, dts = _rows(u), _rows(dt)
                ys = tl.tuple([tl.zeros((CHANNELS,), tl.float32)] * STEPS)
                if RELOAD:  # A takes no registers while delta is projected; on AMD, the addresses would take as many
                    A2 = tl.load(A_ptr + k * STATES * DIM + states, mask=inside, other=0.0) * LOG2E
                for i in tl.range(0, STEPS, disable_licm=True):
                    t = _token(routes_ptr, k, start + i, steps)
                    B = _coefficient(B_row, t * B_l, n, inside, UNIFORM_B, STATES, BLOCK)
                    C = _coefficient(C_row, t * C_l, n, inside, UNIFORM_C, STATES, BLOCK)
                    x = us[0].to(tl.float32)
                    cut = _cut(reset_ptr, batch * reset_b + k * reset_k + t, start + i, steps, initial_ptr is None)
                    if reset_ptr is not None:
                        h = tl.where(cut, 0.0, h)
                    decay = tl.exp2(tl.where(cut, 0.0, dts[0])[None, :] * A2)
                    h = decay * h + (dts[0] * x)[None, :] * B
                    us, dts = us[1:] + us[:1], dts[1:] + dts[:1]
                    ys = ys[1:] + tl.tuple([tl.sum(h * C, 0) + skip * x])
                y = _tile(ys)
                y_place = batch * y_b + k * y_k + token[:, None] * y_l + c[None, :]
                written = (s < steps)[:, None] & known[None, :]
                if WALKS * tl.cdiv(STATES, BLOCK) > 1:
                    y += tl.load(y_ptr + y_place, mask=written & (walk > 0), other=0.0)
                tl.store(y_ptr + y_place, y, mask=written)
        tl.store(last_ptr + (batch * ROUTES + k) * STATES * DIM + states, h, mask=inside)
        if WALKS * tl.cdiv(STATES, BLOCK) > 1:
            tl.debug_barrier()  # what this walk wrote, the next reads in other lanes


@triton.jit(do_not_specialize=_GENERIC)
def _backward_kernel(
    dy_ptr: tl.tensor, dlast_ptr: tl.tensor, saved_ptr: tl.tensor, states_ptr: tl.tensor, u_ptr: tl.tensor,
    delta_ptr: tl.tensor, A_ptr: tl.tensor, B_ptr: tl.tensor, C_ptr: tl.tensor, D_ptr: tl.tensor, bias_ptr: tl.tensor,
    proj_ptr: tl.tensor, initial_ptr: tl.tensor, reset_ptr: tl.tensor, routes_ptr: tl.tensor, du_ptr: tl.tensor,
    ddelta_ptr: tl.tensor, dA_ptr: tl.tensor, dB_ptr: tl.tensor, dC_ptr: tl.tensor, dD_ptr: tl.tensor,
    dbias_ptr: tl.tensor, dinitial_ptr: tl.tensor, length: tl.tensor, steps: tl.tensor, chunks: tl.tensor,
    rank: tl.tensor, lane: tl.tensor, dy_b: tl.tensor, dy_k: tl.tensor, dy_l: tl.tensor, u_b: tl.tensor, u_k: tl.tensor,
    u_l: tl.tensor, delta_b: tl.tensor, delta_k: tl.tensor, delta_l: tl.tensor, B_b: tl.tensor, B_k: tl.tensor,
    B_g: tl.tensor, B_l: tl.tensor, B_per: tl.tensor, C_b: tl.tensor, C_k: tl.tensor, C_g: tl.tensor, C_l: tl.tensor,
    C_per: tl.tensor, reset_b: tl.tensor, reset_k: tl.tensor, BLOCK: tl.constexpr, SOFTPLUS: tl.constexpr,
    ROUTES: tl.constexpr, STATES: tl.constexpr, DIM: tl.constexpr, UNIFORM_B: tl.constexpr, UNIFORM_C: tl.constexpr,
    CHUNK: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """The adjoint of a tile of channels along one route, for a block of states.

    Per chunk, from the last: forward once, keeping the state before every tile; then, tile by tile from the last,
    forward again, keeping the state before every step, and backward through the steps.
    """
    tiles: tl.constexpr = tl.cdiv(DIM, CHANNELS)
    blocks: tl.constexpr = tl.cdiv(STATES, BLOCK)
    tile = tl.program_id(0) % tiles
    c = tile * CHANNELS + tl.arange(0, CHANNELS)
    known = c < DIM
    block = tl.program_id(0) // tiles % blocks
    n = block * BLOCK
    k = tl.program_id(0) // tiles // blocks % ROUTES
    batch = (tl.program_id(0) // tiles // blocks // ROUTES).to(tl.int64)
    sequence = batch * ROUTES + k
    inside = _inside(n, known, STATES, BLOCK)
    states = _places(n, c, lane, DIM, BLOCK)
    kept = _places(0, tl.arange(0, CHANNELS), lane, CHANNELS, BLOCK)
    states_ptr += tl.program_id(0).to(tl.int64) * (CHUNK // STEPS + STEPS) * BLOCK * CHANNELS
    A2 = tl.load(A_ptr + k * STATES * DIM + states, mask=inside, other=0.0) * LOG2E
    dh, dA = tl.zeros((BLOCK, CHANNELS), tl.float32), tl.zeros((BLOCK, CHANNELS), tl.float32)
    if dlast_ptr is not None:
        dh = tl.load(dlast_ptr + sequence * STATES * DIM + states, mask=inside, other=0.0)
    skip = _skip(D_ptr, k * DIM + c, known & (n == 0), CHANNELS)
    dD, dbias = tl.zeros((CHANNELS,), tl.float32), tl.zeros((STEPS, CHANNELS), tl.float32)
    B_row = _coefficients(B_ptr + batch * B_b + k * B_k + n, c, B_per, B_g, UNIFORM_B, BLOCK)
    C_row = _coefficients(C_ptr + batch * C_b + k * C_k + n, c, C_per, C_g, UNIFORM_C, BLOCK)
    u_ptr += batch * u_b + k * u_k
    delta_ptr += batch * delta_b + k * delta_k
    dy_ptr += batch * dy_b + k * dy_k
    du_ptr += (sequence * blocks + block) * length * DIM
    ddelta_ptr += (sequence * blocks + block) * length * DIM
    flags = batch * reset_b + k * reset_k
    for count in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - count
        h = tl.load(saved_ptr + (sequence * chunks + chunk) * STATES * DIM + states, mask=inside, other=0.0)
        tiles_here = tl.cdiv(tl.minimum(CHUNK, steps - chunk * CHUNK), STEPS)
        for step_tile in tl.range(0, tiles_here, disable_licm=True):
            tl.store(states_ptr + step_tile * BLOCK * CHANNELS + kept, h)
            start = chunk * CHUNK + step_tile * STEPS
            s = start + tl.arange(0, STEPS)
            token = _token(routes_ptr, k, s, steps)
            u = tl.load(u_ptr + token[:, None] * u_l + c[None, :], mask=known[None, :], other=0.0)
            dt = _raw_steps(delta_ptr, delta_l, proj_ptr, bias_ptr, k, token, c, known, rank, DIM)
            dt = tl.where((s < steps)[:, None], softplus(dt) if SOFTPLUS else dt, 0.0)
            us, dts = _rows(u), _rows(dt)
            for i in tl.range(0, STEPS, disable_licm=True):
                t = _token(routes_ptr, k, start + i, steps)
                B = _coefficient(B_row, t * B_l, n, inside, UNIFORM_B, STATES, BLOCK)
                cut = _cut(reset_ptr, flags + t, start + i, steps, initial_ptr is None)
                decay = tl.exp2(tl.where(cut, 0.0, dts[0])[None, :] * A2)
                h = tl.where(cut, 0.0, decay * h) + (dts[0] * us[0].to(tl.float32))[None, :] * B
                us, dts = us[1:] + us[:1], dts[1:] + dts[:1]
        tl.debug_barrier()
        for back in tl.range(0, tiles_here, disable_licm=True):
            step_tile = tiles_here - 1 - back
            start = chunk * CHUNK + step_tile * STEPS
            h = tl.load(states_ptr + step_tile * BLOCK * CHANNELS + kept)
            s = start + tl.arange(0, STEPS)
            token = _token(routes_ptr, k, s, steps)
            written = (s < steps)[:, None] & known[None, :]
            u = tl.load(u_ptr + token[:, None] * u_l + c[None, :], mask=known[None, :], other=0.0)
            dy = tl.load(dy_ptr + token[:, None] * dy_l + c[None, :], mask=written, other=0.0)
            raw = _raw_steps(delta_ptr, delta_l, proj_ptr, bias_ptr, k, token, c, known, rank, DIM)
            dt = tl.where((s < steps)[:, None], softplus(raw) if SOFTPLUS else raw, 0.0)
            us, dts, dys = _rows(u), _rows(dt), _rows(dy)
            for i in tl.range(0, STEPS, disable_licm=True):
                tl.store(states_ptr + (CHUNK // STEPS + i) * BLOCK * CHANNELS + kept, h)
                t = _token(routes_ptr, k, start + i, steps)
                B = _coefficient(B_row, t * B_l, n, inside, UNIFORM_B, STATES, BLOCK)
                cut = _cut(reset_ptr, flags + t, start + i, steps, initial_ptr is None)
                decay = tl.exp2(tl.where(cut, 0.0, dts[0])[None, :] * A2)
                h = tl.where(cut, 0.0, decay * h) + (dts[0] * us[0].to(tl.float32))[None, :] * B
                us, dts = us[1:] + us[:1], dts[1:] + dts[:1]
            tl.debug_barrier()
            dus = tl.tuple([tl.zeros((CHANNELS,), tl.float32)] * STEPS)
            ddts = dus
            for count_i in tl.range(0, STEPS, disable_licm=True):
                i = STEPS - 1 - count_i
                us, dts, dys = us[7:] + us[:7], dts[7:] + dts[:7], dys[7:] + dys[:7]
                t, x, dt_row, dy_row = (
                    _token(routes_ptr, k, start + i, steps), us[0].to(tl.float32), dts[0], dys[0].to(tl.float32),
                )  # fmt: skip
                B = _coefficient(B_row, t * B_l, n, inside, UNIFORM_B, STATES, BLOCK)
                C = _coefficient(C_row, t * C_l, n, inside, UNIFORM_C, STATES, BLOCK)
                cut = _cut(reset_ptr, flags + t, start + i, steps, initial_ptr is None)
                decay = tl.exp2(tl.where(cut, 0.0, dt_row)[None, :] * A2)
                before = tl.load(states_ptr + (CHUNK // STEPS + i) * BLOCK * CHANNELS + kept)
                kept_before = tl.where(cut, 0.0, decay * before)
                drive = (dt_row * x)[None, :]
                grad = dh + dy_row[None, :] * C
                place = (sequence * (tiles if UNIFORM_C else DIM) * length + t) * STATES + n
                _store_part(dC_ptr + place, dy_row[None, :] * (kept_before + drive * B), tile, c, known, n,
                            start + i < steps, length, UNIFORM_C, STATES, BLOCK)  # fmt: skip
                place = (sequence * (tiles if UNIFORM_B else DIM) * length + t) * STATES + n
                _store_part(dB_ptr + place, grad * drive, tile, c, known, n, start + i < steps, length, UNIFORM_B,
                            STATES, BLOCK)  # fmt: skip
                slope = grad * kept_before
                dh = tl.where(cut, 0.0, grad * decay)
                dA += slope * dt_row[None, :]
                dx = tl.sum(grad * B, 0)
                dus = tl.tuple([dx * dt_row + skip * dy_row]) + dus[:7]
                ddts = tl.tuple([tl.sum(slope * A2, 0) / LOG2E + dx * x]) + ddts[:7]
                dD += dy_row * x
            tl.debug_barrier()
            du, draw = _tile(dus), _tile(ddts)
            if SOFTPLUS:
                draw *= sigmoid(raw)
            draw = tl.where((s < steps)[:, None], draw, 0.0)
            dbias += draw
            tl.store(du_ptr + token[:, None] * DIM + c[None, :], du, mask=written)
            tl.store(ddelta_ptr + token[:, None] * DIM + c[None, :], draw, mask=written)
        tl.debug_barrier()
    tl.store(dA_ptr + sequence * STATES * DIM + states, dA, mask=inside)
    tl.store(dinitial_ptr + sequence * STATES * DIM + states, dh, mask=inside)
    tl.store(dD_ptr + sequence * DIM + c, dD, mask=known & (n == 0))
    tl.store(dbias_ptr + (sequence * blocks + block) * DIM + c, tl.sum(dbias, 0), mask=known)


@triton.jit
def _inside(n: tl.tensor, known: tl.tensor, STATES: tl.constexpr, BLOCK: tl.constexpr) -> Any:
    """Which of a block of states (n, d) exist."""
    return (n + tl.arange(0, BLOCK) < STATES)[:, None] & known[None, :]


@triton.jit
def _places(n: tl.tensor, c: tl.tensor, lane: tl.tensor, DIM: tl.constexpr, BLOCK: tl.constexpr) -> Any:
    """Where a block of states (n, d) lies."""
    # In 64 bits: then what differs between the states of a lane is a constant in the instruction, not a register each.
    rows = (tl.arange(0, BLOCK) * DIM).to(tl.int64)[:, None]
    return rows + (n * DIM + c.to(tl.int64) * lane)[None, :]


@triton.jit
def _token(routes_ptr: tl.tensor, k: tl.tensor, s: tl.tensor, steps: tl.tensor) -> Any:
    """What route k visits at step s; past its end, its last token."""
    s = tl.minimum(s, steps - 1)
    if routes_ptr is None:
        return s.to(tl.int64)
    else:
        token = tl.load(routes_ptr + k * steps + s)
        return token.to(tl.int32).to(tl.int64)  # which waits in one register and is widened by a product with a stride


@triton.jit
def _raw_steps(
    delta_ptr: tl.tensor, delta_l: tl.tensor, proj_ptr: tl.tensor, bias_ptr: tl.tensor,
    k: tl.tensor, token: tl.tensor, c: tl.tensor, known: tl.tensor, rank: tl.tensor, DIM: tl.constexpr,
) -> Any:  # fmt: skip
    """Step sizes before softplus of a tile of tokens and channels."""
    if proj_ptr is None:
        place = token[:, None] * delta_l + c[None, :]
        raw = tl.load(delta_ptr + place, mask=known[None, :], other=0.0).to(tl.float32)
    else:
        raw = tl.zeros((token.shape[0], c.shape[0]), tl.float32)
        for r in range(rank):
            low = tl.load(delta_ptr + token * delta_l + r).to(tl.float32)
            weight = tl.load(proj_ptr + (k * rank + r) * DIM + c, mask=known, other=0.0)
            raw += low[:, None] * weight[None, :]
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + k * DIM + c, mask=known, other=0.0)[None, :]
    return raw


@triton.jit
def _coefficients(
    row_ptr: tl.tensor, c: tl.tensor, per: tl.tensor, stride_g: tl.tensor, UNIFORM: tl.constexpr, BLOCK: tl.constexpr
) -> Any:  # fmt: skip
    """Pointers to a block of states of B or C: (n,) if the channels share a group, else (n, d)."""
    n = tl.arange(0, BLOCK)
    if UNIFORM:
        return row_ptr + tl.min(c) // per * stride_g + n
    else:
        return row_ptr + (c // per * stride_g)[None, :] + n[:, None]


@triton.jit
def _coefficient(
    row: tl.tensor, place: tl.tensor, n: tl.tensor, inside: tl.tensor, UNIFORM: tl.constexpr, STATES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:  # fmt: skip
    """B or C of one token, to be multiplied with states (n, d)."""
    if not UNIFORM:
        return tl.load(row + place, mask=inside, other=0.0).to(tl.float32)
    elif STATES % BLOCK == 0:
        return tl.load(row + place).to(tl.float32)[:, None]
    else:
        return tl.load(row + place, mask=n + tl.arange(0, BLOCK) < STATES, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _store_part(
    ptr: tl.tensor, part: tl.tensor, tile: tl.tensor, c: tl.tensor, known: tl.tensor, n: tl.tensor, there: tl.tensor,
    length: tl.tensor, UNIFORM: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """What the channels of a tile add to the gradient of B or C of one token."""
    states = tl.arange(0, BLOCK)
    if UNIFORM:
        found = tl.sum(tl.where(known[None, :], part, 0.0), 1)
        tl.store(ptr + tile.to(tl.int64) * length * STATES + states, found, mask=there & (n + states < STATES))
    else:
        place = (c.to(tl.int64) * length * STATES)[None, :] + states[:, None]
        tl.store(ptr + place, part, mask=there & _inside(n, known, STATES, BLOCK))


@triton.jit
def _skip(D_ptr: tl.tensor, place: tl.tensor, there: tl.tensor, CHANNELS: tl.constexpr) -> Any:
    """The weights of the skip connection, which the first block of states adds."""
    if D_ptr is None:
        return tl.zeros((CHANNELS,), tl.float32)
    else:
        return tl.load(D_ptr + place, mask=there, other=0.0)


@triton.jit
def _cut(
    reset_ptr: tl.tensor, place: tl.tensor, s: tl.tensor, steps: tl.tensor, FROM_ZERO: tl.constexpr
) -> Any:  # fmt: skip
    """Whether no state comes into step s: at a reset, or at a start from nothing."""
    cut = (s == 0) & FROM_ZERO
    if reset_ptr is not None:
        cut |= (tl.load(reset_ptr + place) != 0) & (s < steps)  # past the end, `place` is that of the last token
    return cut


@triton.jit
def _rows(tile: tl.tensor) -> Any:
    """The rows of a tile (8, d), each with its channels over the lanes."""
    return _deal(_deal(_deal(tl.tuple([tl.trans(tile)]))))


@triton.jit
def _deal(tiles: tl.tuple) -> Any:
    """Columns of tiles (d, t) dealt to two tiles each: first all of the even ones, then all of the odd ones."""
    even, odd = tl.tuple([]), tl.tuple([])
    for i in tl.static_range(len(tiles)):
        a, b = _halves(tiles[i])
        even, odd = even + tl.tuple([a]), odd + tl.tuple([b])
    return even + odd


@triton.jit
def _halves(tile: tl.tensor) -> Any:
    """The even and the odd columns; the last two as vectors."""
    d: tl.constexpr = tile.shape[0]
    half: tl.constexpr = tile.shape[1] // 2
    a, b = tl.split(tl.reshape(tile, (d, half, 2)))
    if half == 1:
        return tl.reshape(a, (d,)), tl.reshape(b, (d,))
    else:
        return a, b


@triton.jit
def _tile(rows: tl.tuple) -> Any:
    """The tile of 8 rows: the inverse of `_rows`."""
    return tl.trans(_gather(_gather(_gather(rows)))[0])


@triton.jit
def _gather(tiles: tl.tuple) -> Any:
    """The inverse of `_deal`."""
    joined = tl.tuple([])
    for i in tl.static_range(len(tiles) // 2):
        pair = tl.join(tiles[i], tiles[i + len(tiles) // 2])
        joined += tl.tuple([tl.reshape(pair, (pair.shape[0], pair.numel // pair.shape[0]))])
    return joined


def variants(dtype: torch.dtype, lanes: int) -> list[Variant]:
    """Launches for the kernel report, with tokens in `dtype`: four routes of VMamba's stages, and blocks of Vim."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found = []
    for name, (b, k, d, n, r, length) in _SHAPES.items():
        u, delta, B = (empty(b, i, length, c, dtype=dtype).transpose(-1, -2) for i, c in ((1, d), (k, r or d), (k, n)))
        A, D, proj, start = empty(k, d, n), empty(k, d), empty(k, d, r) if r else None, None
        routes, reset = empty(k, length, dtype=torch.int64) if k > 1 else None, None
        y, last = empty(b, 1, length, d).mT, empty(b, k, n, d).mT
        saved = empty(b, k, triton.cdiv(length, CHUNK), n, d)
        tensors = (u, delta, A, B.unsqueeze(2), B.unsqueeze(2), D, D, proj, start, reset, routes)
        ahead = _forward_launch(*tensors, True, (_allocate_output(y, u, A, lanes), last, saved), lanes)
        grads = _allocate_grads(u, A, B.unsqueeze(2), B.unsqueeze(2), lanes)
        back = _backward_launch(y, last, saved, *tensors, True, grads, lanes)
        bulk = ("u_ptr",) if r else ("u_ptr", "delta_ptr")
        found += [
            Variant(f"selective_scan forward, {name}", ahead, bulk, _REGISTERS),
            Variant(f"selective_scan backward, {name}", back, (*bulk, "dy_ptr"), _REGISTERS_BACKWARD),
        ]
    return found


# batch, routes, channels, states, rank of delta (0: it comes in full), tokens
_SHAPES = {
    "VMamba": (32, 4, 384, 1, 24, 196),
    "Vim": (32, 2, 384, 16, 24, 197),
    "Mamba": (8, 1, 768, 16, 0, 1024),
}
