"""What Mamba-2, Mamba-3, Hydra, S-Mamba, the neck and head of Mamba-FSCIL and the blocks of Motion Mamba are."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from ssmvision.layers import (
    BidirectionalSpatialMamba,
    ETFHead,
    FSCILNeck,
    HierarchicalTemporalMamba,
    Hydra,
    Mamba2,
    Mamba3,
    MotionMambaUNet,
    SMambaLayer,
    mamba3,
)
from ssmvision.layers.fscil import dot_regression_loss, separation_loss, suppression_loss
from ssmvision.layers.mamba2 import RMSNormGated
from ssmvision.layers.mamba3 import trapezoidal_scan


def disturbed(layer):
    """The layer with parameters that are nowhere zero or one."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


MAMBA2 = [
    {},
    {"ngroups": 2, "norm_before_gate": True},
    {"rmsnorm": False, "D_has_hdim": True, "bias": True},
    {"d_ssm": 8, "dt_limit": (0.1, 0.3), "conv_bias": False},
]


@pytest.mark.parametrize("options", MAMBA2, ids=str)
def test_mamba2_is_its_recurrence(options):
    """Written out token by token and head by head, in float64."""
    layer = disturbed(Mamba2(8, d_state=3, d_conv=3, headdim=4, **options)).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    d, g, n, p = options.get("d_ssm", 16), options.get("ngroups", 1), 3, 4
    h, mlp = d // p, 16 - d
    mlp_gate, mlp_value, z, xbc, dt = layer.in_proj(x)[0].split([mlp, mlp, d, d + 2 * g * n, h], dim=-1)
    taps = torch.cat([torch.zeros(2, xbc.shape[1]), xbc]).unfold(0, 3, 1)  # (l, c, w)
    conv = (taps * layer.conv1d.weight[:, 0]).sum(-1)
    conv = F.silu(conv if layer.conv1d.bias is None else conv + layer.conv1d.bias)
    step = F.softplus(dt + layer.dt_bias).clamp(*options.get("dt_limit", (0, math.inf)))
    D = layer.D.view(h, p) if options.get("D_has_hdim") else layer.D.view(h, 1).expand(h, p)
    y = torch.zeros(7, h, p, dtype=torch.float64)
    for head in range(h):
        group = head // (h // g)
        state = torch.zeros(p, n, dtype=torch.float64)
        for t in range(7):
            u = conv[t, head * p : (head + 1) * p]
            B, C = (conv[t, d + i * g * n + group * n :][:n] for i in (0, 1))
            decay = torch.exp(-step[t, head] * layer.A_log[head].exp())
            state = decay * state + step[t, head] * torch.outer(u, B)
            y[t, head] = state @ C + D[head] * u
    y = y.flatten(1)
    if options.get("rmsnorm", True):
        gate = F.silu(z)
        v = (y if options.get("norm_before_gate") else y * gate).view(7, g, d // g)
        v = (v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(7, d) * layer.norm.weight
        y = v * gate if options.get("norm_before_gate") else v
    else:
        y = y * F.silu(z)
    y = torch.cat([F.silu(mlp_gate) * mlp_value, y], dim=-1)
    torch.testing.assert_close(layer(x)[0], layer.out_proj(y), rtol=1e-9, atol=1e-10)


def test_mamba2_starts_as_published():
    torch.manual_seed(0)
    layer = Mamba2(256, headdim=2)
    steps, A = F.softplus(layer.dt_bias), layer.A_log.exp()
    assert 0.9e-3 < steps.min() < 2e-3
    assert 0.05 < steps.max() < 0.101
    assert 1 <= A.min() < 2
    assert 15 < A.max() <= 16


def test_channels_that_do_not_divide_are_named():
    for make, message in [
        (lambda: Mamba2(8, headdim=3), "Mamba2: 16 scanned channels do not divide into heads of 3"),
        (lambda: Mamba3(8, headdim=3), "Mamba3: 16 inner channels do not divide into heads of 3"),
        (lambda: Mamba3(8, headdim=8, ngroups=3), "Mamba3: 2 heads do not divide into 3 groups"),
        (lambda: Hydra(8, headdim=3), "Hydra: 16 inner channels do not divide into heads of 3"),
        (lambda: Hydra(8, headdim=4, d_conv=4), "Hydra: d_conv must be odd, not 4"),
        (lambda: RMSNormGated(8, 3), "RMSNormGated: 8 channels do not divide into 3 groups"),
        (lambda: FSCILNeck(version="s4"), "FSCILNeck: version must be 'ssm' or 'ss2d', not 's4'"),
        (lambda: ETFHead(4, 5), "ETFHead: num_classes must be 2 to in_features = 4, not 5"),
        (lambda: FSCILNeck(8, 10), "FSCILNeck: 8 channels become 10 only with use_residual_proj"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def scan_arguments(b=2, l=11, g=2, h=4, p=3, n=6, s=2):
    torch.manual_seed(0)
    shapes = {"q": (b, l, g, n), "k": (b, l, g, n), "v": (b, l, h, p), "trap": (b, l, h), "angles": (b, l, h, s)}
    shapes |= {"q_bias": (h, n), "k_bias": (h, n)}
    drawn = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    dt = torch.rand(b, l, h, dtype=torch.float64)
    return drawn | {"dt": dt, "a_dt": -dt * torch.rand(b, l, h, dtype=torch.float64)}


def test_trapezoid_with_all_weight_on_the_end_is_ssd():
    """Without rotation and with trap = inf, it is the recurrence of Mamba-2."""
    given = scan_arguments(s=0) | {"trap": torch.full((2, 11, 4), torch.inf, dtype=torch.float64)}
    y, last = trapezoidal_scan(**given)
    q, k = (given[x].repeat_interleave(2, 2) + given[f"{x}_bias"] for x in ("q", "k"))
    state = torch.zeros(2, 4, 3, 6, dtype=torch.float64)
    for t in range(11):
        drive = given["dt"][:, t, :, None, None] * given["v"][:, t, :, :, None] * k[:, t, :, None]
        state = given["a_dt"][:, t].exp()[..., None, None] * state + drive
        torch.testing.assert_close(y[:, t], (state * q[:, t, :, None]).sum(-1))
    torch.testing.assert_close(last.ssm, state)


def test_trapezoid_turns_alike_leave_the_output():
    """A rotation of q and k by one angle is none: only differences of angles count."""
    given = scan_arguments()
    still = given | {"angles": torch.zeros_like(given["angles"])}
    first_only = torch.zeros_like(given["angles"])
    first_only[:, 0] = 1.0
    torch.testing.assert_close(
        trapezoidal_scan(**(given | {"angles": first_only}))[0], trapezoidal_scan(**still)[0], rtol=1e-9, atol=1e-9
    )
    assert not torch.allclose(trapezoidal_scan(**given)[0], trapezoidal_scan(**still)[0], atol=1e-2)


def test_trapezoid_without_decay_stays_finite_and_continues():
    given = scan_arguments()
    nothing = given | {"a_dt": torch.zeros_like(given["a_dt"])}
    faint = given | {"a_dt": torch.full_like(given["a_dt"], -1e-9)}
    y, _ = trapezoidal_scan(**nothing)
    torch.testing.assert_close(y, trapezoidal_scan(**faint)[0], rtol=1e-6, atol=1e-6)
    assert trapezoidal_scan(**nothing)[1].ssm.isfinite().all()
    tokens = [name for name in given if not name.endswith("bias")]
    whole, last = trapezoidal_scan(**given)
    first, state = trapezoidal_scan(**(given | {name: given[name][:, :6] for name in tokens}))
    second, state = trapezoidal_scan(**(given | {name: given[name][:, 6:] for name in tokens}), state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-9, atol=1e-9)
    for found, wanted in zip(state, last, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_trapezoid_in_chunks_of_any_length(monkeypatch):
    given = scan_arguments()
    start = mamba3.Mamba3State(*(torch.randn_like(x) for x in trapezoidal_scan(**given)[1]))
    reset = torch.zeros(2, 11, dtype=torch.bool)
    reset[0, [2, 3, 8]] = reset[1, 0] = True
    wanted = trapezoidal_scan(**given, state=start, reset=reset)
    for chunk in (1, 3, 11):
        monkeypatch.setattr(mamba3, "CHUNK", chunk)
        y, last = trapezoidal_scan(**given, state=start, reset=reset)
        for found, want in zip((y, *last), (wanted[0], *wanted[1]), strict=True):
            torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
def test_trapezoid_gradients_of_slow_decays_are_exact_in_float32(scale):
    """They are differences of decays and drives; nothing may divide by the decay's logarithm."""
    given = scan_arguments(l=40)
    grads = []
    for dtype in (torch.float64, torch.float32):
        a_dt = (scale * given["a_dt"]).to(dtype).requires_grad_()
        others = {name: x.to(dtype) for name, x in given.items() if name != "a_dt"}
        trapezoidal_scan(**others, a_dt=a_dt)[0].square().mean().backward()
        grads.append(a_dt.grad)
    assert (grads[1] - grads[0]).abs().max() < 1e-5 * grads[0].abs().max()


@pytest.mark.parametrize("name", ["q", "k", "dt", "a_dt", "trap", "q_bias", "k_bias"])
def test_trapezoid_names_what_does_not_fit(name):
    given = scan_arguments()
    wrong = given | {name: torch.cat([given[name], given[name]], -1)}
    with pytest.raises(RuntimeError, match=r"^trapezoidal_scan: \w+ has shape .* expected "):
        trapezoidal_scan(**wrong)


def test_trapezoid_turns_no_more_states_than_there_are():
    with pytest.raises(RuntimeError, match="4 angles turn 8 states, but there are 6"):
        trapezoidal_scan(**scan_arguments(s=4))
    with pytest.raises(RuntimeError, match=r"the groups of q and k \(3\) must divide 4 heads"):
        trapezoidal_scan(**scan_arguments(g=3))


def test_trapezoid_gradients():
    given = {name: x.requires_grad_() for name, x in scan_arguments(b=1, l=4, g=1, h=2, p=2, n=4, s=1).items()}
    reset = torch.tensor([[False, False, True, False]])
    names = list(given)

    def scan(*tensors):
        y, last = trapezoidal_scan(**dict(zip(names, tensors, strict=True)), reset=reset)
        return y, *last

    assert torch.autograd.gradcheck(scan, tuple(given.values()))


def test_hydra_reversed_exchanges_its_directions():
    layer = disturbed(Hydra(8, d_state=3, headdim=4, ngroups=2))
    exchanged = copy.deepcopy(layer)
    d, width = 16, 2 * 2 * 3
    # Rows of in_proj: z, x, both directions' B and C, both directions' step sizes.
    order = torch.cat(
        [
            torch.arange(2 * d),
            torch.arange(2 * d + width, 2 * d + 2 * width),
            torch.arange(2 * d, 2 * d + width),
            torch.arange(2 * d + 2 * width + 4, 2 * d + 2 * width + 8),
            torch.arange(2 * d + 2 * width, 2 * d + 2 * width + 4),
        ]
    )
    conv = order[d : 2 * d + 2 * width] - d
    state = layer.state_dict()
    state["in_proj.weight"] = state["in_proj.weight"][order]
    state["conv1d.weight"] = state["conv1d.weight"][conv].flip(2)
    state["conv1d.bias"] = state["conv1d.bias"][conv]
    exchanged.load_state_dict(state)
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(exchanged(x.flip(1)), layer(x).flip(1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(x.flip(1)), layer(x).flip(1), atol=1e-3)


def test_hydra_reads_itself_only_through_the_diagonal():
    """With the diagonal at zero, one token alone gives nothing; two give something."""
    layer = disturbed(Hydra(8, d_state=3, headdim=4))
    torch.nn.init.zeros_(layer.D)
    torch.nn.init.zeros_(layer.fc_D.weight)
    assert layer(torch.randn(2, 1, 8)).abs().max() == 0
    assert layer(torch.randn(2, 2, 8)).abs().amax((0, 2)).min() > 1e-4


def test_hydra_starts_from_its_learned_state_at_both_ends():
    layer = disturbed(Hydra(8, d_state=3, headdim=4, learnable_init_states=True))
    x = torch.randn(1, 9, 8)
    y = layer(x)
    torch.nn.init.zeros_(layer.init_states)
    moved = (layer(x) - y).abs().amax((0, 2))
    assert moved[0] > 1e-4
    assert moved[-1] > 1e-4


def test_smamba_reversed_exchanges_its_mixers():
    layer = disturbed(SMambaLayer(8, d_state=3, d_ff=12))
    exchanged = copy.deepcopy(layer)
    exchanged.attention, exchanged.attention_r = layer.attention_r, layer.attention
    x = torch.randn(2, 7, 8)
    assert not torch.allclose(layer(x.flip(1)), layer(x).flip(1), atol=1e-3)
    torch.testing.assert_close(exchanged(x.flip(1)), layer(x).flip(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("version", ["ssm", "ss2d"])
def test_new_branch_starts_silent_and_leaves_the_backbone_alone(version):
    torch.manual_seed(0)
    neck = FSCILNeck(8, 12, 3, d_state=3, version=version, use_new_branch=True, use_residual_proj=True)
    x = torch.randn(4, 8, 3, 3, requires_grad=True)
    result = neck(x)
    assert torch.equal(result.out, result.residual)
    assert result.main.abs().max() == 0
    torch.nn.init.normal_(neck.block_new.in_proj.weight)
    result = neck(x)
    assert (result.out - result.residual).abs().max() > 1e-3
    (result.out - result.residual).sum().backward()
    assert neck.mlp_proj_new[0].weight.grad.abs().max() > 0
    assert x.grad is None or x.grad.abs().max() == 0


@pytest.mark.parametrize("version", ["ssm", "ss2d"])
def test_neck_without_new_branch(version):
    torch.manual_seed(0)
    neck = FSCILNeck(8, 8, 3, d_state=3, version=version)
    x = torch.randn(2, 8, 3, 3)
    result = neck(x)
    assert result.novel is None
    torch.testing.assert_close(result.residual, x.mean((2, 3)))
    torch.testing.assert_close(result.out, result.residual + result.base.y.mean(2))
    assert result.base.Bs.shape == (2, 1 if version == "ssm" else 4, 3, 9)
    with pytest.raises(ValueError, match=r"the map is \(4, 4\), expected \(3, 3\)"):
        neck(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("version", ["ssm", "ss2d"])
def test_neck_resets_everything(version):
    neck = FSCILNeck(8, 8, 3, d_state=3, version=version, use_new_branch=True)
    names = ("pos_embed", "A_log", "D", "dt_proj", "x_proj_weight")
    own = [name for name, _ in neck.named_parameters() if any(part in name for part in names)]
    for name in own:
        torch.nn.init.constant_(neck.get_parameter(name), torch.nan)
    torch.nn.init.ones_(neck.block_new.in_proj.weight)
    neck.reset_parameters()
    assert len(own) >= 10
    assert all(neck.get_parameter(name).isfinite().all() for name in own)
    assert (neck.block_new.in_proj.weight.sum(1) == torch.tensor([8.0] * 8 + [0.0] * 8)).all()


def test_losses_say_how_quiet_and_how_separate():
    main = torch.cat([torch.zeros(2, 3), torch.ones(1, 3)])
    novel = torch.tensor([False, False, True])
    base, new = suppression_loss(main, novel)
    assert base == 0
    torch.testing.assert_close(new, torch.tensor(-(3**0.5) / 3))
    apart = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[:, None, :, None]
    alike = torch.ones(3, 1, 2, 1)
    assert separation_loss(apart, novel) == 0
    torch.testing.assert_close(separation_loss(alike, novel), torch.tensor(0.5))


def test_branches_over_time_are_isolated():
    """The output is linear in them: a layer of three is the sum of three layers of one."""
    layer = disturbed(HierarchicalTemporalMamba(6, 3))
    x = torch.randn(2, 9, 6)
    parts = []
    for branch in layer.branches:
        single = HierarchicalTemporalMamba(6, 1)
        single.norm, single.in_proj, single.out_proj = layer.norm, layer.in_proj, layer.out_proj
        single.branches[0] = branch
        parts.append(single(x) - x)
    torch.testing.assert_close(layer(x), x + sum(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("features", "classes"), [(7, 7), (16, 5), (3, 2)])
def test_directions_of_classes_are_equally_far_apart(features, classes):
    head = ETFHead(features, classes, dtype=torch.float64)
    wanted = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(head.weight @ head.weight.T, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(head(3 * head.weight), wanted, rtol=0, atol=1e-12)
    assert not list(head.parameters())


def test_features_that_follow_the_loss_reach_the_direction_of_their_class():
    torch.manual_seed(0)
    head, target = ETFHead(8, 4, dtype=torch.float64), torch.arange(4)
    features = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    loss = dot_regression_loss(head(features), target)
    assert loss.item() == pytest.approx(0.5 * ((head(features).diagonal() - 1) ** 2).mean().item())
    optimizer = torch.optim.Adam([features], 0.05)
    for _ in range(300):
        optimizer.zero_grad()
        dot_regression_loss(head(features), target).backward()
        optimizer.step()
    torch.testing.assert_close(head(features).diagonal(), torch.ones(4, dtype=torch.float64), rtol=0, atol=0.03)


def test_channels_reversed_exchange_the_directions_of_the_scan_over_them():
    layer = disturbed(BidirectionalSpatialMamba(5))
    exchanged = copy.deepcopy(layer)
    exchanged.fwd, exchanged.bwd = layer.bwd, layer.fwd
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(exchanged(x.flip(2)), layer(x).flip(2), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(x.flip(2)), layer(x).flip(2), atol=1e-3)


def test_unet_scans_most_at_its_ends():
    torch.manual_seed(0)
    net = MotionMambaUNet(6, length=5, depth=3)
    counts = [[len(block.htm.branches) for block in blocks] for blocks in (net.enc, [net.mid], net.dec)]
    assert counts == [[5, 3, 1], [1], [1, 3, 5]]
    x = torch.randn(2, 5, 6)
    assert net(x).shape == x.shape
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
