"""`ssd_scan`, the operator of Mamba-2: its public functions and its registration with torch.

The composite op `ssmvision::ssd_scan` does in plain torch what is elementwise: step sizes, skip connection and gate.
`ssmvision::ssd_scan_forward` / `_backward` call a backend for the recurrence.

Letters: b batch, h head, p head channel, n state, g group of heads, l token.
"""

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _backend
from ._library import (
    CHUNK,
    Gradients,
    Kernel,
    cast,
    cast_token,
    expect,
    expect_real,
    expect_reset,
    no_autocast,
    register,
    settle,
)  # fmt: skip
from .reference import ssd_scan as reference


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Optional[Tensor] = None,
    reset: Optional[Tensor] = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scan of a selective state space model with one decay per head (SSD; Mamba-2, arXiv:2405.21060, section 2.1).

        dt_t = clamp(softplus(dt_t + dt_bias), *dt_limit)
        s_t  = exp(dt_t A) s_{t-1} + dt_t x_t B_t^T        (a matrix (p, n) per head)
        y_t  = s_t C_t + D x_t

    and y * silu(z) if z is given. It is `selective_scan` with one A for all channels and states of a head, in the
    layout of attention: tokens before heads. Head i reads group i // (h / g) of B and C.

    Args:
        x: Tokens (b, l, h, p).
        dt: Step sizes (b, l, h).
        A: (h,), real; negative for a stable recurrence.
        B: Input matrix (b, l, g, n).
        C: Output matrix (b, l, g, n).
        D: Skip connection, (h,) or (h, p).
        z: Gate (b, l, h, p).
        dt_bias: (h,).
        dt_softplus: Apply softplus to dt + dt_bias.
        dt_limit: Smallest and largest step size, clamped after softplus.
        initial_state: (b, h, p, n); zero if None.
        reset: Boolean (b, l): where True, the state is zeroed just before that token is read (start of a packed
            sequence; see `resets_from_seq_idx`).
        backend: "auto", "cpu", "triton" or "reference"; see `ssmvision.ops.backend_info`.

    Returns:
        y (b, l, h, p) in x's dtype; and the state after the last token, (b, h, p, n), in float32 (float64 if x is).
        The recurrence runs in float32 whatever the input, also under autocast.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
        ValueError: A backend that does not exist or cannot run these tensors.
    """
    if not torch.jit.is_scripting():
        found = _backend.shortcut(
            "ssd_scan", _composite, None, backend,
            x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit[0], dt_limit[1], initial_state, reset,
        )  # fmt: skip
        if found is not None:
            return found
    return torch.ops.ssmvision.ssd_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit[0], dt_limit[1], initial_state, reset, backend
    )


def ssd_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """One step of `ssd_scan`, for streams: in plain torch, differentiable; nothing is changed in place.

    Args:
        x: One token (b, h, p).
        dt: Its step sizes (b, h).
        A: (h,).
        B: (b, g, n).
        C: (b, g, n).
        state: (b, h, p, n): zeros, or what the scan or the step before returned.
        D: (h,) or (h, p).
        z: Gate (b, h, p).
        dt_bias: (h,).
        dt_softplus: As for `ssd_scan`.
        dt_limit: As for `ssd_scan`.

    Returns:
        y (b, h, p) in x's dtype; and the next state, in float32 (float64 if x is).

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    floats = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "state": state, "D": D, "z": z, "dt_bias": dt_bias}
    expect_real("ssd_scan_step", floats)
    (b, h, p), g, n = x.shape, B.shape[-2], B.shape[-1]
    _check("ssd_scan_step", (b,), h, p, g, n, floats)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = _step_size(cast(dt, dtype), cast(dt_bias, dtype), dt_softplus, dt_limit[0], dt_limit[1])
    B_h, C_h = (cast(m, dtype).repeat_interleave(h // g, dim=1).unsqueeze(2) for m in (B, C))  # (b, h, 1, n)
    drive = (step.unsqueeze(-1) * cast(x, dtype)).unsqueeze(-1)
    state = torch.exp(step * cast(A, dtype))[..., None, None] * cast(state, dtype) + drive * B_h
    y = _skip_and_gate((state * C_h).sum(-1), cast(x, dtype), cast(D, dtype), cast(z, dtype))
    return cast(y, x.dtype), state


def resets_from_seq_idx(seq_idx: Tensor) -> Tensor:
    """Where packed sequences start, as `reset` of a scan wants it.

    Args:
        seq_idx: (b, l), any integers: the sequence that each token belongs to.

    Returns:
        Boolean (b, l): True where a token's sequence is not that of the token before. The first token is no start, so
        that an initial state reaches it.
    """
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))


def _composite(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], z: Optional[Tensor],
    dt_bias: Optional[Tensor], dt_softplus: bool, dt_min: float, dt_max: float, initial_state: Optional[Tensor],
    reset: Optional[Tensor], backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Everything elementwise, and the recurrence between."""
    floats = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z}
    floats |= {"dt_bias": dt_bias, "initial_state": initial_state}
    expect_real("ssd_scan", floats)
    (b, length, h, p), (g, n) = x.shape, B.shape[2:]
    _check("ssd_scan", (b, length), h, p, g, n, floats)
    expect_reset("ssd_scan", reset, (b, length))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    step = _step_size(cast(dt, dtype), cast(dt_bias, dtype), dt_softplus, dt_min, dt_max)
    y, last, _ = _backend.run(
        "ssd_scan", cast_token(x, dtype), step, cast(A, dtype), cast_token(B, dtype), cast_token(C, dtype),
        cast(initial_state, dtype), reset, backend,
    )  # fmt: skip
    return cast(_skip_and_gate(y, x, cast(D, dtype), cast(z, dtype)), x.dtype), last


def _step_size(dt: Tensor, bias: Optional[Tensor], softplus: bool, smallest: float, largest: float) -> Tensor:
    step = dt if bias is None else dt + bias
    if softplus:
        step = F.softplus(step)
        if smallest <= 0.0 and largest == math.inf:
            return step  # clamping would change nothing
    return step.clamp(smallest, largest)


def _skip_and_gate(y: Tensor, x: Tensor, D: Optional[Tensor], z: Optional[Tensor]) -> Tensor:
    if D is not None:
        y = y + (D if D.dim() == 2 else D.unsqueeze(-1)) * x
    return y if z is None else y * F.silu(z)


def _check(
    operator: str, lead: tuple[int, ...], h: int, p: int, g: int, n: int, tensors: dict[str, Optional[Tensor]]
) -> None:
    """`lead` is (b, l) for a scan, (b,) for one step."""
    D = tensors["D"]
    shapes: dict[str, tuple[int, ...]] = {
        "x": (*lead, h, p), "dt": (*lead, h), "A": (h,), "B": (*lead, g, n), "C": (*lead, g, n),
        "D": (h,) if D is not None and D.dim() == 1 else (h, p), "z": (*lead, h, p), "dt_bias": (h,),
        "initial_state": (lead[0], h, p, n), "state": (lead[0], h, p, n),
    }  # fmt: skip
    for name, shape in shapes.items():
        m = tensors.get(name)
        if m is not None:
            expect(operator, name, m, shape)
    if h % g:
        raise RuntimeError(f"{operator}: the groups of B and C ({g}) must divide {h} heads")


def _allocate(x: Tensor, step: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialized y, last state and checkpoints. Backends and fake tensors share these layouts."""
    (b, length, h, p), n = x.shape, B.shape[-1]
    last = step.new_empty(b, h, n, p).transpose(-1, -2)
    return step.new_empty(b, length, h, p), last, step.new_empty(b, h, (length + CHUNK - 1) // CHUNK, n, p)


def _forward(x: Tensor, step: Tensor, A: Tensor, B: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = args
    out = _allocate(x, step, B)
    _backend.choose("ssd_scan", backend, x).forward(x, step, A, B, *rest, out=out)
    return out


def _allocate_grads(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Optional[Tensor]
) -> list[Tensor]:
    """Uninitialized gradients, row-major but for the state; empty where there is no initial state."""
    grads = [m.new_empty(m.shape) for m in (x, step, A, B, C)]
    if initial_state is None:
        return [*grads, step.new_empty(0)]
    b, h, p, n = initial_state.shape
    return [*grads, step.new_empty(b, h, n, p).transpose(-1, -2)]


def _backward(dy: Tensor, dlast: Optional[Tensor], checkpoints: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
    *rest, backend = args
    found = _backend.choose("ssd_scan", backend, x).backward(dy, dlast, checkpoints, x, *rest)
    return settle(_allocate_grads(x, *rest[:5]), found)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(output[2], *tensors)


def _autograd(ctx: Any, dy: Tensor, dlast: Optional[Tensor], _: Optional[Tensor]) -> Gradients:
    saved: Any = ctx.saved_tensors
    checkpoints, tensors = saved[0], saved[1:]
    if torch.is_grad_enabled():  # create_graph=True: the reference adjoint is itself differentiable
        with no_autocast(dy):
            grads = reference.adjoint(dy, dlast, *tensors)
    else:
        found = torch.ops.ssmvision.ssd_scan_backward(dy, dlast, checkpoints, *tensors, ctx.backend)
        grads = tuple(None if x is None else g for x, g in zip(tensors[:6], found, strict=True))
    return (*grads, None, None)


_TENSORS = "Tensor x, Tensor step, Tensor A, Tensor B, Tensor C, Tensor? initial_state, Tensor? reset, str backend"
register(
    # Without defaults: a schema cannot say infinity, and the public function passes everything.
    "ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "bool dt_softplus, float dt_min, float dt_max, Tensor? initial_state, Tensor? reset, str backend) "
    "-> (Tensor, Tensor)",
    _composite,
    Kernel(
        f"ssd_scan_forward({_TENSORS}) -> (Tensor, Tensor, Tensor)",
        _forward,
        lambda x, step, A, B, *_: _allocate(x, step, B),
    ),
    Kernel(
        f"ssd_scan_backward(Tensor dy, Tensor? dlast, Tensor checkpoints, {_TENSORS}) -> Tensor[]",
        _backward,
        lambda dy, dlast, checkpoints, *args: _allocate_grads(*args[:6]),
    ),
    _autograd,
    _setup_context,
)
