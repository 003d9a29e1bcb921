"""FrameNorm is nn.GroupNorm, for few and for many pictures."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from ssmvision.layers.frame_norm import FrameNorm


def pictures(count: int, channels: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(count, channels, 3, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)


def norm(groups: int, channels: int) -> FrameNorm:
    layer = FrameNorm(groups, channels, eps=1e-6)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("count", [1, 8, 9, 40])
@pytest.mark.parametrize(("groups", "channels"), [(8, 8), (2, 8), (1, 6)])
def test_it_is_group_norm(count: int, groups: int, channels: int) -> None:
    layer, x = norm(groups, channels).double(), pictures(count, channels, torch.float64).requires_grad_()
    wanted = F.group_norm(x, groups, layer.weight, layer.bias, 1e-6)
    found = layer(x)
    torch.testing.assert_close(found, wanted)
    leaves, upstream = (x, layer.weight, layer.bias), torch.randn_like(x)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_gradients() -> None:
    layer, x = norm(2, 4).double(), pictures(9, 4, torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(lambda *args: functional_call(layer, {"weight": args[0]}, x), (layer.weight,))


def test_many_pictures_stay_channels_last() -> None:
    found = norm(8, 8)(pictures(20, 8))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0])
def test_it_is_as_exact_as_the_other_in_float32(scale: float) -> None:
    """Around a mean of one; pictures of one color have a variance of nothing, never less."""
    layer, x = norm(4, 8), 1 + scale * pictures(20, 8)
    exact = F.group_norm(x.double(), 4, layer.weight.double(), layer.bias.double(), 1e-6)
    error, other = ((y - exact).abs().max() for y in (layer(x), F.group_norm(x, 4, layer.weight, layer.bias, 1e-6)))
    assert error <= max(2 * other, torch.tensor(1e-5))


def test_other_types_run_as_torch_runs_them() -> None:
    layer, x = norm(4, 8).bfloat16(), pictures(20, 8, torch.bfloat16)
    assert torch.equal(layer(x), F.group_norm(x, 4, layer.weight, layer.bias, 1e-6))
