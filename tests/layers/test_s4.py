"""S4D and S4: golden cases, and that kernels, steps and states tell one story."""

from pathlib import Path

import pytest
import torch

from ssmvision.engine.verify import verify_case
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


def stepped(layer, x, state):
    outputs = []
    for token in x.unbind(-1):
        y, state = layer.step(token, state)
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


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [S4DKernel, S4Kernel])
def test_long_sequences_in_float32(kernel):
    torch.manual_seed(0)
    layer = kernel(4, d_state=32)
    x = torch.randn(1, 4, 4096)
    with torch.no_grad():
        wanted = fft_conv(x, layer(4096)[0])
        state, outputs = layer.initial_state(1), []
        system = layer.recurrence() if kernel is S4Kernel else None
        for token in x.unbind(-1):
            y, state = recur(token, state, *system) if system else layer.step(token, state)
            outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, -1), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


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
            lambda: S4Block(4, bidirectional=True).step(torch.zeros(1, 4), torch.zeros(1, 4, 32)),
            "bidirectional layer cannot run step by step",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
