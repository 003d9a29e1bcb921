"""UPerNet: any pyramid, any size, every level used, and the pooled contexts are means."""

from typing import Any

import pytest
import torch
from torch import nn

import ssmvision
from ssmvision.segmentation.upernet import PooledContexts, UPerNet


@pytest.mark.parametrize("encoder", ["test_vmamba", "test_convnext", "test_resnet"])
def test_any_pyramid_is_an_encoder(encoder: str) -> None:
    torch.manual_seed(0)
    model = UPerNet(2, 2, 3, encoder, channels=8).eval()
    assert model(torch.randn(1, 2, 45, 71)).shape == (1, 3, 45, 71)
    assert model(torch.randn(1, 2, 1, 3)).shape == (1, 3, 1, 3)


def test_maps_with_the_channels_last() -> None:
    arguments = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
    model = UPerNet(2, 3, 2, "mambaout_femto", channels=8, encoder_kwargs=arguments).eval()
    assert model.channels_last
    assert model(torch.randn(1, 3, 33, 64)).shape == (1, 2, 33, 64)


def test_every_level_reaches_the_logits() -> None:
    torch.manual_seed(0)
    model = UPerNet(encoder="test_vmamba", channels=8).eval()
    maps = [
        torch.randn(1, width, 64 // step, 64 // step, requires_grad=True)
        for width, step in zip(model.widths, model.reductions, strict=True)
    ]
    logits = model.decode(maps)
    assert logits.shape == (1, 2, 64, 64)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(logits.sum(), maps))


def test_contexts_are_means_of_parts() -> None:
    contexts = PooledContexts(1, 1, scales=(1, 2)).eval()
    for context in contexts.contexts:
        nn.init.ones_(context[0].weight)
    seen: list[torch.Tensor] = []
    contexts.fuse.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(1, 1, 6, 8)
    contexts(x)
    _, whole, parts = seen[0][0] * torch.tensor([1, (1 + 1e-5) ** 0.5, (1 + 1e-5) ** 0.5]).view(3, 1, 1)
    torch.testing.assert_close(whole, x.mean().expand(6, 8))
    # The corners of an upsampled map are its own corners.
    torch.testing.assert_close(parts[0, 0], x[0, 0, :3, :4].mean())
    torch.testing.assert_close(parts[-1, -1], x[0, 0, 3:, 4:].mean())


def test_training_takes_more_than_one_image() -> None:
    model = UPerNet(encoder="test_vmamba", channels=8).train()
    with pytest.raises(ValueError, match="two images or more at a time, not on 1"):
        model(torch.randn(1, 3, 64, 64))
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 2, 64, 64)


@pytest.mark.parametrize("encoder", ["vmamba_tiny", "mambavision_tiny", "vssd_tiny", "efficientvmamba_tiny"])
def test_twin_has_as_many_parameters(encoder: str) -> None:
    networks = [ssmvision.create_model(f"upernet_{encoder}{twin}", device="meta") for twin in ("", "_nossm")]
    count, twin_count = (sum(p.numel() for p in network.parameters()) for network in networks)
    assert twin_count == pytest.approx(count, rel=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UPerNet(encoder="vmamba_enormous"), "UPerNet: there is no encoder named 'vmamba_enormous'"),
        (lambda: UPerNet(encoder="test_vit"), "must be a hierarchical backbone.*test_vit"),
        (lambda: UPerNet(3), "spatial_dims must be 2, not 3"),
        (lambda: ssmvision.create_model("test_upernet", mixer="mamba"), "mixer must be 'ssm' or 'none'"),
        (lambda: ssmvision.create_model("test_upernet").eval()(torch.zeros(1, 4, 8, 8)), "3 input channels, not 4"),
    ],
)
def test_wrong_arguments_are_told(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
