"""Recurrent layers: one token at a time gives what the whole sequence gives, packed sequences what each gives alone."""

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
    Level,
    Mamba,
    Mamba2,
    Mamba3,
    MambaStack,
    S4Stack,
)
from ssmvision.layers.s5 import S5Encoder

LAYERS = {
    "Mamba": lambda: Mamba(6, d_state=3, d_conv=3, dt_rank=2, bias=True),
    "Mamba2": lambda: Mamba2(8, d_state=3, headdim=4, ngroups=2),
    "Mamba2 partly scanned": lambda: Mamba2(8, d_state=3, d_conv=2, headdim=4, d_ssm=8, D_has_hdim=True, bias=True),
    "Mamba2 without norm": lambda: Mamba2(8, d_state=3, headdim=4, rmsnorm=False, dt_limit=(0.01, 0.05)),
    "Mamba2 gated after its norm": lambda: Mamba2(8, d_state=3, headdim=8, norm_before_gate=True, conv_bias=False),
    "Mamba3": lambda: Mamba3(8, d_state=6, headdim=4, ngroups=2),
    "Mamba3 without rotation": lambda: Mamba3(8, d_state=6, headdim=8, rope_fraction=0.0),
    "MambaStack": lambda: MambaStack(6, 2, d_state=3),
}
SEEDS = range(4)


def sample(name, seed):
    """A layer in which everything has an effect, and tokens (b, l, dim)."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    dim = 6 if name in ("Mamba", "MambaStack") else 8
    return layer, torch.randn(draw.randint(1, 3), draw.randint(1, 40), dim)


def starts(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.2


def run_steps(layer, x):
    state, outputs = layer.initial_state(len(x)), []
    for token in x.unbind(1):
        y, state = layer.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, 1)


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


class Pixels(ConvS5):
    """ConvS5 with the interface of the others: frames are tokens of 8 channels at 2 x 2 pixels."""

    def forward(self, x, reset=None):
        return super().forward(x.unflatten(2, (8, 2, 2)), reset=reset)[0].flatten(2)

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
    dim = {"Mamba": 6, "MambaStack": 6, "ConvS5": 32}.get(name, 8)
    x = torch.randn(1, sum(clips), dim)
    reset = torch.zeros(1, sum(clips), dtype=torch.bool)
    reset[:, [70, 71, 200]] = True
    with torch.no_grad():
        packed = layer(x, reset=reset)
        for run in (layer, lambda clip: run_steps(layer, clip)):
            alone = torch.cat([run(clip) for clip in x.split(clips, 1)], 1)
            torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5 * alone.abs().max().item())


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


@pytest.mark.parametrize("stack", [MambaStack, S4Stack])
def test_hierarchy_streams_chunk_by_chunk(stack):
    model, x = hierarchy(stack), torch.randn(2, 20, 3)
    y = model(x)
    assert y.shape == (2, 4, 2)
    state, outputs = model.initial_state(2), []
    for chunk in x.split(5, dim=1):
        out, state = model.step(chunk, state)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1), y, rtol=1e-4, atol=1e-5)


def test_level_streams_between_its_projections():
    low, x = hierarchy().low_level, torch.randn(2, 7, 3)
    torch.testing.assert_close(run_steps(low, x), low(x), rtol=1e-5, atol=1e-6)


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
