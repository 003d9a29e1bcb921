"""S4ND: the golden case; separable kernels against plain convolution in one to three dimensions."""

import itertools
from pathlib import Path

import pytest
import torch

from ssmvision.engine.verify import verify_case
from ssmvision.layers.s4 import S4Conv
from ssmvision.layers.s4nd import S4ND

PARITY = Path(__file__).parents[1] / "parity"
GRIDS = {1: (9,), 2: (5, 4), 3: (3, 4, 2)}


def make(spatial_dims, **kwargs):
    torch.manual_seed(0)
    options = {"d_state": 8, "mode": "s4d", "init": "inv", "dtype": torch.float64} | kwargs
    return S4ND(3, spatial_dims, **options)


def test_golden_case():
    result = verify_case(PARITY / "ssm_s4nd")
    assert result.ok, str(result)
    assert set(result.worst) == {"output", "gradient"}


def weight(layer, c, offset):
    """What a place `offset` before another adds to it, by channel and rank."""
    product = 1
    for axis, distance in enumerate(offset):
        kernel = layer.kernel[axis](9)[0].unflatten(0, (-1, layer.trank, layer.channels))[:, :, c]
        if distance < 0 and not layer.bidirectional:
            return torch.zeros(3, dtype=torch.float64)
        product = product * (kernel[0, ..., distance] if distance >= 0 else kernel[1, ..., -1 - distance])
    return product.mean(0)


@pytest.mark.parametrize("options", [{}, {"bidirectional": False}, {"trank": 2, "channels": 2}], ids=str)
@pytest.mark.parametrize("spatial_dims", GRIDS)
def test_against_plain_convolution(spatial_dims, options):
    layer = make(spatial_dims, linear=True, **options)
    x = torch.randn(1, 3, *GRIDS[spatial_dims], dtype=torch.float64)
    places = list(itertools.product(*map(range, GRIDS[spatial_dims])))
    with torch.no_grad():
        found = layer(x).unflatten(1, (layer.channels, 3))
        for c, to in itertools.product(range(layer.channels), places[:: len(places) // 4]):
            wanted = layer.D[c] * x[(0, slice(None), *to)]
            for origin in places:
                offset = tuple(a - b for a, b in zip(to, origin, strict=True))
                wanted = wanted + weight(layer, c, offset) * x[(0, slice(None), *origin)]
            torch.testing.assert_close(found[(0, c, slice(None), *to)], wanted, rtol=1e-9, atol=1e-10)


def test_one_axis_is_s4():
    layer = make(1, linear=True, mode="dplr", init="legs")
    one = S4Conv(3, d_state=8, bidirectional=True, activation=None, dtype=torch.float64)
    one.load_state_dict({name.replace("kernel.0", "kernel"): t for name, t in layer.state_dict().items()})
    x = torch.randn(2, 3, 11, dtype=torch.float64)
    torch.testing.assert_close(layer(x), one(x), rtol=1e-9, atol=1e-10)


def test_channels_last_and_another_width():
    first, last = make(2, out_chans=5), make(2, out_chans=5, transposed=False)
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    assert first(x).shape == (2, 5, 5, 4)
    torch.testing.assert_close(last(x.movedim(1, -1)).movedim(-1, 1), first(x))


def test_half_the_resolution_at_twice_the_rate_is_nearly_the_same():
    layer = make(2, linear=True, bidirectional=False, bandlimit=0.5)
    axis = torch.linspace(0, 3, 64, dtype=torch.float64)
    image = (axis[:, None].sin() + (2 * axis).cos()).expand(1, 3, 64, 64)
    with torch.no_grad():
        wanted, found = layer(image)[..., 1::2, 1::2], layer(image[..., 1::2, 1::2], rate=2.0)
        unscaled = layer(image[..., 1::2, 1::2])
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    assert (unscaled - wanted).norm() > 2 * (found - wanted).norm()


def test_bandlimit_drops_what_would_alias():
    layer = make(1, linear=True, bandlimit=0.0)
    x = torch.randn(1, 3, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.D[0, :, None] * x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["dplr", "s4d"])
def test_every_parameter_learns(mode):
    layer = make(3, mode=mode, init="legs", dtype=torch.float32)
    layer(torch.randn(1, 3, 3, 4, 5)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("mode", ["dplr", "s4d"])
def test_nothing_gives_nothing(mode):
    assert make(2, mode=mode, init="legs", channels=2)(torch.zeros(2, 3, 0, 5).double()).shape == (2, 3, 0, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: S4ND(4, 4), ValueError, "spatial_dims 4 is not 1, 2 or 3"),
        (lambda: S4ND(4, mode="fast"), ValueError, "mode 'fast' is not"),
        (lambda: S4ND(4)(torch.zeros(1, 4, 5)), RuntimeError, "expected 2 spatial axes"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
