"""S4D and S4: golden cases, and that kernels, steps, states and packed sequences tell one story."""

import itertools
from pathlib import Path

import pytest
import torch

from ssmvision.engine.verify import verify_case
from ssmvision.layers import S4Stack
from ssmvision.layers._optimizer_options import declared_options
from ssmvision.layers.s4 import S4Block, S4Kernel, recur
from ssmvision.layers.s4d import S4D, S4DKernel, sum_of_powers
from ssmvision.ops import fft_conv

PARITY = Path(__file__).parents[1] / "parity"
LAYERS = {
    "S4D": lambda **dd: S4D(6, d_state=8, **dd),
    "S4Block s4d": lambda **dd: S4Block(6, mode="s4d", d_state=8, init="inv", **dd),
    "S4Block s4d bilinear": lambda **dd: S4Block(
        6, mode="s4d", d_state=8, disc="bilinear", channels=2, real_transform="softplus", dt_tie=False, n_ssm=3, **dd
    ),
    "S4Block ptd": lambda **dd: S4Block(6, mode="s4d", d_state=16, init="ptd", **dd),
    "S4Block ptd bilinear": lambda **dd: S4Block(6, mode="s4d", d_state=16, init="ptd", disc="bilinear", **dd),
    "S4Block dplr": lambda **dd: S4Block(6, d_state=8, **dd),
    "S4Block bandlimit": lambda **dd: S4Block(6, d_state=16, bandlimit=0.1, dt_min=0.05, **dd),
    "S4Block legt": lambda **dd: S4Block(
        6, d_state=8, init="legt", rank=2, n_ssm=2, final_act="gelu", channels=2, **dd
    ),
}


@pytest.mark.parametrize(
    "case", ["ssm_s4d_kernels", "ssm_s4d_minimal", "ssm_s4_dplr", "ssm_s4_block", "ssm_s4_block_dplr"]
)
def test_golden_case(case):
    result = verify_case(PARITY / case)
    assert result.ok, str(result)
    assert set(result.worst) >= {"output", "gradient"}


def stepped(layer, x, state, **options):
    outputs = []
    for token in x.unbind(-1):
        y, state = layer.step(token, state, **options)
        outputs.append(y)
    return torch.stack(outputs, -1), state


@pytest.mark.parametrize("name", LAYERS)
def test_steps_equal_the_convolution(name):
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=torch.float64).eval()
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(x)
        found, _ = stepped(layer, x, layer.initial_state(2))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "S4D"])
def test_a_sequence_may_be_cut(name):
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=torch.float64).eval()
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(x)
        _, state = stepped(layer, x[..., :10], layer.initial_state(2))
        torch.testing.assert_close(layer(x[..., 10:], state=state), wanted[..., 10:], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rate", [0.5, 0.3, 2.0])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "S4D"])
def test_steps_equal_the_convolution_at_another_rate(name, rate):
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=torch.float64).eval()
    x = torch.randn(2, 6, 25, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(x, rate)
        found, _ = stepped(layer, x, layer.initial_state(2), rate=rate)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
        _, state = stepped(layer, x[..., :10], layer.initial_state(2), rate=rate)
        torch.testing.assert_close(layer(x[..., 10:], rate, state), wanted[..., 10:], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_clips_equal_clips_alone_and_step_by_step(name):
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=torch.float64).eval()
    x, reset = torch.randn(3, 6, 40, dtype=torch.float64), torch.rand(3, 40) < torch.tensor([[0.0], [0.1], [0.5]])
    with torch.no_grad():
        packed = layer(x, reset=reset)
        for tokens, found, begins in zip(x, packed, reset, strict=True):
            cuts = sorted({0, *begins.nonzero().flatten().tolist(), tokens.shape[-1]})
            for first, last in itertools.pairwise(cuts):
                clip = tokens[None, :, first:last]
                for alone in (layer(clip), stepped(layer, clip, layer.initial_state(1))[0]):
                    torch.testing.assert_close(found[None, :, first:last], alone, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(layer(x), packed, atol=1e-3)


@pytest.mark.parametrize("mode", ["s4d", "dplr"])
def test_a_kernel_that_ends_equals_steps_up_to_there(mode):
    torch.manual_seed(0)
    layer, x = S4Block(4, mode=mode, d_state=8, l_max=10).double().eval(), torch.randn(2, 4, 30, dtype=torch.float64)
    start = torch.randn(2, 4, 4, dtype=torch.complex128)
    steps, _ = stepped(layer, x, start)
    torch.testing.assert_close(layer(x, state=start)[..., :10], steps[..., :10])
    assert not torch.allclose(layer(x)[..., 10:], stepped(layer, x, layer.initial_state(2))[0][..., 10:])


def test_packed_clips_of_a_stack_and_of_both_directions():
    torch.manual_seed(0)
    x, reset = torch.randn(1, 30, 6), torch.isin(torch.arange(30), torch.tensor([7, 8, 20]))[None]
    for layer in (S4Stack(6, 2, d_state=8), S4Block(6, transposed=False, bidirectional=True, mode="s4d", l_max=5)):
        alone = torch.cat([layer(clip) for clip in x.split((7, 1, 12, 10), 1)], 1)
        torch.testing.assert_close(layer(x, reset=reset), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_packed_clips_are_those_of_clips_alone(name):
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=torch.float64)
    x, lengths = torch.randn(1, 6, 20, dtype=torch.float64), (9, 1, 10)
    reset = torch.isin(torch.arange(20), torch.tensor([9, 10]))[None]
    layer(x)  # converts what a fresh S4 has to convert
    grads = []
    for run in (lambda x: layer(x, reset=reset), lambda x: torch.cat([layer(y) for y in x.split(lengths, -1)], -1)):
        layer.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9 * wanted.abs().max().item())


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "S4D"])
def test_a_state_lasts_until_the_first_reset(name):
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=torch.float64).eval()
    x, reset = torch.randn(2, 6, 12, dtype=torch.float64), torch.arange(12).expand(2, -1) == torch.tensor([[5], [0]])
    with torch.no_grad():
        _, state = stepped(layer, torch.randn_like(x), layer.initial_state(2))
        found, fresh = layer(x, state=state, reset=reset), layer(x, reset=reset)
        torch.testing.assert_close(found[:1, :, :5], layer(x[:1, :, :5], state=state[:1]), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found[:1, :, 5:], fresh[:1, :, 5:])
    torch.testing.assert_close(found[1:], fresh[1:])


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_gives_nothing(name):
    layer = LAYERS[name]()
    assert layer(torch.zeros(2, 6, 0)).shape == (2, 6, 0)
    assert layer(torch.zeros(2, 6, 0), reset=torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 6, 0)
    if name != "S4D":
        assert layer(torch.zeros(2, 6, 1), rate=0.2).isfinite().all()
        assert layer(torch.zeros(2, 6, 0), state=layer.initial_state(2)).shape == (2, 6, 0)
        assert layer(torch.zeros(2, 6, 3)).isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_streams_too(name):
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=torch.bfloat16).eval()
    x = torch.randn(2, 6, 12, dtype=torch.bfloat16)
    with torch.no_grad():
        found, _ = stepped(layer, x, layer.initial_state(2))
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, layer(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["S4D", "S4Block s4d", "S4Block dplr"])
def test_autocast_leaves_kernels_alone(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    kernel = layer.kernel if name == "S4D" else layer.layer.kernel
    plain = kernel(50)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(kernel(50), plain, rtol=0, atol=0)


def long_kernels():
    yield "diagonal", lambda: S4DKernel(4, d_state=32)
    yield "low rank", lambda: S4Kernel(4, d_state=32)
    for n in (16, 64):
        for disc in ("zoh", "bilinear"):
            yield f"ptd {n} {disc}", lambda n=n, disc=disc: S4DKernel(4, n, init="ptd", disc=disc)


LONG = dict(long_kernels())


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_long_sequences_in_float32(name):
    torch.manual_seed(0)
    layer = LONG[name]()
    x = torch.randn(1, 4, 4096)
    with torch.no_grad():
        wanted = fft_conv(x, layer(4096)[0])
        state, outputs = layer.initial_state(1), []
        system = layer.recurrence() if isinstance(layer, S4Kernel) else None
        for token in x.unbind(-1):
            y, state = recur(token, state, *system) if system else layer.step(token, state)
            outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, -1), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
def test_ptd_streams_in_float32_wherever_it_is_loaded(disc):
    torch.manual_seed(0)
    options = {"mode": "s4d", "d_state": 16, "init": "ptd", "disc": disc, "final_act": None, "activation": None}
    trained, layer, x = S4Block(16, **options), S4Block(16, **options), torch.randn(2, 16, 300)
    layer.load_state_dict(trained.state_dict())
    with torch.no_grad():
        wanted = trained(x)
        torch.testing.assert_close(layer(x), wanted, rtol=0, atol=0)
        found, _ = stepped(layer, x, layer.initial_state(2))
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("shape", [(), (1,)])
def test_official_lengths_of_kernels_have_either_shape(shape):
    torch.manual_seed(0)
    trained, layer = S4Block(4, d_state=8), S4Block(4, d_state=8)
    x = torch.randn(1, 4, 10)
    wanted, state = trained(x), trained.state_dict()
    layer.load_state_dict({**state, "layer.kernel.l_kernel": torch.tensor(10).reshape(shape)})
    torch.testing.assert_close(layer(x), wanted)
    assert layer.state_dict()["layer.kernel.l_kernel"].shape == (1,)


@pytest.mark.slow
def test_a_layer_streams_thousands_of_tokens():
    torch.manual_seed(0)
    layer, x = S4D(4, d_state=32), torch.randn(1, 4, 4096)
    with torch.no_grad():
        wanted, state, outputs = layer(x), layer.initial_state(1), []
        for token in x.unbind(-1):
            y, state = layer.step(token, state)
            outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, -1), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 100])
def test_sums_of_powers_are_sums_of_powers(length):
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 4, dtype=torch.complex128, requires_grad=True)
    log_A = torch.complex(-torch.rand(3, 4).double(), torch.randn(3, 4).double()).requires_grad_()
    wanted = (weights[..., None] * torch.exp(log_A[..., None] * torch.arange(length))).sum(-2).real
    found = sum_of_powers(weights, log_A, length)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    for x, y in zip(*(torch.autograd.grad(z, (weights, log_A), upstream) for z in (found, wanted)), strict=True):
        torch.testing.assert_close(x, y)


def test_longer_sequences_double_the_kernel():
    torch.manual_seed(0)
    kernel = S4Kernel(3, d_state=8, dtype=torch.float64)
    short, _ = kernel(10)
    assert kernel.l_kernel.item() == 10
    long, _ = kernel(35)
    assert kernel.l_kernel.item() == 40
    torch.testing.assert_close(long[..., :10], short, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_learns_and_dynamics_have_their_own_options(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    layer(torch.randn(2, 6, 12)).square().sum().backward()
    declared = declared_options(layer)
    for key, p in layer.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        dynamics = any(part in key for part in ("dt", "A_", "kernel.B", "kernel.P"))
        skip = {"weight_decay": 0.0} if key.rpartition(".")[2] == "D" else None
        assert declared.get(p) == ({"lr": 1e-3, "weight_decay": 0.0} if dynamics else skip), key


@pytest.mark.parametrize("init", ["lin", "inv", "real", "legs"])
def test_kernels_decay(init):
    torch.manual_seed(0)
    kernel, _ = S4DKernel(8, d_state=16, init=init, dt_min=0.05)(2000)
    assert kernel[..., -200:].abs().max() < 1e-2 * kernel.abs().max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: S4DKernel(4, d_state=5), "d_state 5 is odd"),
        (lambda: S4DKernel(4, n_ssm=3), "4 channels cannot share 3 copies"),
        (lambda: S4DKernel(4, disc="euler"), "disc 'euler' is not"),
        (lambda: S4DKernel(4, real_transform="abs"), "no transform 'abs'"),
        (lambda: S4Block(4, mode="fast"), "mode 'fast' is not"),
        (lambda: S4Block(4, activation="step"), "no activation 'step'"),
        (lambda: S4DKernel(4, disc="dss").step(torch.zeros(1, 4), torch.zeros(1, 4, 32)), "cannot run step by step"),
        (
            lambda: S4Block(4, mode="s4d", disc="dss")(torch.zeros(1, 4, 3), reset=torch.ones(1, 3, dtype=torch.bool)),
            "disc='dss' takes no resets",
        ),
        (
            lambda: S4Block(4, bidirectional=True).step(torch.zeros(1, 4), torch.zeros(1, 4, 32)),
            "bidirectional layer cannot run step by step",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        (torch.zeros(2, 9, dtype=torch.bool), r"reset has shape \(2, 9\), expected \(2, 10\)"),
        (torch.zeros(2, 10), "reset must be bool, not torch.float32"),
    ],
)
def test_wrong_resets_are_named(reset, message):
    with pytest.raises(RuntimeError, match=message):
        S4D(4)(torch.zeros(2, 4, 10), reset=reset)
