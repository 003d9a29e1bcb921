"""docs/one_framework.md as tests: where attention, state space models and recurrent networks are one, and where not.

Every operator and layer is y = M v with a matrix M that depends on the input; M is written out, in float64.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed

from ssmvision.engine.inspection.mixing import mixing_matrix, toeplitz
from ssmvision.engine.inspection.scans import watch_scans
from ssmvision.layers import (
    S5,
    SS2D,
    BiMamba,
    Chimera,
    Hydra,
    Mamba,
    Mamba2,
    MambaLikeLinearAttention,
    NonCausalSSD,
    S4DKernel,
    ScalarSS2D,
    hydra,
    mamba2,
)
from ssmvision.layers.mamba3 import trapezoidal_scan
from ssmvision.layers.pos_embed import rotary_table
from ssmvision.ops import fft_conv, linear_scan, routes, selective_scan, ssd_scan

L, H, P, N = 24, 2, 3, 4  # tokens, heads, channels of a head, states


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch):
    monkeypatch.setenv("SSMVISION_BACKEND", "reference")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def decay_mask(log_a):
    """The 1-semiseparable matrix a_i a_{i-1} ... a_{j+1} below the diagonal, 1 on it: (..., l) → (..., l, l)."""
    total = log_a.cumsum(-1)
    return (total[..., :, None] - total[..., None, :]).exp().tril()


def masked_attention(x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=None, **rest):
    """`ssd_scan` without a scan: (mask * C B^T) (dt x) in every head; returns no state."""
    assert rest.keys() <= {"reset", "initial_state"}
    assert not any(value is not None for value in rest.values())
    dt = dt if dt_bias is None else dt + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    dt = dt if dt_limit is None else dt.clamp(*dt_limit)
    B, C = (m.repeat_interleave(x.shape[2] // m.shape[2], 2) for m in (B, C))
    M = decay_mask((dt * A).transpose(1, 2)) * torch.einsum("bihn,bjhn->bhij", C, B)
    y = torch.einsum("bhij,bjhp->bihp", M, dt[..., None] * x)
    y = y if D is None else y + D.view(*D.shape, *[1] * (2 - D.dim())) * x
    return (y if z is None else y * F.silu(z)), None


def heads(groups=1):
    """x, dt, A, B and C of `ssd_scan`."""
    x, dt = torch.randn(2, L, H, P), torch.rand(2, L, H)
    B, C = torch.randn(2, L, groups, N), torch.randn(2, L, groups, N)
    return x, dt, -torch.rand(H) - 0.1, B, C


def rank(matrix, relative=1e-9):
    values = torch.linalg.svdvals(matrix)
    return int((values > relative * values[0]).sum())


def off_diagonal_rank(M, upper=False):
    """Of the block by which the second half of the tokens reads the first (or the first the second)."""
    half = M.shape[-1] // 2
    return rank(M[:half, half:] if upper else M[half:, :half])


@pytest.mark.parametrize("groups", [1, 2])
def test_ssd_is_masked_attention(groups):
    inputs = [t.requires_grad_() for t in heads(groups)]
    found, wanted = ssd_scan(*inputs)[0], masked_attention(*inputs)[0]
    close(found, wanted)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs)


def test_without_decay_ssd_is_causal_linear_attention():
    """With the features elu + 1, and with the normalizer, which is the same scan of the value 1."""
    q, k, v = F.elu(torch.randn(2, L, 1, N)) + 1, F.elu(torch.randn(2, L, 1, N)) + 1, torch.randn(2, L, 1, P)
    A, dt = torch.zeros(1), torch.ones(2, L, 1)
    weights = torch.einsum("bihn,bjhn->bhij", q, k).tril()
    close(ssd_scan(v, dt, A, k, q)[0], torch.einsum("bhij,bjhp->bihp", weights, v))
    with_one = ssd_scan(torch.cat([v, torch.ones(2, L, 1, 1)], -1), dt, A, k, q)[0]
    normalized = weights / weights.sum(-1, keepdim=True)
    close(with_one[..., :P] / with_one[..., P:], torch.einsum("bhij,bjhp->bihp", normalized, v))


@pytest.mark.parametrize("options", [{}, {"ngroups": 2}, {"rmsnorm": False, "D_has_hdim": True}], ids=str)
def test_mamba2_runs_as_masked_attention(options, monkeypatch):
    layer, x = Mamba2(8, d_state=N, headdim=4, **options), torch.randn(2, L, 8)
    scanned = layer(x)
    monkeypatch.setattr(mamba2, "ssd_scan", masked_attention)
    close(layer(x), scanned)


def test_s6_with_one_decay_per_head_is_ssd_and_gated_linear_attention():
    x, dt, A, B, C = heads()
    u, delta = x.flatten(2).transpose(1, 2), dt.repeat_interleave(P, 2).transpose(1, 2)
    A_S6 = A.repeat_interleave(P)[:, None].expand(-1, N)
    found, _ = selective_scan(u, delta, A_S6, B[:, :, 0].transpose(1, 2), C[:, :, 0].transpose(1, 2))
    found = found.transpose(1, 2).unflatten(2, (H, P))
    close(found, ssd_scan(x, dt, A, B, C)[0])
    state, wanted = torch.zeros(2, H, N, P), []
    for t in range(L):  # gated linear attention: S = a S + k v^T, y = q S
        gate, k, v = torch.exp(dt[:, t] * A)[..., None, None], B[:, t, :, :, None], (dt[..., None] * x)[:, t, :, None]
        state = gate * state + k * v
        wanted.append((C[:, t, :, None] @ state)[:, :, 0])
    close(found, torch.stack(wanted, 1))


def test_s6_with_one_step_for_all_channels_is_attention_with_a_gate_per_state():
    """Gates may differ between states (dimensions of the keys) if they are the same for all channels."""
    u, step, A = torch.randn(2, P, L), torch.rand(2, 1, L), -torch.rand(1, N) - 0.1
    B, C = torch.randn(2, N, L), torch.randn(2, N, L)
    found, _ = selective_scan(u, step.expand(-1, P, -1), A.expand(P, -1), B, C)
    masks = decay_mask(step * A.T)  # (b, n, l, l)
    M = torch.einsum("bni,bnij,bnj->bij", C, masks, B)
    close(found, torch.einsum("bij,bdj->bdi", M, step * u))


def test_scalar_ss2d_is_ssd_along_every_route():
    layer, u = ScalarSS2D(8, d_state=N, dt_rank=2), torch.randn(1, 3, 4, 16)
    tokens, wanted = u.flatten(1, 2), 0
    for k, route in enumerate(routes.cross(3, 4)):
        visited = tokens[:, route]
        dt, B, C = (visited @ layer.x_proj_weight[k].T).split([2, N, N], -1)
        y, _ = ssd_scan(
            visited.unflatten(2, (2, 8)), dt, -layer.A_logs[k].exp(), B[:, :, None], C[:, :, None], D=layer.Ds[k],
            dt_bias=layer.dt_projs_bias[k], dt_softplus=True,
        )  # fmt: skip
        wanted = wanted + y.flatten(2)[:, routes.inverse(route[None])[0]]
    close(layer.scan(u).flatten(1, 2), wanted)


def test_s6_is_s5_with_a_selective_diagonal():
    """S5's operator with a decay that depends on the token, states (d, n), B and C of one block per channel."""
    u, delta, A = torch.randn(2, P, L), torch.rand(2, P, L), -torch.rand(P, N) - 0.1
    B, C = torch.randn(2, N, L), torch.randn(2, N, L)
    step = delta.transpose(1, 2)[..., None]
    x, _ = linear_scan(torch.exp(step * A), step * u.transpose(1, 2)[..., None] * B.transpose(1, 2)[:, :, None])
    y = (x * C.transpose(1, 2)[:, :, None]).sum(-1).transpose(1, 2)
    close(y, selective_scan(u, delta, A, B, C)[0])


def test_s5_is_a_sum_of_s6_without_selection():
    """A state shared by all channels: output o reads, with C[o], what every input channel put into a copy of it."""
    layer, x = S5(3, d_state=8), torch.randn(2, L, 3)
    Lambda_bar, B_bar = layer.discrete()
    C, u = torch.view_as_complex(layer.C), x.transpose(1, 2)
    outputs = []
    for o in range(3):
        y, _ = selective_scan(
            u, torch.ones_like(u), Lambda_bar.log().expand(3, -1).contiguous(), B_bar.T.contiguous(),
            C[o].expand(3, -1).contiguous(),
        )  # fmt: skip
        outputs.append(y.sum(1))
    close(torch.stack(outputs, 2) + layer.D * x, layer(x))


def test_vssd_is_linear_attention_that_weighs_its_keys():
    """Written out as M = |A| C (delta B)^T: every token reads every other, and there is no order."""
    layer, x = NonCausalSSD(6, 3, d_state=N), torch.randn(2, 3, 4, 6)
    z, xbc, dt = layer.in_proj(x).split([12, 12 + 2 * N, 3], -1)
    u, B, C = (
        F.silu(layer.conv2d(xbc.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2).split([12, N, N], -1)
    )  # (b, l, ...)
    keys = F.softplus(dt.flatten(1, 2) + layer.dt_bias)[..., None] * B[:, :, None]  # (b, l, h, n)
    M = torch.einsum("h,bin,bjhn->bhij", layer.A_log.exp(), C, keys)
    assert rank(M[0, 0]) == N
    values = u.unflatten(2, (3, 4))
    y = torch.einsum("bhij,bjhp->bihp", M, values) + values * layer.D[:, None]
    close(layer(x), layer.out_proj(layer.norm(y.flatten(2)).view(2, 3, 4, 12) * z))


def test_two_scans_without_decay_are_attention_without_a_mask():
    x, dt, A, B, C = heads()
    forward = ssd_scan(x, dt, 0 * A, B, C)[0]
    backward = ssd_scan(x.flip(1), dt.flip(1), 0 * A, B.flip(1), C.flip(1))[0].flip(1)
    own = (B * C).sum(-1, keepdim=True) * dt[..., None] * x  # both have read the token itself
    close(forward + backward - own, torch.einsum("bign,bjgn,bjhp->bihp", C, B, dt[..., None] * x))


def test_mlla_is_the_same_with_a_normalizer():
    layer, x = MambaLikeLinearAttention(8, 2), torch.randn(1, 3, 4, 8)
    v = F.silu(layer.dwc(layer.in_proj(x).permute(0, 3, 1, 2)))
    q, k = (F.elu(layer.qk(v.permute(0, 2, 3, 1))) + 1).chunk(2, -1)
    sin, cos = rotary_table(x).unbind(0)
    q, k, rotated_q, rotated_k = (
        t.reshape(12, 2, 4) for t in (q, k, *(apply_rot_embed(t.unsqueeze(3), sin, cos) for t in (q, k)))
    )  # (l, h, ·)
    M = torch.einsum("ihc,jhc->hij", rotated_q, rotated_k) / 12
    M = M / (torch.einsum("ihc,hc->hi", q, k.mean(0)) + 1e-6)[..., None]
    values = v.flatten(2)[0].T.unflatten(1, (2, 4))
    y = torch.einsum("hij,jhc->ihc", M, values).flatten(1).view(1, 3, 4, 8) + layer.lepe(v).permute(0, 2, 3, 1)
    close(layer(x), layer.out_proj(y * F.silu(layer.act_proj(x))))


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_s4d_is_a_convolution_a_toeplitz_matrix_and_s6_with_constant_coefficients(disc):
    kernel, u = S4DKernel(P, d_state=8, disc=disc), torch.randn(2, P, L)
    k = kernel(L)[0][0]
    y = fft_conv(u, k)
    close(torch.einsum("dij,bdj->bdi", toeplitz(k), u), y)
    dt_A, B, C = kernel._system(1.0)
    A_bar, B_bar = kernel._discrete(dt_A, B, 1.0)
    close(selective_scan(u, torch.ones_like(u), A_bar.log(), B_bar, C[0])[0], y)


def test_a_gated_recurrent_unit_without_its_nonlinearity_is_s6_with_one_state():
    """h = f h + (1 - f) u, the gates as of the token alone."""
    u, f = torch.randn(2, P, L), torch.rand(2, P, L)
    h, wanted = torch.zeros(2, P), []
    for t in range(L):
        h = f[..., t] * h + (1 - f[..., t]) * u[..., t]
        wanted.append(h)
    delta, one = -f.log(), torch.ones(2, 1, L)
    found, _ = selective_scan(u * (1 - f) / delta, delta, -torch.ones(P, 1), one, one)
    close(found, torch.stack(wanted, -1))


def test_hydra_is_a_lower_and_an_upper_semiseparable_matrix_and_a_diagonal(monkeypatch):
    layer, x = Hydra(8, d_state=N, headdim=4), torch.randn(1, L, 8)
    scanned = layer(x)
    monkeypatch.setattr(hydra, "ssd_scan", masked_attention)
    close(layer(x), scanned)


def test_mamba3_without_rotation_and_trapezoids_is_ssd():
    x, dt, A, B, C = heads()
    end = torch.full((2, L, H), 50.0)  # all weight at the end of each step
    still, zero = torch.zeros(2, L, H, N // 2), torch.zeros(H, N)
    found, _ = trapezoidal_scan(C, B, x, dt, dt * A, end, still, zero, zero)
    close(found, ssd_scan(x, dt, A, B, C)[0])


def mamba_matrix():
    return mixing_matrix(watch_scans(Mamba(8, d_state=N), torch.randn(1, L, 8))[0])[0]


def mamba2_matrix():
    return mixing_matrix(watch_scans(Mamba2(8, d_state=N, headdim=4), torch.randn(1, L, 8))[0])[0]


def bimamba_matrix():
    return mixing_matrix(watch_scans(BiMamba(8, d_state=N), torch.randn(1, L, 8))[0])[0]


def s4d_matrix():
    return toeplitz(S4DKernel(1, d_state=N, dt_min=0.1, dt_max=0.2)(L)[0][0, 0])


def linear_attention_matrix():
    return torch.randn(L, N) @ torch.randn(L, N).T


def softmax_matrix(length=L):
    q, k = torch.randn(length, N), torch.randn(length, N)
    scores = (q @ k.T / math.sqrt(N)).masked_fill(~torch.ones(length, length).tril().bool(), -math.inf)
    return scores.softmax(-1)


@pytest.mark.parametrize(
    ("matrix", "lower", "upper"),
    [
        (s4d_matrix, N, 0),
        (mamba_matrix, N, 0),
        (mamba2_matrix, N, 0),
        (bimamba_matrix, N, N),
        (linear_attention_matrix, N, N),
    ],
)
def test_what_the_second_half_knows_of_the_first_passes_through_n_states(matrix, lower, upper):
    M = matrix()
    assert off_diagonal_rank(M) == lower
    assert (off_diagonal_rank(M, upper=True) if M.triu(1).any() else 0) == upper


@pytest.mark.parametrize("make", [lambda: Mamba(8, d_state=N), lambda: Mamba2(8, d_state=N, headdim=4)])
def test_the_matrix_of_a_layer_is_what_its_scan_computes(make):
    scan = watch_scans(make(), torch.randn(1, L, 8))[0]
    M = mixing_matrix(scan)
    if scan.operator == "selective_scan":
        close(torch.einsum("dij,dj->di", M, scan.arguments["u"][0, 0]), scan.again(D=None)[0, 0])
    else:
        close(torch.einsum("hij,jhp->ihp", M, scan.arguments["x"][0]), scan.again()[0])


def test_convolutions_are_constant_along_diagonals_and_selection_ends_that():
    def share(M):
        """Of M's energy below the diagonal, what is no convolution."""
        M = M.tril(-1)
        steps = torch.arange(L)
        means = torch.stack([M.diagonal(-int(s)).mean() for s in steps])
        return ((M - toeplitz(means)).square().sum() / M.square().sum()).item()

    assert share(s4d_matrix()) < 1e-20
    assert share(mamba_matrix()) > 0.05
    assert share(mamba2_matrix()) > 0.05


@pytest.mark.parametrize(("states_decay_alike", "beyond"), [(True, (0, 1e-12)), (False, (1e-2, 1))])
def test_states_that_decay_differently_have_no_scalar_mask(states_decay_alike, beyond):
    """M / (C B^T) must be a mask, whose off-diagonal blocks have rank 1. With a decay per state they have not."""
    A = -torch.ones(1, N) if states_decay_alike else -torch.arange(1.0, N + 1)[None]
    delta, B, C = 0.1 * torch.rand(1, 1, L), torch.rand(1, N, L) + 0.5, torch.rand(1, N, L) + 0.5
    u = torch.eye(L)[:, None]
    M = selective_scan(u, delta.expand(L, 1, L), A, B.expand(L, N, L), C.expand(L, N, L))[0][:, 0].T
    mask = M / (C[0].T @ B[0] * delta[0])
    values = torch.linalg.svdvals(mask[L // 2 :, : L // 2])
    assert beyond[0] <= (values[1] / values[0]).item() < beyond[1]
    assert off_diagonal_rank(M) == N  # as a whole it passes through N states all the same


def test_steps_per_channel_are_a_matrix_per_channel():
    """All channels of an SSD head share one matrix; those of Mamba span as many dimensions as there are channels."""
    mamba = mixing_matrix(watch_scans(Mamba(4, d_state=N), torch.randn(1, L, 4))[0])
    assert rank(mamba.flatten(1)) == len(mamba) == 8
    scan = watch_scans(Mamba2(4, d_state=N, headdim=8), torch.randn(1, L, 4))[0]
    assert len(mixing_matrix(scan)) == 1
    channels = scan.again(x=torch.randn(1, L, 1, 8))
    assert channels.shape == (1, L, 1, 8)


def test_softmax_attention_needs_more_states_the_longer_it_gets():
    """What the second half knows of the first passes through no fixed number of states, whichever way it is found."""
    ranks, missed = [], []
    for length in (16, 32, 64):
        values = torch.linalg.svdvals(softmax_matrix(length)[length // 2 :, : length // 2])
        ranks.append(int((values > 1e-9 * values[0]).sum()))
        missed.append((values[N:].square().sum() / values.square().sum()).sqrt().item())
    assert N < ranks[0] < ranks[1] < ranks[2]
    assert min(missed) > 0.01  # by the best matrix of N states


def test_scans_come_near_to_softmax_attention_by_more_states_and_never_reach_it():
    """exp(q k) by its Taylor series: states for all products of up to `degree` dimensions, and a normalizer."""
    q, k, v = 0.7 * torch.randn(L, 2), 0.7 * torch.randn(L, 2), torch.randn(L, P)
    exact = (q @ k.T).masked_fill(~torch.ones(L, L).tril().bool(), -math.inf).softmax(-1) @ v

    def features(x, degree):
        powers = [torch.ones(L, 1)]
        for i in range(degree):
            powers.append((powers[-1][:, :, None] * x[:, None] / math.sqrt(i + 1)).flatten(1))
        return torch.cat(powers, 1)

    errors, values = [], torch.cat([v, torch.ones(L, 1)], 1)[None, :, None]
    for degree in (2, 4, 6, 8):
        B, C = (features(x, degree)[None, :, None] for x in (k, q))
        y = ssd_scan(values, torch.ones(1, L, 1), torch.zeros(1), B, C)[0][0, :, 0]
        errors.append((y[:, :P] / y[:, P:] - exact).abs().max().item())
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] > 1e-9


def test_a_normalizer_makes_coefficients_depend_on_more_than_their_token():
    """M[i, i] of a scan depends on token i alone; that of a normalized matrix on all before it."""
    q, k = F.elu(torch.randn(L, N)) + 1, F.elu(torch.randn(L, N)) + 1
    other = k.clone()
    other[0] *= 5

    def plain(keys):
        eye = torch.eye(L)[:, :, None, None]
        expanded = [m.expand(L, L, 1, N) for m in (keys[:, None], q[:, None])]
        return ssd_scan(eye, torch.ones(L, L, 1), torch.zeros(1), *expanded)[0][..., 0, 0].T

    before, after = plain(k), plain(other)
    assert torch.equal(before[1:, 1:], after[1:, 1:])
    normalized = [M / M.sum(1, keepdim=True) for M in (before, after)]
    close(normalized[0].sum(1), torch.ones(L))
    assert ((normalized[0] - normalized[1])[1:, 1:].diagonal().abs() > 1e-3).all()
    assert before.sum(1)[-1] > 5 * before.sum(1)[0]  # a sum, where the other is a mean: it grows with the tokens


def test_a_second_dimension_needs_a_state_per_pixel_of_the_border():
    """In raster order a row of w pixels separates past and future: the rank of Chimera's blocks is w n."""
    ranks = []
    for width in (2, 4, 6):
        layer = Chimera(2, d_state=1, directions=1, ssm_ratio=1)
        torch.nn.init.normal_(layer.couplings)
        u = torch.randn(1, 6, width, 2)
        with torch.no_grad():
            delta, B, C = (m.expand(6 * width, *m.shape[1:]) for m in layer.coefficients(u))
            impulses = torch.eye(6 * width).view(-1, 6, width, 1).expand(-1, -1, -1, 2)
            M = layer.recurrence(impulses, delta, B, C)[..., 0].flatten(1).T
        ranks.append(off_diagonal_rank(M))
    assert ranks == [2, 4, 6]


def test_four_routes_are_four_semiseparable_matrices_in_four_orders():
    """Each has rank N in its own order; summed in raster order, their blocks have none so low."""
    layer, x = SS2D(4, d_state=N), torch.randn(1, 5, 5, 4)
    scan = watch_scans(layer, x)[0]
    M = mixing_matrix(scan)[0]
    single = mixing_matrix(replace(scan, arguments=scan.arguments | {"merge": False}))
    for k, route in enumerate(routes.cross(5, 5)):
        ordered = single[k, 0][route][:, route]
        assert not ordered.triu(1).any()
        assert off_diagonal_rank(ordered) == N
    assert off_diagonal_rank(M) > N
