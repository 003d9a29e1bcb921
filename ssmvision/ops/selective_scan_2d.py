"""`selective_scan_2d`, a recurrence over two axes at once, composed of one `linear_scan` per row.

Letters: b batch, v row (a variate), t column (a time), d channel, n state.
"""

import torch
from torch import Tensor

from ._library import cast, expect, expect_number, expect_real
from .linear_scan import linear_scan


def selective_scan_2d(
    x: Tensor,
    dt1: Tensor,
    dt2: Tensor,
    A1: Tensor,
    A2: Tensor,
    A3: Tensor,
    A4: Tensor,
    B1: Tensor,
    B2: Tensor,
    C1: Tensor,
    C2: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Two-dimensional selective scan (Chimera, arXiv:2406.04320): one state along t and one along v, coupled.

        h1[v, t] = exp(dt1 A1) h1[v, t-1] + dt1 A2 h2[v, t-1] + dt1 B1 x[v, t]
        h2[v, t] = dt2 A3 h1[v-1, t] + exp(dt2 A4) h2[v-1, t] + dt2 B2 x[v, t]
        y[v, t]  = C1 h1[v, t] + C2 h2[v, t]

    with step sizes, B and C of the place (v, t), and zero beyond the border. The paper leaves the discretisation of the
    cross terms open; here they are Euler steps, as B is. Other choices go to `linear_scan_2d`. With A2 = A3 = 0 the
    two states part: h1 scans every row, h2 every column.

    The states of all places are materialised. Rows follow each other in a loop, so that compiling and exporting fix
    their number.

    Args:
        x: Inputs (b, v, t, *channels), with any number of channel dimensions, also none.
        dt1: Step sizes along t, positive, as `x`.
        dt2: Step sizes along v, positive, as `x`.
        A1: Transition of h1 along t, (*channels, n), real; negative for a stable recurrence.
        A2: Transition from h2 to h1, as `A1`.
        A3: Transition from h1 to h2, as `A1`.
        A4: Transition of h2 along v, as `A1`; negative for a stable recurrence.
        B1: Input matrix of h1, shared by all channels: (b, v, t, n).
        B2: Input matrix of h2, as `B1`.
        C1: Output matrix of h1, as `B1`.
        C2: Output matrix of h2, as `B1`.
        backend: "auto", "cpu", "triton" or "reference"; see `ssmvision.ops.backend_info`.

    Returns:
        y in x's shape and dtype; h1 and h2, (b, v, t, *channels, n), in float32 (float64 if x is).

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    given = {"x": x, "dt1": dt1, "dt2": dt2, "A1": A1, "A2": A2, "A3": A3, "A4": A4}
    given |= {"B1": B1, "B2": B2, "C1": C1, "C2": C2}
    expect_real("selective_scan_2d", given)
    if x.dim() < 3 or not A1.dim():
        raise RuntimeError(
            f"selective_scan_2d: x and A1 have shapes {tuple(x.shape)} and {tuple(A1.shape)}, expected "
            "(b, v, t, *channels) and (*channels, n)"
        )
    n = A1.shape[-1]
    for name, tensor in given.items():
        shape = (*x.shape[3:], n) if name[0] == "A" else (*x.shape[:3], n) if name[0] in "BC" else tuple(x.shape)
        expect("selective_scan_2d", name, tensor, shape)
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, dt1, dt2 = (cast(s, real).unsqueeze(-1) for s in (x, dt1, dt2))
    A1, A2, A3, A4 = (cast(s, real) for s in (A1, A2, A3, A4))
    B1, B2, C1, C2 = (cast(s, real).view(*x.shape[:3], *[1] * (x.dim() - 3), n) for s in (B1, B2, C1, C2))
    h1, h2 = linear_scan_2d(
        torch.exp(dt1 * A1), dt1 * A2, dt2 * A3, torch.exp(dt2 * A4), dt1 * B1 * u, dt2 * B2 * u, backend
    )
    return cast((C1 * h1 + C2 * h2).sum(-1), x.dtype), h1, h2


def linear_scan_2d(
    a1: Tensor, a2: Tensor, a3: Tensor, a4: Tensor, x1: Tensor, x2: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The recurrence of `selective_scan_2d` after discretisation, exactly as written, real or complex.

        h1[v, t] = a1 h1[v, t-1] + a2 h2[v, t-1] + x1[v, t]
        h2[v, t] = a3 h1[v-1, t] + a4 h2[v-1, t] + x2[v, t]

    Given the row above, h2 of a row is known everywhere, and then h1 is an ordinary scan along the row. The decays at a
    border, where there is no state to multiply, have no effect.

    Args:
        a1: Decay (b, v, t, *state).
        a2: As `a1`.
        a3: As `a1`.
        a4: As `a1`.
        x1: Inputs of h1, as `a1`.
        x2: Inputs of h2, as `a1`.
        backend: As in `linear_scan`.

    Returns:
        h1 and h2, shaped as `a1`, in float32 or wider, complex if any input is.

    Raises:
        RuntimeError: Shapes that do not fit, naming the tensor and both shapes.
    """
    given = {"x1": x1, "x2": x2, "a1": a1, "a2": a2, "a3": a3, "a4": a4}
    expect_number("linear_scan_2d", given)
    if x1.dim() < 3 or not x1.shape[1]:
        raise RuntimeError(f"linear_scan_2d: x1 has shape {tuple(x1.shape)}, expected (b, v > 0, t, *state)")
    for name, tensor in given.items():
        expect("linear_scan_2d", name, tensor, tuple(x1.shape))
    dtype = torch.float32
    for tensor in given.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    rows1: list[Tensor] = []
    rows2: list[Tensor] = []
    # unbind, not indexing: the backward pass of x[:, v] fills a zero tensor of full size for each of the v rows.
    rows = (cast(tensor, dtype).unbind(1) for tensor in (a1, a2, a3, a4, x1, x2))
    for a1_v, a2_v, a3_v, a4_v, x1_v, x2_v in zip(*rows, strict=True):
        h2 = a3_v * rows1[-1] + a4_v * rows2[-1] + x2_v if rows1 else x2_v
        drive = torch.cat([x1_v[:, :1], a2_v[:, 1:] * h2[:, :-1] + x1_v[:, 1:]], dim=1)
        rows1.append(linear_scan(a1_v, drive, backend=backend)[0])
        rows2.append(h2)
    return torch.stack(rows1, 1), torch.stack(rows2, 1)
