"""Recurrent layers: steps and pieces give what the whole sequence gives, packed sequences what each gives alone."""

import itertools
import random

import pytest
import torch

from ssmvision.layers import (
    S5,
    ClosedLoopSSM,
    CompanionSSM,
    ConvS5,
    Hierarchical,
    HierarchicalTemporalMamba,
    Level,
    Mamba,
    Mamba2,
    Mamba3,
    MambaStack,
    S4Stack,
)
from ssmvision.layers.s5 import S5Encoder

LAYERS = {
    "Mamba": lambda: Mamba(8, d_state=3, d_conv=3, dt_rank=2, bias=True),
    "Mamba without a window": lambda: Mamba(8, d_state=3, d_conv=1, conv_bias=False),
    "Mamba2": lambda: Mamba2(8, d_state=3, headdim=4, ngroups=2),
    "Mamba2 partly scanned": lambda: Mamba2(8, d_state=3, d_conv=2, headdim=4, d_ssm=8, D_has_hdim=True, bias=True),
    "Mamba2 without norm": lambda: Mamba2(8, d_state=3, headdim=4, rmsnorm=False, dt_limit=(0.01, 0.05)),
    "Mamba2 gated after its norm": lambda: Mamba2(8, d_state=3, headdim=8, norm_before_gate=True, conv_bias=False),
    "Mamba3": lambda: Mamba3(8, d_state=6, headdim=4, ngroups=2),
    "Mamba3 without rotation": lambda: Mamba3(8, d_state=6, headdim=8, rope_fraction=0.0),
    "MambaStack": lambda: MambaStack(8, 2, d_state=3),
    "HierarchicalTemporalMamba": lambda: HierarchicalTemporalMamba(8, 3),
    "Level": lambda: Level(MambaStack(4, 1, d_state=2), 4, in_dim=8, out_dim=3),
}
SEEDS = range(4)


def sample(name, seed, shape=None):
    """A layer in which everything has an effect, and tokens (b, l, 8) of a shape (b, l)."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer, torch.randn(*(shape or (draw.randint(1, 3), draw.randint(1, 40))), 8)


def starts(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.2


def run_steps(layer, x, state=None):
    state, outputs = layer.initial_state(len(x)) if state is None else state, []
    for token in x.unbind(1):
        y, state = layer.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, 1)


def run_pieces(layer, x, cuts, reset=None):
    """The outputs and the last state of pieces, each after the state of the one before."""
    state, outputs = None, []
    for first, last in itertools.pairwise([0, *cuts, x.shape[1]]):
        y, state = layer.run(x[:, first:last], state, None if reset is None else reset[:, first:last])
        outputs.append(y)
    return torch.cat(outputs, 1), state


def leaves(state):
    """The tensors of a state, which is one or several or several such, without those of no numbers."""
    if isinstance(state, torch.Tensor):
        return [state] if state.numel() else []
    return [leaf for part in state for leaf in leaves(part)]


def assert_near(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_steps_give_the_whole(name, seed):
    layer, x = sample(name, seed)
    torch.testing.assert_close(run_steps(layer, x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_packed_sequences_are_those_alone(name, seed):
    layer, x = sample(name, seed)
    reset = starts(x.shape[:2], seed)
    packed = layer(x, reset=reset)
    for tokens, found, begins in zip(x, packed, reset, strict=True):
        cuts = sorted({0, *begins.nonzero().flatten().tolist(), len(tokens)})
        for first, last in itertools.pairwise(cuts):
            alone = run_steps(layer, tokens[None, first:last])[0]
            torch.testing.assert_close(found[first:last], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 7, 300])
def test_pieces_give_the_whole(name, length, packed):
    layer, x = sample(name, length, (2, length))
    reset = starts(x.shape[:2], length) if packed else None
    with torch.no_grad():
        whole, last = layer.run(x, reset=reset)
        assert torch.equal(layer(x, reset), whole)
        cuts = sorted(random.Random(length).choices(range(length + 1), k=3))  # of short and empty pieces, too
        pieces, state = run_pieces(layer, x, cuts, reset)
        assert_near(pieces, whole)
        for found, wanted in zip(leaves(state), leaves(last), strict=True):
            assert_near(found, wanted)


def test_hooks_see_the_layers_of_a_stack():
    """What looks into models, or wraps their parts, hooks into calls; `forward` must make them."""
    layer, x = sample("Level", 0, (2, 7))
    parts = [layer.net, *layer.net.layers, *(block.mixer for block in layer.net.layers)]
    called = []
    for part in parts:
        part.register_forward_hook(lambda part, *_: called.append(part))
    layer(x)
    assert {*called} == {*parts}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 7, 300])
def test_steps_go_on_after_a_prefix(name, length, packed):
    layer, x = sample(name, length, (2, length))
    prefix, rest = x.split([length // 2, length - length // 2], 1)
    reset = starts(x.shape[:2], length) & packed
    reset[:, length // 2 :] = False
    with torch.no_grad():
        y, state = layer.run(prefix, layer.initial_state(2), reset[:, : length // 2])
        assert_near(torch.cat([y, run_steps(layer, rest, state)], 1), layer(x, reset))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("start", [3, 6, 8])
def test_a_stream_sees_nothing_before_the_latest_reset(name, start):
    layer, x = sample(name, 0, (2, 20))
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, [1, start]] = True
    with torch.no_grad():
        _, state = layer.run(x[:, :9], layer.run(torch.randn(2, 5, 8))[1], reset)
        assert_near(run_steps(layer, x[:, 9:], state), layer(x[:, start:])[:, 9 - start :])
        # A packed sequence that starts with a piece knows nothing of the state that comes with it.
        assert_near(layer.run(x, state, torch.arange(20).expand(2, -1) == 0)[0], layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_flow_through_the_state(name):
    layer, x = sample(name, 2, (2, 20))
    x.requires_grad_()
    grads = []
    for run in (layer, lambda x: run_pieces(layer, x, [9])[0]):
        y = run(x)[:, 9:]
        grads.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    assert grads[0][0][:, :9].abs().amax((0, 2)).min() > 0
    for found, wanted in zip(*grads, strict=True):
        assert_near(found, wanted, 1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_no_tokens_leave_the_state(name):
    layer, x = sample(name, 0, (2, 4))
    y, before = layer.run(x)
    nothing, after = layer.run(x[:, :0], before)
    assert nothing.shape == layer(x[:, :0]).shape == (2, 0, y.shape[2])
    for found, wanted in zip(leaves(after), leaves(before), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_states_have_one_form_and_hold_no_tokens(name, precision):
    layer, x = sample(name, 0, (2, 100))
    wanted = layer(x).detach()
    if precision == "bfloat16":
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        y, state = layer.run(x[:, :60])
        middle, state = layer.run(x[:, 60:90], state)
        steps = run_steps(layer, x[:, 90:], state)
        _, stepped = layer.step(x[:, 0], state)
        dtype = layer(x).dtype
    for given, after_run, after_step in zip(*map(leaves, (layer.initial_state(2), state, stepped)), strict=True):
        assert after_run.shape == after_step.shape == given.shape
        assert after_run.dtype == after_step.dtype == given.dtype
        assert after_run.untyped_storage().nbytes() == given.nbytes
    found = torch.cat([y, middle, steps], 1)
    assert found.dtype == dtype
    assert_near(found.float(), wanted, 1e-5 if precision == "float32" else 0.05)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Mamba3"])
def test_a_state_of_other_streams_is_named(name):
    layer, x = sample(name, 0, (2, 4))
    with pytest.raises(RuntimeError, match=r"^\w+: \w+ has shape \(3, .*, expected \(2, "):
        layer.run(x, layer.initial_state(3))


class Pixels(ConvS5):
    """ConvS5 with the tokens of the others: frames of 8 channels at 2 x 2 pixels."""

    def run(self, x, state=None, reset=None):
        y, state = super().run(x.unflatten(2, (8, 2, 2)), state, reset)
        return y.flatten(2), state

    def step(self, x, state):
        y, state = super().step(x.unflatten(1, (8, 2, 2)), state)
        return y.flatten(1), state

    def initial_state(self, batch):
        return super().initial_state(batch, 2, 2)


LONG = {
    **LAYERS,
    "S5": lambda: S5(8, d_state=32),
    "S5 bilinear": lambda: S5(8, d_state=32, discretization="bilinear"),
    "S5Encoder": lambda: S5Encoder(8, 2, d_state=16),
    "ConvS5": lambda: Pixels(8, ssm_size=16, num_groups=2),
    "S4Stack": lambda: S4Stack(8, 2, mode="s4d", d_state=16),
    "S4Stack ptd": lambda: S4Stack(8, 2, mode="s4d", d_state=16, init="ptd"),
    "CompanionSSM": lambda: CompanionSSM(8, 8, 16),
    "ClosedLoopSSM": lambda: ClosedLoopSSM(8, 8, 16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_thousands_of_steps_and_packed_clips_in_float32(name):
    torch.manual_seed(0)
    layer, clips = LONG[name](), (70, 1, 129, 4096)
    x = torch.randn(1, sum(clips), 32 if name == "ConvS5" else 8)
    reset = torch.zeros(1, sum(clips), dtype=torch.bool)
    reset[:, [70, 71, 200]] = True
    with torch.no_grad():
        packed = layer(x, reset=reset)
        for run in (layer, lambda clip: run_steps(layer, clip)):
            assert_near(packed, torch.cat([run(clip) for clip in x.split(clips, 1)], 1))
        if hasattr(layer, "run"):  # what runs as a convolution leaves no state behind
            assert_near(run_pieces(layer, x, [70, 72, 199, 3000], reset)[0], packed)


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_looks_ahead_and_the_past_matters(name):
    layer, x = sample(name, 0)
    x = torch.randn(2, 9, x.shape[2])
    y = layer(x)
    changed = x.clone()
    changed[:, 5] += torch.randn(x.shape[2])  # a constant would be lost in norms
    other = layer(changed)
    torch.testing.assert_close(other[:, :5], y[:, :5], rtol=1e-5, atol=1e-6)
    assert (other[:, 5:] - y[:, 5:]).abs().amax((0, 2)).min() > 1e-5


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_flow_through_steps_as_through_the_whole(name):
    layer, x = sample(name, 1)
    grads = []
    for run in (layer, lambda x: run_steps(layer, x)):
        layer.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("prenorm", [False, True])
def test_s4_stack_streams_and_places_its_norms(prenorm):
    torch.manual_seed(0)
    layer, x = S4Stack(6, 2, prenorm=prenorm, d_state=4), torch.randn(2, 9, 6)
    y = layer(x)
    torch.testing.assert_close(run_steps(layer, x), y, rtol=1e-4, atol=1e-5)
    normalized = y.mean(2).abs().max() < 1e-5
    assert normalized != prenorm


def hierarchy(stack=MambaStack):
    torch.manual_seed(0)
    low = Level(stack(4, 1, d_state=2), 4, in_dim=3, out_dim=6)
    return Hierarchical(low, Level(stack(6, 1, d_state=2), 6, out_dim=2), ratio=5)


def run_chunks(model, x, state=None):
    """One output per chunk, each by a step of its own."""
    state, outputs = model.initial_state(len(x)) if state is None else state, []
    for chunk in x.split(model.ratio, dim=1):
        y, state = model.step(chunk, state)
        outputs.append(y)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("stack", [MambaStack, S4Stack])
def test_hierarchy_streams_chunk_by_chunk(stack):
    model, x = hierarchy(stack), torch.randn(2, 20, 3)
    y = model(x)
    assert y.shape == (2, 4, 2)
    assert_near(run_chunks(model, x), y)


@pytest.mark.parametrize("stack", [MambaStack, S5Encoder])
def test_hierarchy_goes_on_after_whole_chunks(stack):
    model, x = hierarchy(stack), torch.randn(2, 30, 3)
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[0, [10, 20]] = reset[1, 5] = True
    with torch.no_grad():
        whole = model(x, reset)
        assert_near(run_pieces(model, x, [10, 10, 15], reset)[0], whole)
        y, state = model.run(x[:, :25], None, reset[:, :25])
        assert_near(torch.cat([y, run_chunks(model, x[:, 25:], state)], 1), whole)


@pytest.mark.parametrize("stack", [MambaStack, S5Encoder, S4Stack])
def test_packed_sequences_of_a_hierarchy_are_those_alone(stack):
    model, x = hierarchy(stack), torch.randn(2, 30, 3)
    reset = torch.zeros(2, 30, dtype=torch.bool)
    reset[0, [10, 20]] = reset[1, 5] = True
    with torch.no_grad():
        clips = [model(clip[None])[0] for clip in (x[0, :10], x[0, 10:20], x[0, 20:], x[1, :5], x[1, 5:])]
        assert_near(model(x, reset).flatten(0, 1), torch.cat(clips))


def test_packed_sequences_of_a_hierarchy_are_whole_chunks():
    model, x = hierarchy(), torch.randn(1, 20, 3)
    for run in (model, lambda x, reset: model.run(x, None, reset)):
        with pytest.raises(ValueError, match="starts within a chunk of 5 steps"):
            run(x, torch.arange(20)[None] == 6)
        with pytest.raises(RuntimeError, match=r"Hierarchical: reset has shape \(1, 4\), expected \(1, 20\)"):
            run(x, torch.zeros(1, 4, dtype=torch.bool))


def test_chunks_of_a_hierarchy_do_not_see_each_other_below():
    model, x = hierarchy(), torch.randn(1, 20, 3)
    changed = x.clone()
    changed[:, 3] += 1
    moved = (model.summarize(changed) - model.summarize(x)).abs().amax((0, 2))
    assert moved[0] > 1e-4
    assert (moved[1:] == 0).all()
    moved = (model(changed) - model(x)).abs().amax((0, 2))
    assert (moved > 1e-6).all()


def test_chunks_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="21 steps are not a multiple of the ratio 5"):
        hierarchy()(torch.randn(1, 21, 3))
    with pytest.raises(ValueError, match="at least one step, not 0"):
        Hierarchical(torch.nn.Identity(), torch.nn.Identity(), 0)
