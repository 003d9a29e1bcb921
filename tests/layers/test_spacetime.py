"""SpaceTime: the golden case; kernels, steps and closed loops agree; accuracy where the official kernel loses it."""

import itertools
from pathlib import Path

import pytest
import torch

from ssmvision.engine.verify import verify_case
from ssmvision.layers.spacetime import (
    ClosedLoopSSM,
    CompanionSSM,
    FixedKernelSSM,
    ShiftSSM,
    differencing_kernels,
    moving_average_residual_kernels,
)

PARITY = Path(__file__).parents[1] / "parity"


def test_golden_case():
    result = verify_case(PARITY / "ssm_spacetime_companion")
    assert result.ok, str(result)
    assert set(result.worst) == {"output", "gradient"}


def stepped(layer, x):
    state, outputs = layer.initial_state(len(x)), []
    for token in x.unbind(1):
        y, state = layer.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("make", [CompanionSSM, ShiftSSM, ClosedLoopSSM])
@pytest.mark.parametrize("options", [{}, {"n_heads": 2, "head_dim": 2, "norm_order": 2}, {"skip_connection": False}])
def test_steps_equal_the_convolution(make, options):
    torch.manual_seed(0)
    layer = make(8, 2, 5, dtype=torch.float64, **options)
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    torch.testing.assert_close(stepped(layer, x)[0], layer(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [CompanionSSM, ShiftSSM, ClosedLoopSSM])
def test_packed_clips_equal_clips_alone_and_step_by_step(make):
    torch.manual_seed(0)
    layer = make(4, 2, 5, dtype=torch.float64)
    x, reset = torch.randn(2, 30, 4, dtype=torch.float64), torch.rand(2, 30) < torch.tensor([[0.1], [0.6]])
    packed = layer(x, reset)
    for tokens, found, begins in zip(x, packed, reset, strict=True):
        cuts = sorted({0, *begins.nonzero().flatten().tolist(), len(tokens)})
        for first, last in itertools.pairwise(cuts):
            clip = tokens[None, first:last]
            for alone in (layer(clip), stepped(layer, clip)[0]):
                torch.testing.assert_close(found[None, first:last], alone, rtol=1e-9, atol=1e-10)


def test_the_whole_layer_compiles():
    torch.manual_seed(0)
    layer, x = ClosedLoopSSM(4, 2, 5), torch.randn(2, 9, 4)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_vectors_that_vanish_stay_as_they_are():
    layer = CompanionSSM(2, 2, 3)
    torch.nn.init.zeros_(layer.a)
    layer(torch.randn(1, 5, 2)).square().sum().backward()
    assert layer.a.grad.isfinite().all()
    torch.testing.assert_close(layer.normalized(layer.a), torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.slow
def test_long_sequences_in_float32():
    torch.manual_seed(0)
    layer = CompanionSSM(4, 4, 64)
    x = torch.randn(1, 4096, 4)
    with torch.no_grad():
        wanted = layer(x)
        torch.testing.assert_close(stepped(layer, x)[0], wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_states_that_hardly_decay_keep_their_accuracy():
    """a = e_{n-1} makes A a rotation, A^l never small."""
    layer = CompanionSSM(2, 2, 6)
    with torch.no_grad():
        layer.a.zero_()[:, 0] = 1
    kernel = layer.kernel(600).detach()
    torch.testing.assert_close(kernel, kernel[:, :6].repeat(1, 100), rtol=0, atol=0)


def test_normalized_states_do_not_grow():
    torch.manual_seed(0)
    kernel = CompanionSSM(8, 8, 16).kernel(5000).detach()
    assert kernel[:, -100:].abs().max() <= 2 * kernel[:, :100].abs().max()


def test_shift_is_a_finite_impulse_response():
    torch.manual_seed(0)
    layer = ShiftSSM(2, 2, 4)
    torch.testing.assert_close(layer.kernel(9), torch.nn.functional.pad(layer.c, (0, 5)).double())
    assert not layer.a.requires_grad
    assert not layer.b.requires_grad


def test_forecast_continues_the_open_loop():
    """With normalized vectors, the loop's outputs are those of the open loop fed with its own predictions."""
    torch.manual_seed(0)
    layer = ClosedLoopSSM(3, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        for vector in (layer.b, layer.k):
            vector.copy_(layer.normalized(vector))
        x = torch.randn(2, 12, 3, dtype=torch.float64)
        y, inputs = layer.forecast(x, 6)
        extended = torch.cat([x, inputs[:, :-1]], 1)
        found_y, found_inputs = layer.open_loop(extended)
    torch.testing.assert_close(y, found_y[:, 11:], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(inputs, found_inputs[:, 11:], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(stepped(layer, extended)[0], found_y, rtol=1e-9, atol=1e-10)


def test_fixed_kernels():
    ramp = torch.arange(20.0)[None, :, None].expand(1, 20, 4)
    differences = FixedKernelSSM(4, differencing_kernels(4, 6))(ramp)[0, 5:]
    torch.testing.assert_close(differences[:, 1:], torch.tensor([1.0, 0, 0]).expand(15, 3), rtol=0, atol=1e-5)
    residual = FixedKernelSSM(4, moving_average_residual_kernels([1, 3], 8))(ramp)[0, 5:]
    torch.testing.assert_close(residual, torch.tensor([0.0, 1, 0, 1]).expand(15, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CompanionSSM(10, 4, 3), "10 channels are no multiple of 4 kernels for 1 channels each"),
        (lambda: FixedKernelSSM(5, torch.zeros(2, 3)), "5 channels are no multiple of 2 kernels"),
        (lambda: differencing_kernels(4, 2), "differences of order 3 need kernels longer than 2"),
        (lambda: moving_average_residual_kernels([9], 8), "a window of 9 tokens"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
