"""Chimera as a layer: its recurrence pixel by pixel, its one-dimensional special cases, gradients and bounds."""

import pytest
import torch
import torch.nn.functional as F

from ssmvision.layers import Chimera
from ssmvision.ops import selective_scan, selective_scan_2d


def make(dim=4, couple=1.0, **options):
    """A layer in float64 with parameters that are nowhere zero or one."""
    torch.manual_seed(0)
    layer = Chimera(dim, **{"d_state": 2, "ssm_ratio": 1.5, "dt_rank": 2, "dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        layer.couplings.copy_(couple * torch.randn_like(layer.couplings))
    return layer


def loops(layer, u):
    """The equations of the docstring, corner by corner and pixel by pixel."""
    b, height, width, d = u.shape
    A, D, dt_bias, dt_proj = layer.scan_parameters()
    nothing = u.new_zeros(b, d, layer.d_state)
    y = torch.zeros_like(u)
    corners = [(1, 1), (-1, 1), (1, -1), (-1, -1)] if layer.directions == 4 else [(1, 1), (-1, -1)][: layer.directions]
    for corner, (down, right) in enumerate(corners):
        K = torch.tanh(layer.couplings)
        h1, h2 = {}, {}
        for i in range(height)[::down]:
            for j in range(width)[::right]:
                pixel, system = u[:, i, j], []
                for k in (2 * corner, 2 * corner + 1):
                    low, B, C = (pixel @ layer.x_proj_weight[k].T).split([layer.dt_rank, *[layer.d_state] * 2], -1)
                    dt = F.softplus(low @ dt_proj[k].T + dt_bias[k])[..., None]
                    a = torch.exp(dt * A[k])
                    system.append((a, (1 - a) * K[k], dt * B[:, None] * pixel[..., None], C))
                (a1, a2, x1, C1), (a4, a3, x2, C2) = system
                left, above = (i, j - right), (i - down, j)
                h1[i, j] = a1 * h1.get(left, nothing) + a2 * h2.get(left, nothing) + x1
                h2[i, j] = a3 * h1.get(above, nothing) + a4 * h2.get(above, nothing) + x2
                y[:, i, j] += (h1[i, j] @ C1[..., None] + h2[i, j] @ C2[..., None])[..., 0]
                y[:, i, j] += (D[2 * corner] + D[2 * corner + 1]) * pixel
    return y


@pytest.mark.parametrize("size", [(3, 4), (1, 5), (6, 1)], ids=str)
@pytest.mark.parametrize("directions", [1, 2, 4])
def test_scan_against_loops(directions, size):
    layer = make(directions=directions)
    u = torch.randn(2, *size, layer.d_inner, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer.scan(u), loops(layer, u), rtol=1e-11, atol=1e-11)


def test_the_whole_layer_against_loops():
    layer = make(gate=True, conv_bias=True)
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        u, z = layer.in_proj(x).chunk(2, -1)
        u = F.silu(layer.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        wanted = layer.out_proj(layer.out_norm(loops(layer, u)) * F.silu(z))
        torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def test_without_couplings_rows_and_columns_are_selective_scans():
    layer = make(couple=0.0, directions=1)
    u = torch.randn(2, 4, 5, layer.d_inner, dtype=torch.float64)
    A, D, dt_bias, dt_proj = layer.scan_parameters()
    wanted = 0
    for k, axis in ((0, 2), (1, 1)):  # h1 along the columns of each row, h2 along the rows of each column
        lines = u.movedim(axis, 2)
        tokens = lines.flatten(0, 1).transpose(1, 2)
        delta, B, C = (layer.x_proj_weight[k] @ tokens).split([layer.dt_rank, layer.d_state, layer.d_state], dim=1)
        y, _ = selective_scan(
            tokens, delta, A[k], B, C, D=D[k], delta_bias=dt_bias[k], delta_softplus=True, dt_proj=dt_proj[k]
        )
        wanted = wanted + y.transpose(1, 2).reshape(lines.shape).movedim(2, axis)
    with torch.no_grad():
        torch.testing.assert_close(layer.scan(u), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("silent", [0, 1])
def test_one_coupling_alone_turns_one_corner(silent):
    """An impulse enters the state that reads no other; the other state carries it across."""
    layer = make(directions=1)
    with torch.no_grad():
        layer.couplings[silent] = 0
        u = torch.randn(1, 5, 5, layer.d_inner, dtype=torch.float64)
        delta, B, C = layer.coefficients(u)
        B[..., 1 - silent, :] = 0
        impulse = torch.zeros_like(u)
        impulse[0, 1, 1] = 1
        assert (layer.recurrence(impulse, delta, B, C)[0, 2:, 2:].abs() > 0).all()
        C[..., 1 - silent, :] = 0
        assert not layer.recurrence(impulse, delta, B, C)[0, 2:, 2:].any()


def test_a_new_layer_reads_rows_and_columns_and_a_coupled_one_the_whole_map():
    u = torch.randn(1, 5, 5, 6, dtype=torch.float64, requires_grad=True)
    for couple, everything in ((0.0, False), (1.0, True)):
        (gradient,) = torch.autograd.grad(make(couple=couple).scan(u)[0, 2, 2].sum(), u)
        reached = gradient[0].abs().sum(-1) > 0
        assert reached[2].all()
        assert reached[:, 2].all()
        assert bool(reached.all()) == everything


def test_four_corners_turn_with_the_map():
    layer = make()
    with torch.no_grad():
        for parameter in (layer.x_proj_weight, layer.dt_projs_weight, layer.dt_projs_bias, layer.couplings):
            parameter.copy_(parameter[:2].repeat(4, *[1] * (parameter.dim() - 1)))  # all corners alike
        for parameter in (layer.A_logs, layer.Ds):
            parameter.copy_(parameter[: 2 * layer.d_inner].repeat(4, *[1] * (parameter.dim() - 1)))
    u = torch.randn(1, 3, 4, layer.d_inner, dtype=torch.float64)
    for axes in ((1,), (2,), (1, 2)):
        torch.testing.assert_close(layer.scan(u.flip(axes)).flip(axes), layer.scan(u), rtol=1e-10, atol=1e-10)


def test_gradients():
    layer = make(2, directions=2, d_state=1, ssm_ratio=1.0, dt_rank=1)
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *parameters))


def test_every_parameter_learns_from_the_start():
    torch.manual_seed(0)
    layer = Chimera(8, d_state=2, gate=True)
    layer(torch.randn(2, 5, 7, 8)).square().sum().backward()
    assert not [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()]


def test_no_parameters_make_it_grow():
    """With Euler steps in the cross terms, the same system grows beyond all bounds."""
    layer = make(couple=20.0, directions=1)
    with torch.no_grad():
        layer.dt_projs_bias.fill_(3.0)
        impulse = torch.zeros(1, 24, 24, layer.d_inner, dtype=torch.float64)
        impulse[0, 0, 0] = 1
        delta, B, C = layer.coefficients(impulse)
        B, C = torch.ones_like(B), torch.ones_like(C)
        y = layer.recurrence(impulse, delta, B, C).abs()
        A1, A4 = layer.scan_parameters()[0]
        A2, A3 = (-A * K for A, K in zip((A1, A4), layer.couplings.tanh(), strict=True))
        steps, coefficients = delta.unbind(3), (*B.unbind(3), *C.unbind(3))
        euler, *_ = selective_scan_2d(impulse, *steps, A1, A2, A3, A4, *coefficients)
    assert y.max() == y[0, 0, 0].max()
    assert euler.abs().max() > 1e6 * y.max()


def test_slices_of_volumes_are_scanned_alone():
    layer = make()
    x = torch.randn(2, 3, 4, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.stack([layer(s) for s in x.unbind(1)], 1))


def test_half_precision():
    torch.manual_seed(0)
    layer, x = Chimera(8), torch.randn(1, 6, 6, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), layer(x), rtol=0.1, atol=0.05)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="directions must be 1, 2 or 4, not 3"):
        Chimera(4, directions=3)
    with pytest.raises(ValueError, match=r"Chimera: x has shape \(3, 4, 4\), expected"):
        Chimera(4)(torch.zeros(3, 4, 4))
