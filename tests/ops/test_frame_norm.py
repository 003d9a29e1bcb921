"""`frame_norm` is group normalization and an activation: natively where it can be, in torch's operators elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ssmvision.ops import frame_norm
from ssmvision.ops.cpu import frame_norm as backend
from ssmvision.ops.frame_norm import ACTIVATIONS

SHAPES = [(1, 4, 1, 1, 2), (3, 32, 8, 8, 32), (2, 40, 5, 7, 8), (9, 6, 3, 5, 1), (2, 33, 2, 9, 3), (0, 4, 2, 2, 1)]


def arguments(n, c, h, w, dtype=torch.float32, mean=0.0):
    torch.manual_seed(0)
    x = mean + torch.randn(n, c, h, w, dtype=dtype)
    return [x.contiguous(memory_format=torch.channels_last), *(torch.randn(c, dtype=dtype) for _ in range(2))]


def meaning(x, weight, bias, groups, activation):
    y = F.group_norm(x, groups, weight, bias, 1e-6)
    functions = {
        "none": y,
        "gelu": F.gelu(y, approximate="tanh"),
        "relu": F.relu(y),
        "silu": F.silu(y),
        "elu": F.elu(y),
    }
    return functions[activation]


@pytest.fixture
def native(monkeypatch):
    """How often the native kernel ran."""
    calls, direct = [], backend.direct
    monkeypatch.setattr(backend, "direct", lambda *args: calls.append(args) or direct(*args))
    return calls


def close(found, wanted, tolerance=2e-6):
    assert found.shape == wanted.shape
    if wanted.numel():
        assert (found - wanted).abs().max() <= tolerance * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("n", "c", "h", "w", "groups"), SHAPES)
def test_values_and_gradients(n, c, h, w, groups, activation, native, threads):
    tensors = [t.requires_grad_() for t in arguments(n, c, h, w)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    y, wanted = frame_norm(*tensors, groups, 1e-6, activation), meaning(*exact, groups, activation)
    assert len(native) == 1
    close(y, wanted)
    assert y.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(y)
    gradients = (torch.autograd.grad(out, leaves, upstream.to(out)) for out, leaves in ((y, tensors), (wanted, exact)))
    for found, exact_gradient in zip(*gradients, strict=True):
        close(found, exact_gradient, 5e-6)
    assert torch.equal(frame_norm(*(t.detach() for t in tensors), groups, 1e-6, activation), y)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_layout(layout):
    x, weight, bias = arguments(2, 8, 3, 5)
    slanted = torch.randn(2, 3, 8, 10)[..., ::2].transpose(1, 2)
    for picture in (x.contiguous(memory_format=layout), slanted):
        close(frame_norm(picture, weight, bias, 2, 1e-6), meaning(picture, weight, bias, 2, "none"))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_pictures_far_from_zero(scale):
    """Pictures of one color have a variance of nothing, never less."""
    x, weight, bias = arguments(20, 8, 3, 5)
    x = 100 + scale * x
    exact = meaning(x.double(), weight.double(), bias.double(), 4, "none")
    found, usual = frame_norm(x, weight, bias, 4, 1e-6), F.group_norm(x, 4, weight, bias, 1e-6)
    error, other = ((y - exact).abs().max() for y in (found, usual))
    assert error <= max(2 * other, torch.tensor(1e-5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_run_as_torch_runs_them(dtype, native):
    x, weight, bias = arguments(3, 8, 3, 5, dtype)
    assert torch.equal(frame_norm(x, weight, bias, 4, 1e-6, "gelu"), meaning(x, weight, bias, 4, "gelu"))
    assert not native


def test_gradients_of_gradients(native):
    tensors = [t.requires_grad_() for t in arguments(2, 4, 2, 3)]
    exact = [t.detach().double().requires_grad_() for t in tensors]

    def second(run, leaves):
        first = torch.autograd.grad(run(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    found = second(lambda *args: frame_norm(*args, 2, 1e-6, "gelu"), tensors)
    assert native
    for a, b in zip(found, second(lambda *args: meaning(*args, 2, "gelu"), exact), strict=True):
        close(a, b, 1e-5)


def test_transforms_and_compilers_see_torch(native):
    x, weight, bias = arguments(3, 8, 3, 5)
    wanted = meaning(x, weight, bias, 4, "silu")
    mapped = torch.vmap(lambda x: frame_norm(x[None], weight, bias, 4, 1e-6, "silu")[0])(x)
    compiled = torch.compile(frame_norm, backend="eager", fullgraph=True)(x, weight, bias, 4, 1e-6, "silu")
    assert not native
    close(mapped, wanted)
    close(compiled, wanted)


def test_forward_mode_and_batches_of_gradients():
    x, weight, bias = arguments(2, 4, 2, 3)
    tangent = torch.randn_like(x)
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(frame_norm(forward_ad.make_dual(x, tangent), weight, bias, 2)).tangent
    with forward_ad.dual_level():
        y = F.group_norm(forward_ad.make_dual(x, tangent), 2, weight, bias)
        close(found, forward_ad.unpack_dual(y).tangent, 1e-5)
    x.requires_grad_()
    upstream = torch.randn(3, *x.shape)
    batched = torch.autograd.grad(frame_norm(x, weight, bias, 2), x, upstream, is_grads_batched=True)[0]
    for found, dy in zip(batched, upstream, strict=True):
        close(found, torch.autograd.grad(F.group_norm(x, 2, weight, bias), x, dy)[0], 1e-5)


def test_sums_of_large_pictures_lose_nothing():
    x, weight, bias = arguments(1, 8, 256, 256, mean=10.0)
    exact = meaning(x.double(), weight.double(), bias.double(), 2, "none")
    close(frame_norm(x, weight, bias, 2, 1e-6), exact, 4e-6)


def test_mistakes_are_named():
    x, weight, bias = arguments(1, 8, 2, 2)
    with pytest.raises(ValueError, match="one of none, gelu, relu, silu, elu, not 'tanh'"):
        frame_norm(x, weight, bias, 2, activation="tanh")
    with pytest.raises(RuntimeError, match=r"weight has shape \(4,\), expected \(8,\)"):
        frame_norm(x, weight[:4], bias, 2)
    with pytest.raises(RuntimeError, match="8 channels do not split into 3 groups"):
        frame_norm(x, weight, bias, 3)
