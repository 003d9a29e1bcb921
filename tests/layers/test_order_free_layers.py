"""The mixers of MLLA, VSSD and Spatial-Mamba against their definitions, pixel by pixel."""

import pytest
import torch
import torch.nn.functional as F

from ssmvision.layers import MambaLikeLinearAttention, NonCausalSSD, StructureAwareSSM
from ssmvision.layers.linear_attention import rotary_table
from ssmvision.layers.spatial_ssm import StateFusion


def randomized(layer):
    """The layer in float64, with every parameter its own."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.double().parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def test_positions_turn_pairs_of_channels_by_row_and_column():
    table = rotary_table(torch.empty(1, 4, 6, 16, dtype=torch.float64))
    sin, cos = table[:, 2, 5, 0]
    angles = [2 * 10000 ** (-i / 4) for i in range(4)] + [5 * 10000 ** (-i / 4) for i in range(4)]
    expected = torch.tensor(angles, dtype=torch.float64).repeat_interleave(2)
    torch.testing.assert_close(sin, expected.sin())
    torch.testing.assert_close(cos, expected.cos())
    larger = rotary_table(torch.empty(1, 9, 7, 16, dtype=torch.float64))
    torch.testing.assert_close(larger[:, :4, :6], table)


def test_linear_attention_is_attention_without_softmax():
    layer = randomized(MambaLikeLinearAttention(8, num_heads=2))
    x = torch.randn(1, 3, 5, 8, dtype=torch.float64)
    v = F.silu(layer.dwc(layer.in_proj(x).permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    q, k = (F.elu(layer.qk(v)) + 1)[0].flatten(0, 1).chunk(2, dim=1)
    sin, cos = rotary_table(x).flatten(1, 3)

    def turned(t):
        even, odd = t[:, ::2], t[:, 1::2]
        s, c = sin[:, ::2], cos[:, ::2]
        return torch.stack([even * c - odd * s, even * s + odd * c], dim=2).flatten(1)

    y = torch.zeros(15, 8, dtype=torch.float64)
    for part in (slice(0, 4), slice(4, 8)):
        weights = turned(q)[:, part] @ turned(k)[:, part].T / 15
        y[:, part] = weights @ v[0].flatten(0, 1)[:, part] / (q[:, part] @ k[:, part].mean(0) + 1e-6)[:, None]
    y = y.view(1, 3, 5, 8) + layer.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.out_proj(y * F.silu(layer.act_proj(x))))


def test_noncausal_ssd_is_its_definition():
    layer = randomized(NonCausalSSD(6, num_heads=3, d_state=4))
    x = torch.randn(1, 3, 5, 6, dtype=torch.float64)
    z, u, dt = layer.in_proj(x).split([12, 20, 3], dim=3)
    u, b, c = F.silu(layer.conv2d(u.permute(0, 3, 1, 2)))[0].flatten(1).T.split([12, 4, 4], dim=1)
    delta = F.softplus(dt[0].flatten(0, 1) + layer.dt_bias)
    y = torch.zeros(15, 12, dtype=torch.float64)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = (c @ b.T) * (delta[:, head] * layer.A_log[head].exp())
        y[:, part] = weights @ u[:, part] + layer.D[head] * u[:, part]
    torch.testing.assert_close(layer(x), layer.out_proj(layer.norm(y).view(1, 3, 5, 12) * z))


def test_noncausal_ssd_knows_no_order():
    layer = randomized(NonCausalSSD(6, num_heads=2, d_state=4))
    with torch.no_grad():  # without its convolution, all that knows neighbours
        layer.conv2d.weight.zero_()[:, :, 1, 1] = 1
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    order = torch.randperm(12)

    def shuffled(t):
        return t.flatten(1, 2)[:, order].view_as(t)

    torch.testing.assert_close(layer(shuffled(x)), shuffled(layer(x)))


def test_structure_aware_ssm_fuses_the_states_of_one_scan():
    layer = randomized(StructureAwareSSM(4, dt_rank=2)).eval()
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64)
    u, z = layer.in_proj(x).chunk(2, dim=3)
    u = F.silu(layer.conv2d(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)[0].flatten(0, 1)
    delta, b, c = (u @ layer.x_proj_weight.T).split([2, 1, 1], dim=1)
    delta = F.softplus(delta @ layer.dt_projs_weight.T + layer.dt_projs_bias)
    state, states = torch.zeros(8, dtype=torch.float64), []
    for t in range(15):
        state = torch.exp(-delta[t] * layer.A_logs[:, 0].exp()) * state + delta[t] * b[t] * u[t]
        states.append(state)
    states = torch.stack(states).T.view(1, 8, 3, 5)
    fused = layer.state_fusion(states)[0].flatten(1).T
    y = layer.out_norm(fused * c + u * layer.Ds).view(1, 3, 5, 8)
    torch.testing.assert_close(layer(x), layer.out_proj(y * F.silu(z)))


def test_fusion_is_one_kernel_of_11_by_11():
    """As the official code evaluates it."""
    fusion = randomized(StateFusion(2)).eval()
    merged = torch.zeros(2, 1, 11, 11, dtype=torch.float64)
    merged[:, :, 4:7, 4:7] += fusion.alpha[0] * fusion.kernel_3
    merged[:, :, 2:9:3, 2:9:3] += fusion.alpha[1] * fusion.kernel_3_1
    merged[:, :, ::5, ::5] += fusion.alpha[2] * fusion.kernel_3_2
    x = torch.randn(1, 2, 7, 13, dtype=torch.float64)
    torch.testing.assert_close(fusion(x), F.conv2d(x, merged, padding=5, groups=2))


def test_official_padding_differs_between_training_and_evaluation():
    x = torch.randn(1, 2, 14, 13, dtype=torch.float64)
    official, zeros, replicate = (
        randomized(StateFusion(2, padding=padding)) for padding in ("official", "zeros", "replicate")
    )
    assert torch.equal(official.train()(x), replicate.train()(x))
    assert torch.equal(official.eval()(x), zeros.eval()(x))
    assert torch.equal(zeros.train()(x), zeros.eval()(x))
    assert torch.equal(replicate.train()(x), replicate.eval()(x))
    inside = (..., slice(5, -5), slice(5, -5))
    torch.testing.assert_close(zeros(x)[inside], replicate(x)[inside])
    assert not torch.allclose(zeros(x), replicate(x))
    bordered = F.pad(x, [5] * 4, mode="replicate")
    torch.testing.assert_close(replicate(x), zeros(bordered)[..., 5:-5, 5:-5])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MambaLikeLinearAttention(18, num_heads=1), "dim 18 must be a multiple of 4"),
        (lambda: MambaLikeLinearAttention(16, num_heads=3), "of 3 heads"),
        (lambda: NonCausalSSD(8, num_heads=3), "16 inner channels do not divide into 3 heads"),
        (
            lambda: StateFusion(8, padding="reflect"),
            "padding must be 'official', 'zeros' or 'replicate', not 'reflect'",
        ),
    ],
)
def test_bad_arguments_get_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
