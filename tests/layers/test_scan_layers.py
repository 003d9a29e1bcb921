"""What all layers of scans promise, and what SS2D, ScalarSS2D and BiMamba do."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssmvision.layers import (
    SS2D,
    AtrousSS2D,
    BidirectionalSpatialMamba,
    BiMamba,
    GroupedSS2D,
    HierarchicalTemporalMamba,
    Hydra,
    LocalSS2D,
    Mamba,
    Mamba2,
    Mamba3,
    MambaStack,
    MambaVisionMixer,
    ModulatedGroupMamba,
    MultiScaleSS2D,
    NonCausalSSD,
    ScalarSS2D,
    SMambaLayer,
    StructureAwareSSM,
)

LAYERS = {
    "SS2D": (lambda **dd: SS2D(8, **dd), (2, 5, 7, 8)),
    "SS2D with everything": (
        lambda **dd: SS2D(8, d_state=3, ssm_ratio=1.5, dt_rank=2, conv_bias=True, gate=True, **dd),
        (2, 4, 6, 8),
    ),
    "AtrousSS2D": (lambda **dd: AtrousSS2D(8, d_state=3, gate=True, **dd), (2, 5, 7, 8)),
    "LocalSS2D": (lambda **dd: LocalSS2D(8, ("h", "w2_flip", "w3"), d_state=3, **dd), (2, 4, 5, 8)),
    "GroupedSS2D": (lambda **dd: GroupedSS2D(32, **dd), (2, 5, 7, 32)),
    "ModulatedGroupMamba": (lambda **dd: ModulatedGroupMamba(64, **dd), (2, 5, 7, 64)),
    "MultiScaleSS2D": (lambda **dd: MultiScaleSS2D(32, d_state=2, conv_bias=True, **dd), (2, 5, 7, 32)),
    "ScalarSS2D": (lambda **dd: ScalarSS2D(8, d_state=4, dt_rank=4, **dd), (1, 5, 3, 8)),
    "BiMamba": (lambda **dd: BiMamba(8, **dd), (2, 9, 8)),
    "Mamba": (lambda **dd: Mamba(8, d_state=3, **dd), (2, 9, 8)),
    "Mamba with a definite matrix": (lambda **dd: Mamba(8, d_state=3, input_output="positive", **dd), (2, 9, 8)),
    "Mamba2": (lambda **dd: Mamba2(8, d_state=3, headdim=4, **dd), (2, 9, 8)),
    "Mamba2 with everything": (
        lambda **dd: Mamba2(8, d_state=3, headdim=4, d_ssm=8, ngroups=2, D_has_hdim=True, bias=True, **dd),
        (2, 9, 8),
    ),
    "Mamba2 without norm": (lambda **dd: Mamba2(8, d_state=3, headdim=4, rmsnorm=False, **dd), (2, 9, 8)),
    "Mamba3": (lambda **dd: Mamba3(8, d_state=6, headdim=4, ngroups=2, **dd), (2, 9, 8)),
    "MambaStack": (lambda **dd: MambaStack(8, 2, d_state=3, **dd), (2, 9, 8)),
    "Hydra": (lambda **dd: Hydra(8, d_state=3, headdim=4, ngroups=2, **dd), (2, 9, 8)),
    "Hydra that learns its initial state": (
        lambda **dd: Hydra(8, d_state=3, headdim=4, learnable_init_states=True, **dd),
        (2, 9, 8),
    ),
    "SMambaLayer": (lambda **dd: SMambaLayer(8, d_state=3, **dd), (2, 9, 8)),
    "HierarchicalTemporalMamba": (lambda **dd: HierarchicalTemporalMamba(8, 3, **dd), (2, 9, 8)),
    "BidirectionalSpatialMamba": (lambda **dd: BidirectionalSpatialMamba(9, **dd), (2, 9, 8)),
    "MambaVisionMixer": (lambda **dd: MambaVisionMixer(8, **dd), (2, 9, 8)),
    "MambaVisionMixer with everything": (
        lambda **dd: MambaVisionMixer(8, d_state=3, d_conv=2, dt_rank=2, **dd),
        (1, 4, 8),
    ),
    "NonCausalSSD": (lambda **dd: NonCausalSSD(8, num_heads=2, d_state=4, **dd), (2, 5, 3, 8)),
    "StructureAwareSSM": (lambda **dd: StructureAwareSSM(8, **dd), (2, 5, 3, 8)),
    "BiMamba with definite matrices": (lambda **dd: BiMamba(8, d_state=3, input_output="negative", **dd), (2, 9, 8)),
    "BiMamba summed": (lambda **dd: BiMamba(8, d_state=3, d_conv=2, expand=1, dt_rank=3, merge="sum", **dd), (1, 1, 8)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    return make(), torch.randn(shape)


def test_shape_stays_and_every_parameter_learns(layer_and_input):
    layer, x = layer_and_input
    x.requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, p in [("input", x), *layer.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        # With one token there is nothing for the state to decay from.
        if not (x.shape[1] == 1 and "A" in name):
            assert p.grad.abs().sum() > 0, name


def test_batch_entries_do_not_mix(layer_and_input):
    layer, x = layer_and_input
    both = layer(torch.cat([x, torch.randn_like(x)]))
    torch.testing.assert_close(both[: len(x)], layer(x), rtol=1e-5, atol=1e-6)


def test_one_seed_one_layer(layer_and_input, request):
    make, _ = LAYERS[request.node.callspec.params["layer_and_input"]]
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(make().state_dict())
    assert all(torch.equal(states[0][name], x) for name, x in states[1].items())


def test_reset_parameters_covers_the_scan(layer_and_input):
    """What is not reset stays NaN: a layer that was made on the meta device depends on it."""
    layer, _ = layer_and_input
    own = [name for name, _ in layer.named_parameters(recurse=False)]
    scan = [*own, *(name for name, _ in layer.named_parameters() if name.startswith("dt_proj") and "_b." not in name)]
    for name in scan:
        torch.nn.init.constant_(layer.get_parameter(name), torch.nan)
    layer.reset_parameters()
    assert not [name for name in scan if not layer.get_parameter(name).isfinite().all()]


def test_dtype_and_device_reach_every_parameter(request, layer_and_input):
    make, shape = LAYERS[request.node.callspec.params["layer_and_input"]]
    layer = make(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    assert layer(torch.empty(shape, device="meta", dtype=torch.bfloat16)).shape == shape


def test_bfloat16_is_near_float32(layer_and_input):
    layer, x = layer_and_input
    with torch.no_grad():
        wanted = layer(x)
        found = layer.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.05 * wanted.abs().max().item())


def test_training_step_under_autocast(layer_and_input):
    layer, x = layer_and_input
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(x).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_layers_script(layer_and_input):
    layer, x = layer_and_input
    if isinstance(layer, Mamba3):
        pytest.skip("TorchScript knows no dicts of arguments")
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize("name", ["SS2D", "BiMamba"])
def test_step_sizes_start_in_their_range(name):
    torch.manual_seed(0)
    layer = SS2D(64) if name == "SS2D" else BiMamba(64)
    bias = layer.dt_projs_bias if name == "SS2D" else layer.dt_proj.bias
    steps = F.softplus(bias)
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 0.1 * 1.001
    # Log-uniform: half of them below the geometric mean.
    assert 0.35 < (steps < 1e-2).float().mean() < 0.65
    rank = layer.dt_rank
    weight = layer.dt_projs_weight if name == "SS2D" else layer.dt_proj.weight
    assert weight.abs().max() <= rank**-0.5
    assert weight.std().item() == pytest.approx(rank**-0.5 / math.sqrt(3), rel=0.1)


def test_state_matrices_start_as_published():
    counts = -torch.arange(1.0, 17)
    layer = BiMamba(8)
    for A_log in (layer.A_log, layer.A_b_log):
        torch.testing.assert_close(-A_log.exp(), counts.expand(16, -1))
    A, D, _, _ = SS2D(8, d_state=16).scan_parameters()
    torch.testing.assert_close(A, counts.expand(4, 16, -1))
    assert (D == 1).all()
    A, D, _, _ = ScalarSS2D(8, d_state=2, dt_rank=4).scan_parameters()
    assert (A == -1).all()
    assert (D == 1).all()


def test_scalar_form_is_ss2d_with_parameters_spread_over_heads():
    torch.manual_seed(0)
    scalar, full = ScalarSS2D(8, d_state=3, dt_rank=4), SS2D(8, d_state=3, dt_rank=4)
    for p in (scalar.A_logs, scalar.Ds, scalar.dt_projs_bias):
        torch.nn.init.normal_(p)
    state = scalar.state_dict()
    state["A_logs"] = state["A_logs"].repeat_interleave(4, 1).reshape(64, 1).repeat(1, 3)
    state["dt_projs_bias"] = state["dt_projs_bias"].repeat_interleave(4, 1)
    state["Ds"] = state["Ds"].flatten()
    state["dt_projs_weight"] = torch.zeros(4, 16, 4)
    for channel in range(16):
        state["dt_projs_weight"][:, channel, channel // 4] = 1
    full.load_state_dict(state)
    x = torch.randn(2, 5, 4, 8)
    torch.testing.assert_close(scalar(x), full(x))


ROUTED = ["x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"]


def with_routes(layer, order):
    """The same layer with the parameters of its four routes in another order."""
    state = layer.state_dict()
    for name in ROUTED:
        state[name] = state[name].unflatten(0, (4, -1))[order].flatten(0, 1)
    other = SS2D(8, d_state=2, conv_bias=True)
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize(
    ("move", "order"),
    [
        (lambda x: x.transpose(1, 2), [1, 0, 3, 2]),
        (lambda x: x.flip(1, 2), [2, 3, 0, 1]),
        (lambda x: x.transpose(1, 2).flip(1, 2), [3, 2, 1, 0]),
    ],
    ids=["transposed", "half turn", "antitransposed"],
)
def test_moving_the_image_exchanges_the_routes(move, order):
    torch.manual_seed(0)
    layer = SS2D(8, d_state=2, conv_bias=True)
    for name in ("A_logs", "Ds"):
        torch.nn.init.normal_(layer.get_parameter(name))
    x = torch.randn(2, 4, 6, 8)
    moved = with_routes(layer, order)
    weight = layer.conv2d.weight  # (c, 1, 3, 3) moves like an image
    moved.conv2d.weight.data = move(weight.detach().permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
    torch.testing.assert_close(moved(move(x)), move(layer(x)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(move(x)), move(layer(x)), atol=1e-3)


def test_bimamba_reversed_exchanges_its_branches():
    torch.manual_seed(0)
    layer, exchanged = BiMamba(8), BiMamba(8)
    names = {"A_log": "A_b_log", "D": "D_b"}
    pairs = {"conv1d.": "conv1d_b.", "x_proj.": "x_proj_b.", "dt_proj.": "dt_proj_b."}
    state = {}
    for name, value in layer.state_dict().items():
        partner = names.get(name) or {b: a for a, b in names.items()}.get(name, name)
        for a, b in pairs.items():
            if name.startswith(a):
                partner = b + name.removeprefix(a)
            elif name.startswith(b):
                partner = a + name.removeprefix(b)
        state[partner] = value
    exchanged.load_state_dict(state)
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(exchanged(x.flip(1)), layer(x).flip(1), rtol=1e-4, atol=1e-6)


def test_bimamba_merges():
    torch.manual_seed(0)
    mean, total = BiMamba(8), BiMamba(8, merge="sum")
    total.load_state_dict(mean.state_dict())
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(2 * mean(x), total(x))
    with pytest.raises(ValueError, match="merge must be 'mean' or 'sum', not 'max'"):
        BiMamba(8, merge="max")
