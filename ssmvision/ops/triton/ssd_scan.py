"""`ssd_scan` in Triton: chunks of 64 steps by matrix products (Mamba-2, arXiv:2405.21060, section 6).

With e_i the sum of the decays' exponents from the start of a chunk to step i, what step j gives to a later step i of
its chunk is 2^(e_i - e_j) (C_i B_j) step_j x_j: attention with a decaying mask. What came before the chunk enters
through the state S, as 2^e_i C_i S. So few kernels do everything, forward and backward:

    _exponents_kernel  sums the exponents, once for all others
    _states_kernel     walks over the chunks with a tile of the state; backward, with a tile of its gradient
    _attend_kernel     the attention and the state's part of a block of rows: y, and in the same form the gradients of
                       x, B and C, whose rows look at later or at earlier steps
    _slopes_kernel     the gradients of step and A

Exponents are kept as two sums, a coarse one that is exact and a fine one that is small: their differences are as good
as sums over just the steps between. None that is used is positive where A is negative. A NaN may reach every token of
its chunk, also the earlier ones, but no other sequence in another chunk.

Letters: b batch, h head, p head channel, n state, g group of heads, l token, i row, j column; of an attention, m inner
and o outer features: rows u (m) meet columns v (m), and columns z (o) are summed.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import CHUNK, Gradients
from ._common import LOG2E, Launch, Variant, power_of_two, warp_size

_QUANTUM = tl.constexpr(1 / 32)  # of coarse sums: no sum in a chunk needs more than a float's 24 bits
_CUT = tl.constexpr(-8192.0)  # the exponent of a reset: 2^e is 0 whatever the other exponents of the chunk sum up to
_LARGEST = tl.constexpr(127.0)  # of other exponents: the range of a float
_HEADS = 16  # per program of _exponents_kernel


class _Tiles(NamedTuple):
    """Sizes of tiles. Products in float32 have no tensor cores on NVIDIA: they hold their operands in registers."""

    product: Any  # what is multiplied; sums are float32
    steps: int
    rows: int
    inner: int
    outer: int
    warps: int = 4  # 128 lanes: with more, what a lane reads of the smallest tile at a time is less than 128 bits


_HALF = _Tiles(tl.bfloat16, steps=32, rows=64, inner=32, outer=64)
_SINGLE = _Tiles(tl.float32, steps=16, rows=32, inner=16, outer=32)


def forward(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, reset: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out` = (y, last state, checkpoints); shapes as in `ops.ssd_scan._forward`."""
    for launch in _forward_launches(x, step, A, B, C, initial_state, reset, out, warp_size(x)):
        launch.run()


def backward(
    dy: Tensor, dlast: Tensor | None, checkpoints: Tensor, x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor,
    initial_state: Tensor | None, reset: Tensor | None,
) -> Gradients:  # fmt: skip
    """Gradients of x, step, A, B, C and the initial state."""
    grads = _allocate_grads(x, step, B)
    tensors = (x, step, A, B, C, initial_state, reset)
    for launch in _backward_launches(dy, dlast, checkpoints, *tensors, grads, warp_size(x)):
        launch.run()
    dx, dstep, dA, dB, dC, dinitial = grads
    # Samples, chunks and heads are added in a fixed order, so that repeated runs agree to the last bit.
    dB, dC = (m.unflatten(2, (B.shape[2], -1)).sum(3) for m in (dB, dC))
    return dx, dstep, dA.sum((0, 2)), dB, dC, None if initial_state is None else dinitial.transpose(-1, -2)


def _allocate_grads(x: Tensor, step: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of x and step; of A, by chunks; of B and C, by heads; of the initial state, transposed."""
    (b, length, h, p), n = x.shape, B.shape[-1]
    dB, dC = step.new_empty(b, length, h, n), step.new_empty(b, length, h, n)
    dA, dinitial = step.new_empty(b, h, triton.cdiv(length, CHUNK)), step.new_empty(b, h, n, p)
    return x.new_empty(x.shape), step.new_empty(step.shape), dA, dB, dC, dinitial


def _forward_launches(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None, reset: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor], lanes: int,
) -> list[Launch]:  # fmt: skip
    y, last, checkpoints = out
    tiles = _tiles(lanes, x, B, C)
    sums, exponents = _exponents(step, A, reset, initial_state)
    return [
        exponents,
        _states(tiles, sums, B, x, initial_state, checkpoints, last.transpose(-1, -2)),
        _attend(tiles, sums, C, B, x, checkpoints, y),
    ]


def _backward_launches(
    dy: Tensor, dlast: Tensor | None, checkpoints: Tensor, x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor,
    initial_state: Tensor | None, reset: Tensor | None, grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    lanes: int,
) -> list[Launch]:  # fmt: skip
    dx, dstep, dA, dB, dC, dinitial = grads
    (b, length, h, p), n = x.shape, B.shape[-1]
    tiles = _tiles(lanes, x, B, C)
    sums, exponents = _exponents(step, A, reset, initial_state)
    # What the slopes need of the states' part, in partial sums over tiles: see _slopes_kernel.
    carried = step.new_empty(*checkpoints.shape[:3], _blocks(n, _STATE_N) * _blocks(p, _STATE_P))
    dstates, turned = torch.empty_like(checkpoints), checkpoints.transpose(-1, -2)
    x_state, x_all = (step.new_empty(b, h, _blocks(p, tiles.outer), length) for _ in range(2))
    c_state, c_all = (step.new_empty(b, h, _blocks(n, tiles.outer), length) for _ in range(2))
    return [
        exponents,
        _states(tiles, sums, C, dy, dlast, dstates, dinitial, checkpoints, carried),
        _attend(tiles, sums, B, C, dy, dstates, dx, later=True, partner=x, dots=(x_state, x_all)),
        _attend(tiles, sums, dy, x, B, turned, dC, partner=C, dots=(c_state, c_all)),
        _attend(tiles, sums, x, dy, C, dstates.transpose(-1, -2), dB, later=True),
        _slopes(tiles, sums, C, B, dy, x, (carried, c_state, x_state, x_all), A, reset, initial_state, dstep, dA),
    ]


_STATE_N, _STATE_P = 64, 32  # the tile of a state that a program carries along


def _tiles(lanes: int, *tokens: Tensor) -> _Tiles:
    # float16 counts as float32: a state may be too large for it.
    tiles = _HALF if all(x.dtype == torch.bfloat16 for x in tokens) else _SINGLE
    return tiles if lanes == 32 else tiles._replace(rows=32, warps=2)


def _block(size: int, most: int) -> int:
    return min(most, power_of_two(size, at_least=16))


def _blocks(size: int, most: int) -> int:
    return triton.cdiv(size, _block(size, most))


def _operand(name: str, x: Tensor | None, heads: int) -> dict[str, Any]:
    """Arguments for tokens (b, l, h or g, features): pointer, strides and how many heads share a group."""
    if x is None:
        return {f"{name}_{suffix}": 0 for suffix in ("b", "l", "h", "shared")} | {f"{name}_ptr": None}
    x = x if x.stride(-1) == 1 else x.contiguous()
    strides = {f"{name}_{axis}": stride for axis, stride in zip("blh", x.stride(), strict=False)}
    return {f"{name}_ptr": x, **strides, f"{name}_shared": heads // x.shape[2]}


def _flags(reset: Tensor | None) -> dict[str, Tensor | None]:
    return {"reset_ptr": None if reset is None else reset.contiguous()}


def _exponents(
    step: Tensor, A: Tensor, reset: Tensor | None, initial_state: Tensor | None
) -> tuple[dict[str, Tensor], Launch]:
    """Sums of exponents, coarse and fine, and step, each (b, h, l); and what fills them."""
    b, length, h = step.shape
    sums = {f"{name}_ptr": step.new_empty(b, h, length) for name in ("coarse", "fine", "sizes")}
    launch = Launch(
        _exponents_kernel,
        (b * triton.cdiv(length, CHUNK) * triton.cdiv(h, _HEADS),),
        {"step_ptr": step.contiguous(), "A_ptr": A.contiguous(), **_flags(reset), **sums, "length": length, "heads": h},
        {"FROM_ZERO": initial_state is None, "CHUNK": CHUNK, "HEADS": _HEADS},
        num_warps=4,
    )  # fmt: skip
    return sums, launch


def _states(
    tiles: _Tiles, sums: dict[str, Tensor], v: Tensor, z: Tensor, initial_state: Tensor | None, states: Tensor,
    final: Tensor, saved: Tensor | None = None, dots: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The states before all chunks; or, given these as `saved`, the gradients of those after all chunks."""
    b, h, _, n, p = states.shape
    sizes = {"BLOCK_N": _block(n, _STATE_N), "BLOCK_P": _block(p, _STATE_P)}
    initial = None if initial_state is None else initial_state.transpose(-1, -2).contiguous()
    return Launch(
        _states_kernel,
        (b * h * _blocks(n, _STATE_N) * _blocks(p, _STATE_P),),
        {**sums, **_operand("v", v, h), **_operand("z", z, h), "initial_ptr": initial, "states_ptr": states,
         "final_ptr": final, "saved_ptr": saved, "dots_ptr": dots, "length": z.shape[1], "heads": h, "n": n, "p": p},
        {"BACKWARD": saved is not None, "PRODUCT": tiles.product, "CHUNK": CHUNK, "STEPS": tiles.steps, **sizes},
        num_warps=tiles.warps,
    )  # fmt: skip


def _attend(
    tiles: _Tiles, sums: dict[str, Tensor], u: Tensor, v: Tensor, z: Tensor, states: Tensor, out: Tensor,
    later: bool = False, partner: Tensor | None = None, dots: tuple[Tensor, Tensor] | None = None,
) -> Launch:  # fmt: skip
    """Fill `out` (b, l, h, o); `dots`, if given, with its products with `partner`: of the states' part, and of all."""
    (b, length, h, o), m = out.shape, u.shape[-1]
    sizes = {"BLOCK_M": _block(m, tiles.inner), "BLOCK_O": _block(o, tiles.outer)}
    operands = {"u": u, "v": v, "z": z, "partner": partner}
    state_dots, all_dots = dots or (None, None)
    return Launch(
        _attend_kernel,
        (b * h * triton.cdiv(length, tiles.rows) * _blocks(o, tiles.outer),),
        {**sums, **{key: value for name, x in operands.items() for key, value in _operand(name, x, h).items()},
         "states_ptr": states, "state_m": states.stride(-2), "state_o": states.stride(-1), "out_ptr": out,
         "state_dots_ptr": state_dots, "all_dots_ptr": all_dots, "length": length, "heads": h, "m": m, "o": o},
        {"LATER": later, "PRODUCT": tiles.product, "CHUNK": CHUNK, "ROWS": tiles.rows, "COLUMNS": 32, **sizes},
        num_warps=tiles.warps,
        registers=232 if later or dots else 128,
    )  # fmt: skip


def _slopes(
    tiles: _Tiles, sums: dict[str, Tensor], C: Tensor, B: Tensor, dy: Tensor, x: Tensor,
    dots: tuple[Tensor, Tensor, Tensor, Tensor], A: Tensor, reset: Tensor | None, initial_state: Tensor | None,
    dstep: Tensor, dA: Tensor,
) -> Launch:  # fmt: skip
    (b, length, h, p), n = x.shape, B.shape[-1]
    carried, c_state, x_state, x_all = dots
    operands = {"C": C, "B": B, "dy": dy, "x": x}
    return Launch(
        _slopes_kernel,
        (b * h * triton.cdiv(length, CHUNK),),
        {**sums, **{key: value for name, x in operands.items() for key, value in _operand(name, x, h).items()},
         "carried_ptr": carried, "c_state_ptr": c_state, "x_state_ptr": x_state, "x_all_ptr": x_all,
         "A_ptr": A.contiguous(), **_flags(reset), "dstep_ptr": dstep, "dA_ptr": dA, "length": length, "heads": h,
         "n": n, "p": p},
        {"FROM_ZERO": initial_state is None, "PRODUCT": tiles.product, "CHUNK": CHUNK, "STATE_TILES": carried.shape[-1],
         "N_TILES": c_state.shape[2], "P_TILES": x_state.shape[2], "BLOCK_N": _block(n, tiles.inner),
         "BLOCK_P": _block(p, tiles.inner)},
        num_warps=2 * tiles.warps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length"])
def _exponents_kernel(
    step_ptr: tl.tensor, A_ptr: tl.tensor, reset_ptr: tl.tensor, coarse_ptr: tl.tensor, fine_ptr: tl.tensor,
    sizes_ptr: tl.tensor, length: tl.tensor, heads: tl.tensor, FROM_ZERO: tl.constexpr, CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:  # fmt: skip
    """Sums of exponents over the steps of one chunk, and step itself, by heads."""
    blocks, chunks = tl.cdiv(heads, HEADS), tl.cdiv(length, CHUNK)
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)[None, :]
    t = tl.program_id(0) // blocks % chunks * CHUNK + tl.arange(0, CHUNK)[:, None]
    batch = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    inside = (t < length) & (head < heads)
    step = tl.load(step_ptr + (batch * length + t) * heads + head, mask=inside, other=0.0)
    e = step * (tl.load(A_ptr + head, mask=head < heads, other=0.0) * LOG2E)
    e = tl.clamp(e, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    e = tl.where(_cut(reset_ptr, batch * length, t, t < length, FROM_ZERO), _CUT, e)
    coarse = tl.floor(e / _QUANTUM + 0.5) * _QUANTUM
    place = (batch * heads + head) * length + t
    tl.store(coarse_ptr + place, tl.cumsum(coarse, 0), mask=inside)
    tl.store(fine_ptr + place, tl.cumsum(e - coarse, 0), mask=inside)
    tl.store(sizes_ptr + place, step, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _states_kernel(
    coarse_ptr: tl.tensor, fine_ptr: tl.tensor, sizes_ptr: tl.tensor, v_ptr: tl.tensor, z_ptr: tl.tensor,
    initial_ptr: tl.tensor, states_ptr: tl.tensor, final_ptr: tl.tensor, saved_ptr: tl.tensor, dots_ptr: tl.tensor,
    length: tl.tensor, heads: tl.tensor, n: tl.tensor, p: tl.tensor, v_b: tl.tensor, v_l: tl.tensor, v_h: tl.tensor,
    v_shared: tl.tensor, z_b: tl.tensor, z_l: tl.tensor, z_h: tl.tensor, z_shared: tl.tensor, BACKWARD: tl.constexpr,
    PRODUCT: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
) -> None:  # fmt: skip
    """A tile (n, p) of one head's state before every chunk, where v = B and z = x.

    Backward, of its gradient after every chunk, where v = C and z = dy; then also its product with the saved state that
    entered the chunk, decayed by the chunk.
    """
    tiles = tl.cdiv(n, BLOCK_N) * tl.cdiv(p, BLOCK_P)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    jn = tile // tl.cdiv(p, BLOCK_P) * BLOCK_N + tl.arange(0, BLOCK_N)
    jp = tile % tl.cdiv(p, BLOCK_P) * BLOCK_P + tl.arange(0, BLOCK_P)
    v_ptr += batch * v_b + head // v_shared * v_h + jn
    z_ptr += batch * z_b + head // z_shared * z_h + jp
    sequence, chunks = batch * heads + head, tl.cdiv(length, CHUNK)
    coarse_ptr += sequence * length
    fine_ptr += sequence * length
    sizes_ptr += sequence * length
    place = jn[:, None] * p + jp[None, :]
    inside = (jn < n)[:, None] & (jp < p)[None, :]
    state = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    if initial_ptr is not None:
        state += tl.load(initial_ptr + sequence * n * p + place, mask=inside, other=0.0)
    for count in range(chunks):
        chunk = chunks - 1 - count if BACKWARD else count
        here = sequence * chunks + chunk
        tl.store(states_ptr + here * n * p + place, state, mask=inside)
        end = tl.minimum(chunk * CHUNK + CHUNK, length) - 1
        coarse_end, fine_end = tl.load(coarse_ptr + end), tl.load(fine_ptr + end)
        # Selected, not multiplied, here and below: past a reset, not even a NaN of the state counts.
        kept = tl.exp2(coarse_end + fine_end)
        state = tl.where(kept == 0, 0.0, kept * state)
        if BACKWARD:
            saved = tl.load(saved_ptr + here * n * p + place, mask=inside, other=0.0)
            tl.store(dots_ptr + here * tiles + tile, tl.sum(tl.where(kept == 0, 0.0, state * saved)))
        for start in range(chunk * CHUNK, end + 1, STEPS):
            t = (start + tl.arange(0, STEPS)).to(tl.int64)
            there = t <= end
            coarse = tl.load(coarse_ptr + t, mask=there, other=0.0)
            fine = tl.load(fine_ptr + t, mask=there, other=0.0)
            exponent = coarse + fine if BACKWARD else (coarse_end - coarse) + (fine_end - fine)
            weight = tl.exp2(tl.where(there, exponent, -float("inf")))
            if not BACKWARD:
                weight *= tl.load(sizes_ptr + t, mask=there, other=0.0)
            counts = (weight != 0)[:, None]
            v = tl.load(v_ptr + t[:, None] * v_l, mask=counts & (jn < n)[None, :], other=0.0)
            z = tl.load(z_ptr + t[:, None] * z_l, mask=counts & (jp < p)[None, :], other=0.0)
            weighted = tl.trans((v.to(tl.float32) * weight[:, None]).to(PRODUCT))
            state = tl.dot(weighted, z.to(PRODUCT), state, input_precision="ieee")
    tl.store(final_ptr + sequence * n * p + place, state, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _attend_kernel(
    coarse_ptr: tl.tensor, fine_ptr: tl.tensor, sizes_ptr: tl.tensor, u_ptr: tl.tensor, v_ptr: tl.tensor,
    z_ptr: tl.tensor, states_ptr: tl.tensor, out_ptr: tl.tensor, partner_ptr: tl.tensor, state_dots_ptr: tl.tensor,
    all_dots_ptr: tl.tensor, length: tl.tensor, heads: tl.tensor, m: tl.tensor, o: tl.tensor, u_b: tl.tensor,
    u_l: tl.tensor, u_h: tl.tensor, u_shared: tl.tensor, v_b: tl.tensor, v_l: tl.tensor, v_h: tl.tensor,
    v_shared: tl.tensor, z_b: tl.tensor, z_l: tl.tensor, z_h: tl.tensor, z_shared: tl.tensor, state_m: tl.tensor,
    state_o: tl.tensor, partner_b: tl.tensor, partner_l: tl.tensor, partner_h: tl.tensor, partner_shared: tl.tensor,
    LATER: tl.constexpr, PRODUCT: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr,
) -> None:  # fmt: skip
    """Rows i of sum_j 2^(e_i - e_j) (u_i v_j) step_j z_j over the chunk's steps up to i, plus 2^e_i u_i S.

    With LATER, of step_i (sum_j 2^(e_j - e_i) (u_i v_j) z_j over its steps from i on, plus 2^(e_end - e_i) u_i S).
    Products with a partner are taken before step_i multiplies.
    """
    tiles, blocks = tl.cdiv(o, BLOCK_O), tl.cdiv(length, ROWS)
    tile = tl.program_id(0) % tiles
    start = tl.program_id(0) // tiles % blocks * ROWS
    head = tl.program_id(0) // tiles // blocks % heads
    batch = (tl.program_id(0) // tiles // blocks // heads).to(tl.int64)
    sequence = batch * heads + head
    first, end = start // CHUNK * CHUNK, tl.minimum(start // CHUNK * CHUNK + CHUNK, length)
    i = (start + tl.arange(0, ROWS)).to(tl.int64)
    jm, jo = tl.arange(0, BLOCK_M), tile * BLOCK_O + tl.arange(0, BLOCK_O)
    u_ptr += batch * u_b + head // u_shared * u_h
    v_ptr += batch * v_b + head // v_shared * v_h
    z_ptr += batch * z_b + head // z_shared * z_h + jo
    states_ptr += (sequence * tl.cdiv(length, CHUNK) + start // CHUNK) * m * o
    coarse_ptr += sequence * length
    fine_ptr += sequence * length
    sizes_ptr += sequence * length
    there = i < length
    coarse_i, fine_i = tl.load(coarse_ptr + i, mask=there, other=0.0), tl.load(fine_ptr + i, mask=there, other=0.0)
    inside = there[:, None] & (jo < o)[None, :]

    out = tl.zeros((ROWS, BLOCK_O), tl.float32)
    for base in range(0, m, BLOCK_M):
        known = base + jm < m
        u = tl.load(u_ptr + i[:, None] * u_l + base + jm, mask=there[:, None] & known[None, :], other=0.0)
        state_place = (base + jm)[:, None] * state_m + jo[None, :] * state_o
        state = tl.load(states_ptr + state_place, mask=known[:, None] & (jo < o)[None, :], other=0.0)
        out = tl.dot(u.to(PRODUCT), state.to(PRODUCT), out, input_precision="ieee")
    exponent = coarse_i + fine_i
    if LATER:
        exponent = (tl.load(coarse_ptr + end - 1) - coarse_i) + (tl.load(fine_ptr + end - 1) - fine_i)
    kept = tl.exp2(tl.where(there, exponent, -float("inf")))
    out = tl.where((kept == 0)[:, None], 0.0, kept[:, None] * out)
    if partner_ptr is not None:
        partner_ptr += batch * partner_b + head // partner_shared * partner_h
        partner = tl.load(partner_ptr + i[:, None] * partner_l + jo, mask=inside, other=0.0).to(tl.float32)
        dots_place = (sequence * tiles + tile) * length + i
        tl.store(state_dots_ptr + dots_place, tl.sum(out * partner, 1), mask=there)

    for column in range(start if LATER else first, end if LATER else tl.minimum(start + ROWS, end), COLUMNS):
        j = (column + tl.arange(0, COLUMNS)).to(tl.int64)
        present = j < end
        scores = tl.zeros((ROWS, COLUMNS), tl.float32)
        for base in range(0, m, BLOCK_M):
            known = base + jm < m
            u = tl.load(u_ptr + i[:, None] * u_l + base + jm, mask=there[:, None] & known[None, :], other=0.0)
            v = tl.load(v_ptr + j[:, None] * v_l + base + jm, mask=present[:, None] & known[None, :], other=0.0)
            scores = tl.dot(u.to(PRODUCT), tl.trans(v.to(PRODUCT)), scores, input_precision="ieee")
        coarse_j = tl.load(coarse_ptr + j, mask=present, other=0.0)
        fine_j = tl.load(fine_ptr + j, mask=present, other=0.0)
        if LATER:
            exponents = (coarse_j[None, :] - coarse_i[:, None]) + (fine_j[None, :] - fine_i[:, None])
            linked = (j[None, :] >= i[:, None]) & present[None, :]
            scores *= tl.exp2(tl.where(linked, exponents, -float("inf")))
        else:
            exponents = (coarse_i[:, None] - coarse_j[None, :]) + (fine_i[:, None] - fine_j[None, :])
            scores *= tl.exp2(tl.where((j[None, :] <= i[:, None]) & there[:, None], exponents, -float("inf")))
            scores *= tl.load(sizes_ptr + j, mask=present, other=0.0)[None, :]
        z = tl.load(z_ptr + j[:, None] * z_l, mask=present[:, None] & (jo < o)[None, :], other=0.0)
        out = tl.dot(scores.to(PRODUCT), z.to(PRODUCT), out, input_precision="ieee")
    if partner_ptr is not None:
        tl.store(all_dots_ptr + dots_place, tl.sum(out * partner, 1), mask=there)
    if LATER:
        out *= tl.load(sizes_ptr + i, mask=there, other=0.0)[:, None]
    tl.store(out_ptr + ((batch * length + i) * heads + head)[:, None] * o + jo, out, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _slopes_kernel(
    coarse_ptr: tl.tensor, fine_ptr: tl.tensor, sizes_ptr: tl.tensor, C_ptr: tl.tensor, B_ptr: tl.tensor,
    dy_ptr: tl.tensor, x_ptr: tl.tensor, carried_ptr: tl.tensor, c_state_ptr: tl.tensor, x_state_ptr: tl.tensor,
    x_all_ptr: tl.tensor, A_ptr: tl.tensor, reset_ptr: tl.tensor, dstep_ptr: tl.tensor, dA_ptr: tl.tensor,
    length: tl.tensor, heads: tl.tensor, n: tl.tensor, p: tl.tensor, C_b: tl.tensor, C_l: tl.tensor, C_h: tl.tensor,
    C_shared: tl.tensor, B_b: tl.tensor, B_l: tl.tensor, B_h: tl.tensor, B_shared: tl.tensor, dy_b: tl.tensor,
    dy_l: tl.tensor, dy_h: tl.tensor, dy_shared: tl.tensor, x_b: tl.tensor, x_l: tl.tensor, x_h: tl.tensor,
    x_shared: tl.tensor, FROM_ZERO: tl.constexpr, PRODUCT: tl.constexpr, CHUNK: tl.constexpr,
    STATE_TILES: tl.constexpr, N_TILES: tl.constexpr, P_TILES: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:  # fmt: skip
    """The gradient of a chunk's exponents, and with it those of step and A.

    Exponent k scales whatever passes from before step k to step k or later: between two steps of the chunk, from the
    state to a step, from a step to the end, or from the state to the end. Each is summed as it is, not as a difference
    of larger sums.
    """
    chunks = tl.cdiv(length, CHUNK)
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(0) // chunks % heads
    batch = (tl.program_id(0) // chunks // heads).to(tl.int64)
    sequence = batch * heads + head
    k = tl.arange(0, CHUNK)
    t = (chunk * CHUNK + k).to(tl.int64)
    there = t < length
    C_ptr += batch * C_b + head // C_shared * C_h + t[:, None] * C_l
    B_ptr += batch * B_b + head // B_shared * B_h + t[:, None] * B_l
    dy_ptr += batch * dy_b + head // dy_shared * dy_h + t[:, None] * dy_l
    x_ptr += batch * x_b + head // x_shared * x_h + t[:, None] * x_l
    scores, slopes = tl.zeros((CHUNK, CHUNK), tl.float32), tl.zeros((CHUNK, CHUNK), tl.float32)
    for base in range(0, n, BLOCK_N):
        j = base + tl.arange(0, BLOCK_N)
        C = tl.load(C_ptr + j, mask=there[:, None] & (j < n)[None, :], other=0.0).to(PRODUCT)
        B = tl.load(B_ptr + j, mask=there[:, None] & (j < n)[None, :], other=0.0).to(PRODUCT)
        scores = tl.dot(C, tl.trans(B), scores, input_precision="ieee")
    for base in range(0, p, BLOCK_P):
        j = base + tl.arange(0, BLOCK_P)
        dy = tl.load(dy_ptr + j, mask=there[:, None] & (j < p)[None, :], other=0.0).to(PRODUCT)
        x = tl.load(x_ptr + j, mask=there[:, None] & (j < p)[None, :], other=0.0).to(PRODUCT)
        slopes = tl.dot(dy, tl.trans(x), slopes, input_precision="ieee")
    place = sequence * length + t
    coarse = tl.load(coarse_ptr + place, mask=there, other=0.0)
    fine = tl.load(fine_ptr + place, mask=there, other=0.0)
    step = tl.load(sizes_ptr + place, mask=there, other=0.0)
    exponent = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    linked = (k[:, None] > k[None, :]) & there[:, None]
    slopes *= scores * tl.exp2(tl.where(linked, exponent, -float("inf"))) * step[None, :]
    passing = tl.cumsum(slopes, 0, reverse=True)  # from step j to step k or later
    found = tl.sum(tl.where(k[None, :] < k[:, None], passing, 0.0), 1)

    from_state, to_end, straight = (tl.zeros((CHUNK,), tl.float32),) * 3
    before = there & (k > 0)
    for tile in range(N_TILES):
        from_state += tl.load(c_state_ptr + (sequence * N_TILES + tile) * length + t, mask=there, other=0.0)
    for tile in range(P_TILES):
        to_end += tl.load(x_state_ptr + (sequence * P_TILES + tile) * length + t - 1, mask=before, other=0.0)
        straight += tl.load(x_all_ptr + (sequence * P_TILES + tile) * length + t, mask=there, other=0.0)
    to_end *= tl.load(sizes_ptr + place - 1, mask=before, other=0.0)
    found += tl.cumsum(from_state, 0, reverse=True) + tl.cumsum(to_end, 0)
    for tile in range(STATE_TILES):
        found += tl.load(carried_ptr + (sequence * chunks + chunk) * STATE_TILES + tile)
    found = tl.where(there & ~_cut(reset_ptr, batch * length, t, there, FROM_ZERO), found, 0.0)
    tl.store(dstep_ptr + (batch * length + t) * heads + head, tl.load(A_ptr + head) * found + straight, mask=there)
    tl.store(dA_ptr + sequence * chunks + chunk, tl.sum(found * step))


@triton.jit
def _cut(reset_ptr: tl.tensor, sample: tl.tensor, t: tl.tensor, there: tl.tensor, FROM_ZERO: tl.constexpr) -> Any:
    """Where no state comes in: at resets and at a start from nothing."""
    cut = (t == 0) & FROM_ZERO
    if reset_ptr is not None:
        cut |= tl.load(reset_ptr + sample + t, mask=there, other=0) != 0
    return cut


def variants(dtype: torch.dtype, lanes: int) -> list[Variant]:
    """Launches for the kernel report, with tokens in `dtype`: Mamba-2's usual head and state."""
    b, length, h, p, g, n = 8, 784, 12, 64, 1, 128

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, B, C = (empty(b, length, *shape, dtype=dtype) for shape in ((h, p), (g, n), (g, n)))
    step, A, state, reset = empty(b, length, h), empty(h), empty(b, h, p, n), empty(b, length, dtype=torch.bool)
    checkpoints, y = empty(b, h, triton.cdiv(length, CHUNK), n, p), empty(*x.shape)
    last = empty(b, h, n, p).transpose(-1, -2)
    _, states, attend = _forward_launches(x, step, A, B, C, state, reset, (y, last, checkpoints), lanes)
    _, dstates, dx, dC, dB, slopes = _backward_launches(
        y, last, checkpoints, x, step, A, B, C, state, reset, _allocate_grads(x, step, B), lanes
    )
    tokens = ("u_ptr", "v_ptr", "z_ptr", "states_ptr")
    return [
        Variant("ssd_scan forward, states", states, ("v_ptr", "z_ptr"), 128),
        Variant("ssd_scan forward, y", attend, tokens, 128),
        Variant("ssd_scan backward, states", dstates, ("v_ptr", "z_ptr", "saved_ptr"), 232),
        Variant("ssd_scan backward, x", dx, tokens, 232),
        Variant("ssd_scan backward, B", dB, tokens, 232),
        Variant("ssd_scan backward, C", dC, tokens, 232),
        Variant("ssd_scan backward, step and A", slopes, ("C_ptr", "B_ptr", "dy_ptr", "x_ptr"), 232),
    ]
