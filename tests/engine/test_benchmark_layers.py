"""The measurements of layers compare what they say they compare."""

import pytest

from ssmvision.engine.benchmark import convs5_memory, layers


def test_every_figure_is_measured() -> None:
    found = layers.s4d(1, batch=1, dim=4, length=64) | layers.s5(1, batch=1, dim=8, length=64)
    assert min(found.values()) > 0
    assert {"S4D / bare FFT convolution", "S5's scan / copy of its bytes"} <= found.keys() & layers.BARS.keys()
    ratios = layers.packed(1)
    assert ratios.keys() == {"S5", "Mamba", "Mamba-2", "ConvS5"}
    assert min(ratios.values()) > 0


def test_the_scan_is_a_small_share_of_a_convs5_layer() -> None:
    assert 0 < layers.scan_share() <= layers.BARS["scan share of ConvS5"].limit


def test_training_a_scan_needs_its_output_and_one_gradient() -> None:
    states = convs5_memory()
    assert states == pytest.approx(2, abs=0.5)
