"""Mixers of several directions (LocalMamba and others) against scans of maps that are padded, cut and put back."""

import pytest
import torch
import torch.nn.functional as F

from ssmvision.layers import SS2D, AtrousSS2D, ChannelAttention, GroupedSS2D, LocalMamba, LocalSS2D, MultiScaleSS2D
from ssmvision.layers.s6 import state_matrix
from ssmvision.ops import causal_conv1d, selective_scan

DIRECTIONS = ["h", "h_flip", "v", "v_flip", "w2", "w2_flip", "w3", "w3_flip"]


def randomized(layer):
    """The layer in float64, with every parameter its own."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.requires_grad_(False)


def cut(x, direction):
    """A map (h, w, c) in the order of a direction, with its padding: (t, c)."""
    kind = direction.split("_")[0]
    if kind == "v":
        x = x.transpose(0, 1)
    elif kind != "h":
        k = int(kind[1:])
        x = F.pad(x, (0, 0, 0, -x.shape[1] % k, 0, -x.shape[0] % k))
        x = torch.stack([window for band in x.split(k, 0) for window in band.split(k, 1)])
    x = x.flatten(0, -2)
    return x.flip(0) if direction.endswith("flip") else x


def put_back(y, direction, height, width):
    """The inverse of `cut`: a map (h, w, c) without padding."""
    places = cut(torch.arange(1, height * width + 1).view(height, width, 1), direction).squeeze(1)
    return y[places > 0][places[places > 0].argsort()].view(height, width, -1)


def s6(u, weights, bias, dt_proj, A, D, z=None):
    """A scan of u (t, d) with projections by `weights` (r + 2n, d)."""
    n = A.shape[1]
    delta, b, c = (u @ weights.T).T[None].split([weights.shape[0] - 2 * n, n, n], dim=1)
    z = None if z is None else z.T[None]
    y, _ = selective_scan(u.T[None], delta, A, b, c, D, z, bias, delta_softplus=True, dt_proj=dt_proj)
    return y[0].T


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("grid", [(6, 6), (3, 5), (7, 2)])
def test_local_mamba_is_a_mamba_over_every_order(grid, cls):
    layer = randomized(LocalMamba(4, DIRECTIONS, d_state=3, cls_in_middle=cls))
    patches = grid[0] * grid[1]
    x = torch.randn(1, patches + cls, 4, dtype=torch.float64)
    xz = layer.in_proj(x)[0]
    middle = patches // 2
    token = xz[middle : middle + cls]
    maps = torch.cat([xz[:middle], xz[middle + cls :]]).view(*grid, -1)
    total = 0
    for k, direction in enumerate(DIRECTIONS):
        sequence = cut(maps, direction)
        sequence = torch.cat([sequence[:middle], token, sequence[middle:]])
        u, z = sequence.chunk(2, dim=1)
        u = causal_conv1d(u.T[None], layer.conv_weight[k], layer.conv_bias[k], silu=True)[0].T
        y = s6(
            u, layer.x_proj_weight[k], layer.dt_projs_bias[k], layer.dt_projs_weight[k], state_matrix(layer.A_logs[k]),
            layer.Ds[k], z,
        )  # fmt: skip
        of_token = y[middle : middle + cls]
        y = put_back(torch.cat([y[:middle], y[middle + cls :]]), direction, *grid).flatten(0, 1)
        total = total + layer.attn(torch.cat([y[:middle], of_token, y[middle:]]))
    torch.testing.assert_close(layer(x, list(grid))[0], layer.out_proj(total))


@pytest.mark.parametrize("grid", [(6, 6), (3, 5), (7, 2)])
def test_local_ss2d_is_a_scan_over_every_order(grid):
    layer = randomized(LocalSS2D(4, DIRECTIONS, d_state=3))
    u = torch.randn(1, *grid, 8, dtype=torch.float64)
    A, D, bias, dt_proj = layer.scan_parameters()
    total = 0
    for k, direction in enumerate(DIRECTIONS):
        y = s6(cut(u[0], direction), layer.x_proj_weight[k], bias[k], dt_proj[k], A[k], D[k])
        total = total + layer.attn(put_back(y, direction, *grid).flatten(0, 1))
    torch.testing.assert_close(layer.scan(u)[0].flatten(0, 1), total)


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (4, 7), (1, 1)])
def test_atrous_ss2d_scans_every_subgrid_once(grid):
    layer = randomized(AtrousSS2D(4, d_state=3))
    u = torch.randn(1, *grid, 8, dtype=torch.float64)
    padded = F.pad(u[0], (0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
    wanted = torch.zeros_like(padded)
    A, D, bias, dt_proj = layer.scan_parameters()
    for k, (top, left) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        part = padded[top::2, left::2]
        direction = "v" if top else "h"
        y = s6(cut(part, direction), layer.x_proj_weight[k], bias[k], dt_proj[k], A[k], D[k])
        wanted[top::2, left::2] = put_back(y, direction, *part.shape[:2])
    torch.testing.assert_close(layer.scan(u)[0], wanted[: grid[0], : grid[1]])


@pytest.mark.parametrize("grid", [(6, 6), (3, 5), (7, 2)])
def test_multi_scale_ss2d_scans_three_orders_at_half_resolution_as_one(grid):
    layer = randomized(MultiScaleSS2D(8, d_state=3))
    x = torch.randn(1, *grid, 8, dtype=torch.float64)
    u, z = layer.in_proj(x)[0].chunk(2, dim=-1)
    A, Ds = state_matrix(layer.A_logs).view(2, 16, 3), layer.Ds.view(2, 16)

    def scan(conv, parameters, directions):
        maps = F.silu(conv(u.permute(2, 0, 1)[None]))[0].permute(1, 2, 0)
        of_scan = (layer.x_proj_weight, layer.dt_projs_bias, layer.dt_projs_weight, A, Ds)
        y = s6(torch.cat([cut(maps, direction) for direction in directions]), *(p[parameters] for p in of_scan))
        parts = layer.out_norm(y).chunk(len(directions))
        return sum(put_back(part, to, *maps.shape[:2]) for part, to in zip(parts, directions, strict=True))

    coarse = scan(layer.conv2d_b1, 0, ["h_flip", "v", "v_flip"]).permute(2, 0, 1)[None]
    y = scan(layer.conv2d, 1, ["h"]) + F.interpolate(coarse, size=grid, mode="bilinear")[0].permute(1, 2, 0)
    squeezed = F.relu(y.mean((0, 1)) @ layer.se.fc1.weight.flatten(1).T)
    y = y * torch.sigmoid(squeezed @ layer.se.fc2.weight.flatten(1).T) * F.silu(z)
    torch.testing.assert_close(layer(x), layer.out_proj(y)[None])


def test_grouped_ss2d_is_four_gated_mixers_of_one_direction():
    """Each group against SS2D whose other three routes are silent."""
    layer = randomized(GroupedSS2D(16))
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    for k in range(4):
        single = SS2D(4, d_state=1, ssm_ratio=1, gate=True, conv_bias=True).double().requires_grad_(False)
        part = slice(4 * k, 4 * k + 4)
        for ours, theirs in (
            (single.x_proj_weight, layer.x_proj_weight), (single.dt_projs_weight, layer.dt_projs_weight),
            (single.dt_projs_bias, layer.dt_projs_bias), (single.A_logs.view(4, 4, 1), layer.A_logs),
            (single.Ds.view(4, 4), layer.Ds),
        ):  # fmt: skip
            ours.zero_()[k] = theirs[k]
        single.x_proj_weight[[i for i in range(4) if i != k]] = 0
        single.in_proj.weight.copy_(layer.in_proj_weight[k])
        single.conv2d.weight.copy_(layer.conv2d.weight[part])
        single.conv2d.bias.copy_(layer.conv2d.bias[part])
        single.out_norm.weight.copy_(layer.out_norm_weight[k])
        single.out_norm.bias.copy_(layer.out_norm_bias[k])
        single.out_proj.weight.copy_(layer.out_proj_weight[k])
        torch.testing.assert_close(layer(x)[..., part], single(x[..., part]))


def test_channel_attention_gates_each_sequence_by_its_own_mean():
    layer = randomized(ChannelAttention(16))
    x = torch.randn(2, 3, 7, 16, dtype=torch.float64)
    hidden = F.gelu(layer.global_reduce(layer.norm(x[1, 2]).mean(0)))
    torch.testing.assert_close(layer(x)[1, 2], x[1, 2] * torch.sigmoid(layer.channel_select(hidden)))


def test_local_mamba_trains_and_resets():
    layer = LocalMamba(8, ("h", "w2_flip"), cls_in_middle=True)
    x = torch.randn(2, 16, 8, requires_grad=True)
    layer(x, [3, 5]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [x, *layer.parameters()])
    own = [p for _, p in layer.named_parameters(recurse=False)]
    for parameter in own:
        torch.nn.init.constant_(parameter, torch.nan)
    layer.reset_parameters()
    assert all(p.isfinite().all() for p in own)


@pytest.mark.parametrize("direction", ["x", "w", "w0", "h_flip_flip", "flip", ""])
def test_a_direction_that_is_none_is_named(direction):
    with pytest.raises(ValueError, match=f"not {direction!r}"):
        LocalMamba(8, ("h", direction))


def test_channels_that_do_not_divide_into_groups_are_named():
    with pytest.raises(ValueError, match="18 channels do not divide into 4 groups"):
        GroupedSS2D(18)
