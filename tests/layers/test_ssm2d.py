"""The 2-D SSM: golden cases; its recurrence place by place; directions; parameters."""

import math
from pathlib import Path

import pytest
import torch

from ssmvision.engine.verify import verify_case
from ssmvision.layers.ssm2d import SSM2D

PARITY = Path(__file__).parents[1] / "parity"


@pytest.mark.parametrize("case", ["ssm_2dssm", "ssm_2dssm_complex"])
def test_golden_case(case):
    result = verify_case(PARITY / case)
    assert result.ok, str(result)
    assert set(result.worst) == {"output", "feature", "gradient"}


def naive_kernel(layer):
    """After an impulse, place by place; halved where both incoming states are reached by it."""
    A1, A2, A3, A4 = (layer.A[name].sigmoid() for name in ("A_1", "A_2", "A_3", "A_4"))
    nothing, reached = torch.zeros_like(A1), {}
    h, v = {}, {}
    for i in range(layer.side):
        for j in range(layer.side):
            for state, other, came, (C, D), B in (
                (h, v, (i, j - 1), (A1, A2), layer.B_1),
                (v, h, (i - 1, j), (A4, A3), layer.B_2),
            ):
                both = reached.get((id(state), came)) and reached.get((id(other), came))
                f = 0.5 if both else 1.0
                state[i, j] = f * (C * state.get(came, nothing) + D * other.get(came, nothing))
                if (i, j) == (0, 0):
                    state[i, j] = state[i, j] + B.sigmoid()
                reached[id(state), (i, j)] = bool(state[i, j].any())
    kernel = torch.zeros(layer.side, layer.side, len(layer.C_1), dtype=A1.dtype)
    for (i, j), state in h.items():
        times = math.prod(2 for side in (i, j) if side == 0) if (i, j) != (0, 0) else 1
        for c in range(len(layer.C_1)):
            k = c % len(A1)
            y = layer.C_1[c] @ state[k] + layer.C_2[c] @ v[i, j][k]
            kernel[i, j, c] = times * y / math.sqrt(layer.d_state)
    return kernel


def test_kernel_against_loops():
    torch.manual_seed(0)
    layer = SSM2D(4, 6, d_state=3, directions=2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer.kernel(), naive_kernel(layer), rtol=1e-12, atol=1e-12)


def test_images_of_any_size():
    torch.manual_seed(0)
    layer = SSM2D(4, 5, d_state=3, directions=1, use_residual=False, dtype=torch.float64)
    x = torch.randn(1, 4, 7, 3, dtype=torch.float64)
    kernel = layer.kernel()
    wanted = sum(
        kernel[i, j] * x[0, :, 6 - i, 2 - j] for i in range(5) for j in range(3)
    )  # what reaches the last place
    torch.testing.assert_close(layer(x)[0, :, 6, 2], wanted, rtol=1e-9, atol=1e-10)


def test_four_directions_turn_with_the_image():
    torch.manual_seed(0)
    layer = SSM2D(2, 5, d_state=3, directions=4, dtype=torch.float64)
    with torch.no_grad():
        for C in (layer.C_1, layer.C_2):  # all directions alike
            C.copy_(C[:2].repeat(4, 1))
        for group in (*layer.A.values(), layer.B_1, layer.B_2):
            group.copy_(group[:1].expand_as(group))
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x.flip(-1)).flip(-1), layer(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("complex_ssm", [False, True])
def test_every_parameter_learns_and_float32_is_enough(complex_ssm):
    torch.manual_seed(0)
    layer = SSM2D(4, 16, complex_ssm=complex_ssm)
    layer(torch.randn(2, 4, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    with torch.no_grad():
        single, double = layer.kernel(), layer.double().kernel()
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5 * double.abs().max().item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SSM2D(4, 5, directions=3), "directions 3 is not 1, 2 or 4"),
        (lambda: SSM2D(5, 5, n_ssm=2), "5 channels cannot share 2 copies"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
