"""`linear_scan`, the first-order linear recurrence, real or complex: what diagonal state-space layers run over time.

Layered as `selective_scan` is. The canonical form of the state is (p, q): the decay is constant along q, the trailing
dimensions over which the caller's `a` broadcasts (pixels, for ConvS5), and varies along p. All tensors are real or all
are complex.

Letters: b batch, l step, p state, q state with the same decay.
"""

import math
from typing import Any, Optional

import torch
from torch import Tensor

from . import _backend
from ._library import (
    Gradients,
    Kernel,
    cast,
    cast_number,
    cast_token,
    expect,
    expect_number,
    expect_reset,
    no_autocast,
    register,
)  # fmt: skip
from .reference import linear_scan as reference


def linear_scan(
    a: Tensor,
    x: Tensor,
    initial_state: Optional[Tensor] = None,
    reset: Optional[Tensor] = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """First-order linear recurrence with elementwise decay (S5, arXiv:2208.04933, equation 2; ConvS5, 2310.19694).

        h_t = a_t h_{t-1} + x_t

    Args:
        a: Decay, real or complex, of any shape that broadcasts to x's: (*state) is one decay at all times, (p, 1, 1)
            that for the frames (b, l, p, height, width) of a ConvS5. It is not expanded in memory over time, batch and
            trailing dimensions of size 1.
        x: Inputs (b, l, *state), real or complex, with any number of state dimensions.
        initial_state: (b, *state); zero if None.
        reset: Boolean, (b, l): where True, the state is zeroed just before that step (start of a packed sequence or of
            an episode), and the decay of that step has no effect and no gradient.
        reverse: Visit the steps last to first.
        backend: "auto", "cpu", "triton" or "reference"; see `ssmvision.ops.backend_info`.

    Returns:
        h (b, l, *state) in x's dtype; and the state after the last step that is visited, (b, *state), in float32
        (float64 if x is). Both are complex if any input is. The recurrence runs in float32 whatever the input.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
        ValueError: A backend that does not exist or cannot run these tensors.
    """
    if not torch.jit.is_scripting():
        found = _backend.shortcut("linear_scan", _composite, None, backend, a, x, initial_state, reset, reverse)
        if found is not None:
            return found
    return torch.ops.ssmvision.linear_scan(a, x, initial_state, reset, reverse, backend)


def linear_scan_step(a: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """One step of `linear_scan`, for recurrent inference: a state + x.

    Args:
        a: Decay, real or complex, of any shape that broadcasts to x's.
        x: Input (b, *state).
        state: (b, *state), as `linear_scan` or an earlier step returned it.

    Returns:
        The next state, in float32 (float64 if `state` is), complex if any input is.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    expect_number("linear_scan_step", {"a": a, "x": x, "state": state})
    expect("linear_scan_step", "x", x, tuple(state.shape))
    a = _broadcast("linear_scan_step", a, x)
    real = _precision(state)
    return torch.addcmul(*(cast_number(t, real) for t in (x, a, state)))


def _precision(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32


def _broadcast(operator: str, a: Tensor, x: Tensor) -> Tensor:
    """`a` with x's number of dimensions, each of x's size or 1."""
    aligned = a[(None,) * (x.dim() - a.dim())]
    if aligned.dim() != x.dim() or any(m != n and m != 1 for m, n in zip(aligned.shape, x.shape, strict=True)):
        raise RuntimeError(f"{operator}: a has shape {tuple(a.shape)}, expected to broadcast to x's {tuple(x.shape)}")
    return aligned


def _composite(
    a: Tensor, x: Tensor, initial_state: Optional[Tensor] = None, reset: Optional[Tensor] = None, reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Canonical shapes and float32 or complex64 in, the caller's shapes and dtype out."""
    expect_number("linear_scan", {"a": a, "x": x, "initial_state": initial_state})
    if x.dim() < 2:
        raise RuntimeError(f"linear_scan: x has shape {tuple(x.shape)}, expected (b, l, *state)")
    a = _broadcast("linear_scan", a, x)
    state, dtype = x.shape[2:], x.dtype
    if initial_state is not None:
        expect("linear_scan", "initial_state", initial_state, (x.shape[0], *state))
    expect_reset("linear_scan", reset, tuple(x.shape[:2]))

    real = number = _precision(x)
    if any(t is not None and t.is_complex() for t in (a, x, initial_state)):
        number = real.to_complex()
        dtype = dtype if dtype.is_complex else number
    x = cast(x, number) if number.is_complex else cast_token(x, number)
    initial_state = cast(initial_state, number)
    # A real decay acts on both parts of a complex number alike: they are two states along q.
    pairs = number.is_complex and not a.is_complex()
    decay, q = _factor(cast_number(a, real), state)

    def canonical(t: Tensor) -> Tensor:
        t = torch.view_as_real(t.resolve_conj()) if pairs else t
        return t.reshape(*t.shape[: t.dim() - len(state) - pairs], decay.shape[2], q * (1 + pairs))

    def restored(t: Tensor) -> Tensor:
        t = t.view(*t.shape[:-2], *state, *[2] * pairs)
        return torch.view_as_complex(t) if pairs else t

    h, last = _backend.run(
        "linear_scan", decay, canonical(x), None if initial_state is None else canonical(initial_state), reset, reverse,
        backend,
    )  # fmt: skip
    return cast(restored(h), dtype), restored(last)


def _factor(a: Tensor, state: torch.Size) -> tuple[Tensor, int]:
    """The decay as (b|1, l|1, p, 1); and q, the number of states over whose trailing dimensions it broadcasts."""
    varying = len(state)
    while varying and a.shape[1 + varying] == 1:
        varying -= 1
    a = a.expand(*a.shape[:2], *state[:varying], *a.shape[2 + varying :])
    return a.reshape(*a.shape[:2], math.prod(state[:varying]), 1), math.prod(state[varying:])


def _allocate(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    b, _, p, q = x.shape
    return a.new_empty(x.shape), a.new_empty(b, p, q)


def _resolved(*tensors: Optional[Tensor]) -> list[Any]:
    """The tensors without lazy conjugation: torch resolves it for operators, but not for those of compiled graphs."""
    return [None if x is None else x.resolve_conj().resolve_neg() for x in tensors]


def _forward(a: Tensor, x: Tensor, initial_state: Optional[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = args
    a, x, initial_state = _resolved(a, x, initial_state)
    out = _allocate(a, x)
    _backend.choose("linear_scan", backend, x).forward(a, x, initial_state, *rest, out=out)
    return out


def _backward(
    dh: Tensor, dlast: Optional[Tensor], h: Tensor, a: Tensor, initial_state: Optional[Tensor], *args: Any
) -> list[Tensor]:
    """Contiguous gradients of a, x and initial_state; an empty one if that is absent."""
    *rest, backend = args
    tensors = _resolved(dh, dlast, h, a, initial_state)
    da, dx, dinitial = _backend.choose("linear_scan", backend, h).backward(*tensors, *rest)
    return [da.contiguous(), dx.contiguous(), a.new_empty(0) if dinitial is None else dinitial.contiguous()]


def _backward_fake(
    dh: Tensor, dlast: Optional[Tensor], h: Tensor, a: Tensor, initial_state: Optional[Tensor], *_: Any
) -> list[Tensor]:
    start = a.new_empty(0) if initial_state is None else a.new_empty(initial_state.shape)
    return [a.new_empty(a.shape), a.new_empty(dh.shape), start]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, _, initial_state, reset, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(output[0], a, initial_state, reset)


def _autograd(ctx: Any, dh: Tensor, dlast: Optional[Tensor]) -> Gradients:
    saved = ctx.saved_tensors  # once: checkpoints hand them out no more than that
    arguments = (dh, dlast, *saved, ctx.reverse)
    if torch.is_grad_enabled():  # create_graph=True: the reference adjoint is itself differentiable
        with no_autocast(dh):
            da, dx, dinitial = reference.adjoint(*arguments)
    else:
        da, dx, dinitial = torch.ops.ssmvision.linear_scan_backward(*arguments, ctx.backend)
    return da, dx, None if saved[2] is None else dinitial, None, None, None


_STATE = "Tensor? initial_state, Tensor? reset, bool reverse, str backend"
register(
    "linear_scan(Tensor a, Tensor x, Tensor? initial_state=None, Tensor? reset=None, bool reverse=False, "
    "str backend='auto') -> (Tensor, Tensor)",
    _composite,
    Kernel(
        f"linear_scan_forward(Tensor a, Tensor x, {_STATE}) -> (Tensor, Tensor)",
        _forward,
        lambda a, x, *_: _allocate(a, x),
    ),
    Kernel(
        f"linear_scan_backward(Tensor dh, Tensor? dlast, Tensor h, Tensor a, {_STATE}) -> Tensor[]",
        _backward,
        _backward_fake,
    ),
    _autograd,
    _setup_context,
)
