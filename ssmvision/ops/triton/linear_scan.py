"""`linear_scan` in Triton: a program owns a tile of the state and walks over the steps, reading and writing each once.

The recurrence moves bytes and hardly computes, so what counts is that loads are wide and that several are on their way
at any time: a program asks for several steps before it needs the first of them. Complex numbers lie as (re, im) pairs;
of a real number both parts are the number itself, and the second is never used.

Letters: b batch, l token, s step in visiting order, p state, q state with the same decay.
A row is one step of one sample.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import Gradients
from ._common import Launch, Variant, strides

_TILE_BYTES = 1024  # of the narrowest operand: the widest load, 16 bytes, in each thread of AMD's warp of 64
_AHEAD = 1024  # numbers of each operand on their way to a program


def forward(
    a: Tensor, x: Tensor, initial_state: Tensor | None, reset: Tensor | None, reverse: bool, out: tuple[Tensor, Tensor]
) -> None:
    """Fill `out` = (h, last); shapes as in `ops.linear_scan._forward`."""
    _forward_launch(a, x, initial_state, reset, reverse, out).run()


def backward(
    dh: Tensor, dlast: Tensor | None, h: Tensor, a: Tensor, initial_state: Tensor | None, reset: Tensor | None,
    reverse: bool,
) -> Gradients:  # fmt: skip
    """Gradients of a, x and the initial state."""
    grads = _allocate_grads(h, a)
    _backward_launch(dh, dlast, h, a, initial_state, reset, reverse, grads).run()
    da, dx, dinitial = grads
    # What was found where `a` repeats is added in a fixed order, so that runs agree to the last bit.
    return da.sum_to_size(a.shape), dx, None if initial_state is None else dinitial


def _allocate_grads(h: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    b, l, p, q = h.shape
    return h.new_empty(b, a.shape[1], p, q), h.new_empty(b, l, p, q), h.new_empty(b, p, q)


def _forward_launch(
    a: Tensor, x: Tensor, initial_state: Tensor | None, reset: Tensor | None, reverse: bool, out: tuple[Tensor, Tensor]
) -> Launch:
    h, last = out
    arguments = {"x": x, "a": a, "initial": initial_state, "reset": reset, "h": h, "last": last}
    return _launch(_forward_kernel, arguments, x, a, reverse)


def _backward_launch(
    dh: Tensor, dlast: Tensor | None, h: Tensor, a: Tensor, initial_state: Tensor | None, reset: Tensor | None,
    reverse: bool, grads: tuple[Tensor, Tensor, Tensor],
) -> Launch:  # fmt: skip
    da, dx, dinitial = grads
    arguments = {"dh": dh, "dlast": dlast, "h": h, "a": a, "initial": initial_state, "reset": reset}
    arguments |= {"dx": dx, "da": da, "dinitial": None if initial_state is None else dinitial}
    return _launch(_backward_kernel, arguments, h, a, reverse)


def _launch(kernel: tl.tensor, tensors: dict[str, Tensor | None], x: Tensor, a: Tensor, reverse: bool) -> Launch:
    (b, length, p, q), parts = x.shape, 2 if a.is_complex() else 1
    row = p * q * parts
    block = _TILE_BYTES * parts // x.element_size()
    return Launch(
        kernel,
        (b * triton.cdiv(row, block),),
        {
            **{f"{name}_ptr": _numbers(x) for name, x in tensors.items()},
            **strides("a", _numbers(a), "b", "l"),
            "length": length,
            "row": row,
            "inner": q,
        },
        {
            "REVERSE": reverse, "COMPLEX": a.is_complex(), "VARYING": a.shape[1] != 1, "REPEATS": a.shape[3] != q,
            "STEPS": _AHEAD // block, "BLOCK": block,
        },
        num_warps=1,
    )  # fmt: skip


def _numbers(x: Tensor | None) -> Tensor | None:
    """The real numbers in memory, row after row."""
    if x is None:
        return None
    return torch.view_as_real(x.resolve_conj().contiguous()) if x.is_complex() else x.contiguous()


@triton.jit(do_not_specialize=["length"])
def _forward_kernel(
    x_ptr: tl.tensor, a_ptr: tl.tensor, initial_ptr: tl.tensor, reset_ptr: tl.tensor, h_ptr: tl.tensor,
    last_ptr: tl.tensor, length: tl.tensor, row: tl.tensor, inner: tl.tensor, a_b: tl.tensor, a_l: tl.tensor,
    REVERSE: tl.constexpr, COMPLEX: tl.constexpr, VARYING: tl.constexpr, REPEATS: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """h_s = a_s h_{s-1} + x_s."""
    batch, e, inside = _tile(row, BLOCK)
    x_ptr += batch * length * row + e
    h_ptr += batch * length * row + e
    a_ptr += batch * a_b + _decay_offsets(e, inner, COMPLEX, REPEATS)
    re, im = _parts(tl.zeros((BLOCK,), tl.float32), COMPLEX)
    if initial_ptr is not None:
        re, im = _parts(tl.load(initial_ptr + batch * row + e, mask=inside, other=0.0), COMPLEX)
    if not VARYING:
        a_re, a_im = _parts(tl.load(a_ptr, mask=inside, other=0.0), COMPLEX)
    for start in range(0, length, STEPS):
        inputs, decays, cuts = tl.tuple([]), tl.tuple([]), tl.tuple([])
        for i in tl.static_range(STEPS):
            s = start + i
            token = _token(s, length, REVERSE)
            inputs += tl.tuple([tl.load(x_ptr + token * row, mask=inside & (s < length), other=0.0)])
            if VARYING:
                decays += tl.tuple([tl.load(a_ptr + token * a_l, mask=inside & (s < length), other=0.0)])
            cuts += tl.tuple([_cut(reset_ptr, batch * length + token, s, length, initial_ptr is None)])
        for i in tl.static_range(STEPS):
            s = start + i
            x_re, x_im = _parts(inputs[i], COMPLEX)
            if VARYING:
                a_re, a_im = _parts(decays[i], COMPLEX)
            kept_re, kept_im = _product(a_re, a_im, re, im, COMPLEX)
            # Selected, not multiplied: where no state comes in, not even an infinite decay counts.
            next_re, next_im = tl.where(cuts[i], 0.0, kept_re) + x_re, tl.where(cuts[i], 0.0, kept_im) + x_im
            re, im = tl.where(s < length, next_re, re), tl.where(s < length, next_im, im)
            token = _token(s, length, REVERSE)
            tl.store(h_ptr + token * row, _whole(re, im, COMPLEX), mask=inside & (s < length))
    tl.store(last_ptr + batch * row + e, _whole(re, im, COMPLEX), mask=inside)


@triton.jit(do_not_specialize=["length"])
def _backward_kernel(
    dh_ptr: tl.tensor, dlast_ptr: tl.tensor, h_ptr: tl.tensor, a_ptr: tl.tensor, initial_ptr: tl.tensor,
    reset_ptr: tl.tensor, dx_ptr: tl.tensor, da_ptr: tl.tensor, dinitial_ptr: tl.tensor, length: tl.tensor,
    row: tl.tensor, inner: tl.tensor, a_b: tl.tensor, a_l: tl.tensor, REVERSE: tl.constexpr, COMPLEX: tl.constexpr,
    VARYING: tl.constexpr, REPEATS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """g_s = dh_s + conj(a_{s+1}) g_{s+1}, the gradient of x_s; that of a_s is g_s conj(h_{s-1})."""
    batch, e, inside = _tile(row, BLOCK)
    dh_ptr += batch * length * row + e
    dx_ptr += batch * length * row + e
    h_ptr += batch * length * row + e
    a_ptr += batch * a_b + _decay_offsets(e, inner, COMPLEX, REPEATS)
    re, im = _parts(tl.zeros((BLOCK,), tl.float32), COMPLEX)  # what step s + 1 hands down
    da_re, da_im = re, im
    if dlast_ptr is not None:
        re, im = _parts(tl.load(dlast_ptr + batch * row + e, mask=inside, other=0.0), COMPLEX)
    if VARYING:
        da_ptr += batch * length * row + e
    else:
        da_ptr += batch * row + e
        a_re, a_im = _parts(tl.load(a_ptr, mask=inside, other=0.0), COMPLEX)
    for start in range(0, length, STEPS):
        inputs, decays, states, cuts = tl.tuple([]), tl.tuple([]), tl.tuple([]), tl.tuple([])
        for i in tl.static_range(STEPS):
            s = length - 1 - start - i
            token, before = _token(s, length, REVERSE), _token(s - 1, length, REVERSE)
            inputs += tl.tuple([tl.load(dh_ptr + token * row, mask=inside & (s >= 0), other=0.0)])
            state = tl.load(h_ptr + before * row, mask=inside & (s > 0), other=0.0)
            if initial_ptr is not None:
                state += tl.load(initial_ptr + batch * row + e, mask=inside & (s == 0), other=0.0)
            states += tl.tuple([state])
            if VARYING:
                decays += tl.tuple([tl.load(a_ptr + token * a_l, mask=inside & (s >= 0), other=0.0)])
            cuts += tl.tuple([_cut(reset_ptr, batch * length + token, s, length, initial_ptr is None)])
        for i in tl.static_range(STEPS):
            s = length - 1 - start - i
            token = _token(s, length, REVERSE)
            dh_re, dh_im = _parts(inputs[i], COMPLEX)
            g_re, g_im = re + dh_re, im + dh_im
            tl.store(dx_ptr + token * row, _whole(g_re, g_im, COMPLEX), mask=inside & (s >= 0))
            h_re, h_im = _parts(states[i], COMPLEX)
            step_re, step_im = _product(h_re, -h_im, g_re, g_im, COMPLEX)
            step_re, step_im = tl.where(cuts[i], 0.0, step_re), tl.where(cuts[i], 0.0, step_im)
            if VARYING:
                a_re, a_im = _parts(decays[i], COMPLEX)
                tl.store(da_ptr + token * row, _whole(step_re, step_im, COMPLEX), mask=inside & (s >= 0))
            else:
                da_re, da_im = da_re + step_re, da_im + step_im
            next_re, next_im = _product(a_re, -a_im, g_re, g_im, COMPLEX)
            next_re, next_im = tl.where(cuts[i], 0.0, next_re), tl.where(cuts[i], 0.0, next_im)
            re, im = tl.where(s >= 0, next_re, re), tl.where(s >= 0, next_im, im)
    if not VARYING:
        tl.store(da_ptr, _whole(da_re, da_im, COMPLEX), mask=inside)
    if dinitial_ptr is not None:
        tl.store(dinitial_ptr + batch * row + e, _whole(re, im, COMPLEX), mask=inside)


@triton.jit
def _tile(row: tl.tensor, BLOCK: tl.constexpr) -> Any:
    """This program's sample, the places of its numbers in a row, and which of them exist."""
    tiles = tl.cdiv(row, BLOCK)
    e = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // tiles).to(tl.int64), e, e < row


@triton.jit
def _decay_offsets(e: tl.tensor, inner: tl.tensor, COMPLEX: tl.constexpr, REPEATS: tl.constexpr) -> Any:
    """Where the decays of the numbers at `e` lie in their row, in which those along q are one."""
    if not REPEATS:
        return e
    elif COMPLEX:
        return e // 2 // inner * 2 + e % 2
    else:
        return e // inner


@triton.jit
def _token(s: tl.tensor, length: tl.tensor, REVERSE: tl.constexpr) -> Any:
    return tl.cast(length - 1 - s if REVERSE else s, tl.int64)


@triton.jit
def _cut(reset_ptr: tl.tensor, place: tl.tensor, s: tl.tensor, length: tl.tensor, FROM_ZERO: tl.constexpr) -> Any:
    """Whether no state comes into step s: at a reset, or at a start from nothing."""
    cut = (s == 0) & FROM_ZERO
    if reset_ptr is not None:
        cut |= tl.load(reset_ptr + place, mask=(s >= 0) & (s < length), other=0) != 0
    return cut


@triton.jit
def _parts(tile: tl.tensor, COMPLEX: tl.constexpr) -> Any:
    tile = tile.to(tl.float32)
    if COMPLEX:
        return tl.split(tl.reshape(tile, (tile.shape[0] // 2, 2)))
    else:
        return tile, tile


@triton.jit
def _whole(re: tl.tensor, im: tl.tensor, COMPLEX: tl.constexpr) -> Any:
    if COMPLEX:
        return tl.reshape(tl.join(re, im), (2 * re.shape[0],))
    else:
        return re


@triton.jit
def _product(a_re: tl.tensor, a_im: tl.tensor, b_re: tl.tensor, b_im: tl.tensor, COMPLEX: tl.constexpr) -> Any:
    if COMPLEX:
        return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re
    else:
        return a_re * b_re, a_re * b_re


def variants(dtype: torch.dtype, _lanes: int) -> list[Variant]:
    """Launches for the kernel report, with x in `dtype`: a gated recurrence, and the complex one of ConvS5."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    cases = [("gated", empty(8, 256, 1024, 1, dtype=dtype), empty(8, 256, 1024, 1))]
    if dtype == torch.float32:
        number = torch.complex64
        cases.append(("complex", empty(8, 96, 64, 256, dtype=number), empty(1, 1, 64, 1, dtype=number)))
    found = []
    for name, x, a in cases:
        h, last = empty(*x.shape, dtype=a.dtype), empty(x.shape[0], *x.shape[2:], dtype=a.dtype)
        reset = empty(*x.shape[:2], dtype=torch.bool)
        ahead = _forward_launch(a, x, last, reset, False, (h, last))
        back = _backward_launch(h, last, h, a, last, reset, False, _allocate_grads(h, a))
        varying = ("a_ptr",) if a.shape[1] > 1 else ()
        found += [
            Variant(f"linear_scan forward, {name}", ahead, ("x_ptr", *varying), 128),
            Variant(f"linear_scan backward, {name}", back, ("dh_ptr", "h_ptr", *varying), 232),
        ]
    return found
