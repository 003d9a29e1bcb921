"""S5: golden cases; scans, steps, resets and packed sequences agree; stability."""

from pathlib import Path

import pytest
import torch

from ssmvision.engine.verify import verify_case
from ssmvision.layers._optimizer_options import declared_options
from ssmvision.layers.hippo import hippo
from ssmvision.layers.s5 import S5, S5Classifier, S5Encoder, S5Layer

PARITY = Path(__file__).parents[1] / "parity"
VARIANTS = {
    "zoh": {},
    "bilinear": {"discretization": "bilinear", "blocks": 2},
    "not conjugate": {"conj_sym": False, "C_init": "trunc_standard_normal"},
    "not conjugate ptd": {"conj_sym": False, "init": "ptd"},
    "not conjugate, odd blocks": {"d_state": 15, "blocks": 3, "conj_sym": False},
    "clipped": {"clip_eigs": True, "C_init": "complex_normal", "step_rescale": 2.0},
    "ptd": {"init": "ptd"},
    "ptd, small blocks": {"init": "ptd", "blocks": 8},
}


@pytest.mark.parametrize("case", ["ssm_s5_zoh", "ssm_s5_bidir", "ssm_s5_classifier", "ssm_s5_resets"])
def test_golden_case(case):
    result = verify_case(PARITY / case)
    assert result.ok, str(result)
    assert set(result.worst) >= {"output", "gradient"}


def stepped(layer, x, state):
    outputs = []
    for token in x.unbind(1):
        y, state = layer.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_equal_the_scan(variant):
    torch.manual_seed(0)
    layer = S5(6, **{"d_state": 16, **VARIANTS[variant]}, dtype=torch.float64)
    x = torch.randn(2, 20, 6, dtype=torch.float64)
    with torch.no_grad():
        wanted, last = layer.run(x)
        found, state = stepped(layer, x, layer.initial_state(2))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)
        _, state = layer.run(x[:, :9])
        torch.testing.assert_close(layer.run(x[:, 9:], state)[0], wanted[:, 9:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("activation", ["gelu", "full_glu", "half_glu1", "half_glu2"])
def test_steps_of_a_stack_equal_its_scan(activation, norm):
    torch.manual_seed(0)
    stack = S5Encoder(6, 2, in_chans=3, d_state=8, activation=activation, norm=norm, prenorm=norm == "layer").eval()
    stack = stack.double()
    x = torch.randn(2, 12, 3, dtype=torch.float64)
    with torch.no_grad():
        found, _ = stepped(stack, x, stack.initial_state(2))
        torch.testing.assert_close(found, stack(x), rtol=1e-9, atol=1e-9)


def test_packed_clips_equal_clips_run_one_by_one():
    torch.manual_seed(0)
    lengths = [5, 1, 9, 4]
    stack = S5Encoder(6, 2, d_state=8, do_gtrxl_norm=True, activation="half_glu1")
    clips = [torch.randn(1, length, 6) for length in lengths]
    reset = torch.cat([torch.arange(length) == 0 for length in lengths])[None]
    with torch.no_grad():
        found = stack(torch.cat(clips, 1), reset)
        wanted = torch.cat([stack(clip) for clip in clips], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(stack(torch.cat(clips, 1)), wanted, atol=1e-3)


def test_a_reset_forgets_the_given_state():
    torch.manual_seed(0)
    layer = S5(4, d_state=8)
    x, state = torch.randn(1, 6, 4), torch.randn(1, 4, dtype=torch.complex64)
    start = torch.arange(6)[None] == 0
    torch.testing.assert_close(layer.run(x, state, start)[0], layer(x))


def test_bidirectional_sees_both_ways_with_an_output_each():
    torch.manual_seed(0)
    layer = S5(4, d_state=8, bidirectional=True, dtype=torch.float64)
    x = torch.randn(1, 7, 4, dtype=torch.float64)
    swapped = S5(4, d_state=8, bidirectional=True, dtype=torch.float64)
    state = layer.state_dict()
    swapped.load_state_dict({**state, "C1": state["C2"], "C2": state["C1"]})
    torch.testing.assert_close(swapped(x.flip(1)).flip(1), layer(x), rtol=1e-9, atol=1e-9)


def test_half_the_rate_and_twice_the_step_is_nearly_the_same():
    torch.manual_seed(0)
    layer = S5(2, d_state=8, dt_max=0.01, dtype=torch.float64)
    t = torch.linspace(0, 6, 400, dtype=torch.float64)
    x = torch.stack([t.sin(), (2 * t).cos()], -1)[None]
    with torch.no_grad():
        wanted = layer(x)[:, 1::2]
        layer.step_rescale = 2.0
        found = layer(x[:, 1::2])
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_are_stable_and_parameters_learn(variant):
    torch.manual_seed(0)
    layer = S5(6, **{"d_state": 16, **VARIANTS[variant]})
    Lambda_bar, _ = layer.discrete()
    assert Lambda_bar.abs().max() < 1
    layer(torch.randn(2, 9, 6)).square().sum().backward()
    declared = declared_options(layer)
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        own = name in ("Lambda_re", "Lambda_im", "B", "log_step")
        skip = {"weight_decay": 0.0} if name == "D" else None
        assert declared.get(p) == ({"lr": 1e-3, "weight_decay": 0.0} if own else skip), name


def test_clipping_holds_eigenvalues_left():
    layer = S5(2, d_state=4, clip_eigs=True)
    torch.nn.init.ones_(layer.Lambda_re)
    assert layer.discrete()[0].abs().max() < 1


@pytest.mark.parametrize(("d_state", "blocks"), [(6, 2), (5, 1), (9, 3), (3, 3)])
def test_odd_blocks_start_from_all_eigenvalues(d_state, blocks):
    n = d_state // blocks
    layer = S5(4, d_state, blocks, conj_sym=False, dtype=torch.float64)
    Lambda = torch.complex(layer.Lambda_re, layer.Lambda_im).detach().unflatten(0, (blocks, n))
    wanted = torch.linalg.eigvals(hippo("legsd", n)[0])
    wanted = wanted[wanted.imag.argsort()].expand(blocks, n)
    torch.testing.assert_close(Lambda, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("activation", "factors"), [("gelu", {0, 2}), ("half_glu1", {0, 4})])
def test_dropout_comes_once_and_once_more_after_a_gate(activation, factors):
    torch.manual_seed(0)
    layer = S5Layer(40, activation, do_norm=False, d_state=8, dropout=0.5, dtype=torch.float64)
    x = torch.randn(20, 3, 40, dtype=torch.float64)
    if activation != "gelu":  # whose own dropout is felt through the gate, unless that is half open for all
        torch.nn.init.zeros_(layer.out2.weight)
    with torch.no_grad():
        kept = (layer(x) - x) / (layer.eval()(x) - x)
    found = kept.median(1).values.round().int()
    assert set(found.unique().tolist()) == factors
    share = (found > 0).float().mean().item()
    assert abs(share - 1 / max(factors)) < 0.05


@pytest.mark.parametrize("pool", ["pool", "last"])
def test_padding_is_not_pooled(pool):
    torch.manual_seed(0)
    model = S5Classifier(6, 1, 3, 4, pool=pool, d_state=8).eval()
    x = torch.randn(2, 10, 3)
    lengths = torch.tensor([10, 6])
    found = model(x, lengths)
    torch.testing.assert_close(found[1:], model(x[1:, :6]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S5(4, d_state=10, blocks=2), "d_state 10 does not divide into 2 blocks of conjugate pairs"),
        (lambda: S5(4, d_state=10, blocks=3, conj_sym=False), "d_state 10 does not divide into 3 blocks$"),
        (lambda: S5(4, discretization="euler"), "discretization 'euler' is not one of zoh, bilinear"),
        (lambda: S5(4, C_init="zeros"), "C_init 'zeros'"),
        (lambda: S5(4, bidirectional=True)(torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool)), "no past"),
        (lambda: S5(4, bidirectional=True).step(torch.zeros(1, 4), torch.zeros(1, 32)), "cannot run step by step"),
        (lambda: S5Layer(4, activation="relu"), "activation 'relu' is not one of"),
        (lambda: S5Layer(4, norm="group"), "norm 'group' is not"),
        (lambda: S5Classifier(4, 1, 2, 3, pool="max"), "pool 'max' is not"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
