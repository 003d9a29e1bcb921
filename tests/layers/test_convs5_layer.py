"""ConvS5 and what it is measured against: one frame at a time equals all at once, and clips do not see each other."""

import pytest
import torch
import torch.nn.functional as F

from ssmvision.layers import ConvLSTM, ConvS5
from ssmvision.layers import convs5 as convs5_module
from ssmvision.layers.causal_transformer import CausalTransformer
from ssmvision.layers.hippo import nplr
from ssmvision.ops import linear_scan

SIZE = (3, 4)


def convs5(**kwargs) -> ConvS5:
    torch.manual_seed(0)
    return ConvS5(8, **{"ssm_size": 8, "ssm_blocks": 2, "num_groups": 2, **kwargs})


def convlstm() -> ConvLSTM:
    torch.manual_seed(0)
    return ConvLSTM(8)


def frames(length: int) -> torch.Tensor:
    return torch.randn(2, length, 8, *SIZE)


def parts(state) -> tuple[torch.Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def stepwise(layer, u: torch.Tensor, state):
    outputs = []
    for frame in u.unbind(1):
        y, state = layer.step(frame, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("length", [1, 7, 300])
@pytest.mark.parametrize("layer", [convs5(), convs5(feedthrough="standard"), convs5(feedthrough="half_glu")])
@pytest.mark.parametrize("grad", [True, False], ids=["differentiable", "native"])
def test_steps_equal_the_scan(layer: ConvS5, length: int, grad: bool) -> None:
    u, start = frames(length), torch.randn(2, 4, *SIZE, dtype=torch.complex64)
    with torch.set_grad_enabled(grad):
        assert_steps_equal_the_scan(layer, u, start)


def assert_steps_equal_the_scan(layer: ConvS5, u: torch.Tensor, start: torch.Tensor) -> None:
    for state in (start, layer.initial_state(2, *SIZE)):
        y, last = layer.run(u, state)
        steps, stepped = stepwise(layer, u, state)
        torch.testing.assert_close(steps, y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stepped, last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.run(u, layer.initial_state(2, *SIZE))[0], layer(u))


@pytest.mark.parametrize("layer", [convs5(), convlstm()], ids=["convs5", "convlstm"])
def test_packed_clips_equal_clips_run_alone(layer) -> None:
    u = frames(9)
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[0, [0, 4]] = reset[1, [2, 8]] = True
    u.requires_grad_()
    y, last = layer.run(u, reset=reset)
    clips = [(0, 0, 4), (0, 4, 9), (1, 0, 2), (1, 2, 8), (1, 8, 9)]
    alone = {clip: layer.run(u[clip[0], clip[1] : clip[2]][None]) for clip in clips}
    for (row, start, stop), (clip, _) in alone.items():
        torch.testing.assert_close(y[row, start:stop], clip[0], rtol=1e-5, atol=1e-6)
    ends = [parts(alone[clip][1]) for clip in clips if clip[2] == 9]
    for found, *wanted in zip(parts(last), *ends, strict=True):
        torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(y[0, 4:].square().sum(), u)
    assert gradient[0, 4:].abs().amax((1, 2, 3)).all()
    assert not gradient[0, :4].any(), "no gradient flows into the clip before"


@pytest.mark.parametrize("layer", [convs5(), convlstm()], ids=["convs5", "convlstm"])
def test_a_sequence_in_two_parts(layer) -> None:
    u = frames(8)
    whole, last = layer.run(u)
    first, state = layer.run(u[:, :3])
    second, end = layer.run(u[:, 3:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(parts(end), parts(last), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_one_real_convolution_is_the_complex_one() -> None:
    layer, u = convs5(feedthrough="standard").double(), frames(1).double()
    A, B, C = layer.discretized()
    state = torch.nn.functional.conv2d(u[:, 0].to(B), B, padding=1)
    y = 2 * torch.nn.functional.conv2d(state, C, padding=1).real
    out, last = layer.run(u)
    torch.testing.assert_close(last, state)
    torch.testing.assert_close(out[:, 0], layer.feedthrough(y, u[:, 0]))
    assert A.shape == (4, 1, 1)
    assert A.abs().max() < 1


def test_nothing_is_copied_between_convolutions_and_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, outputs, convolve = [], [], F.conv2d

    def conv(x, *args, **kwargs):
        inputs.append(x)
        outputs.append(convolve(x, *args, **kwargs))
        return outputs[-1]

    def scan(a, x, *args):
        assert x.data_ptr() == outputs[-1].data_ptr()
        h, last = linear_scan(a, x, *args)
        outputs.append(h)
        return h, last

    monkeypatch.setattr(convs5_module, "linear_scan", scan)
    monkeypatch.setattr(F, "conv2d", conv)
    u = frames(20).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        convs5(feedthrough="half_glu")(u.unflatten(0, (2, 20)))
    assert [x.data_ptr() for x in inputs] == [u.data_ptr(), outputs[1].data_ptr()]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in inputs)


def test_initialization_is_hippo_legs() -> None:
    Lambda, *_ = nplr("legs", 8)
    layer = convs5(ssm_size=16)
    assert torch.equal(layer.Lambda_im[:4], layer.Lambda_im[4:])
    torch.testing.assert_close(layer.Lambda_im[:4], Lambda.imag.float())
    steps = layer.log_step.exp()
    assert steps.min() >= 0.001
    assert steps.max() <= 0.1


def test_clipped_eigenvalues_stay_stable() -> None:
    layer = convs5()
    torch.nn.init.constant_(layer.Lambda_re, 1.0)
    assert layer.discretized()[0].abs().max() < 1
    layer.clip_eigs = False
    assert layer.discretized()[0].abs().min() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_state_is_at_least_complex64(dtype: torch.dtype) -> None:
    layer = convs5().to(dtype)
    y, last = layer.run(frames(3).to(dtype), layer.initial_state(2, *SIZE))
    assert y.dtype == dtype
    assert last.dtype == (torch.complex128 if dtype == torch.float64 else torch.complex64)


def test_autocast_is_close_to_float32() -> None:
    layer, u = convs5(), frames(20)
    y, last = layer.run(u)
    with torch.autocast("cpu", torch.bfloat16):
        half, state = layer.run(u)
        layer.step(u[:, 0], state)
    assert state.dtype == torch.complex64
    assert (half - y).abs().max() < 0.05 * y.abs().max()
    assert (state - last).abs().max() < 0.05 * last.abs().max()


def test_gradients_are_exact() -> None:
    layer, u = convs5(num_groups=1).double(), torch.randn(1, 3, 8, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = [layer.B, layer.C, layer.Lambda_re, layer.Lambda_im, layer.log_step]
    assert torch.autograd.gradcheck(lambda u, *_: layer(u), (u, *parameters), fast_mode=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ssm_size": 10}, r"ssm_size=10 must be a multiple of 2 \* ssm_blocks=4"),
        ({"feedthrough": "glu"}, "feedthrough must be one of resnet, standard, half_glu, not 'glu'"),
        ({"activation": "tanh"}, "activation must be one of gelu, relu, silu, elu, not 'tanh'"),
    ],
)
def test_wrong_options_are_named(kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convs5(**kwargs)


def test_a_transformer_with_a_cache_equals_one_run() -> None:
    torch.manual_seed(0)
    model, x = CausalTransformer(16, depth=2, num_heads=4, mlp_dim=32), torch.randn(2, 9, 16)
    whole, _ = model(x)
    cache, outputs = None, []
    for part in (x[:, :3], x[:, 3:4], x[:, 4:]):  # many tokens, one, and many after a cache
        y, cache = model(part, cache)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-5, atol=1e-5)
    later = x.clone()
    later[:, 5:] += 1
    torch.testing.assert_close(model(later)[0][:, :5], whole[:, :5])
    assert not torch.allclose(model(x.roll(1, dims=1))[0][:, 1:], whole[:, :-1]), "positions matter"
