"""The generic U-Nets: every mixer trains, every size fits, and wrong names are told."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmvision
from ssmvision.segmentation.unet import MIXERS, SS3D, MixerUNet, UNet2d

SIZES = {2: (11, 14), 3: (5, 10, 6)}
NARROW = {"decoder_channels": (8, 8, 8, 8, 8)}


def _step(model: nn.Module, x: Tensor) -> list[float]:
    """Losses before and after one step of training, all of whose gradients are there."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    losses = []
    for _ in range(2):
        loss = (model(x) - 0.5).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        optimizer.step()
    return losses


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_trains_at_an_odd_size(mixer: str, spatial_dims: int) -> None:
    torch.manual_seed(0)
    model = MixerUNet(spatial_dims, 2, 3, channels=(8, 12, 16), mixer=mixer)
    x = torch.randn(2, 2, *SIZES[spatial_dims])
    assert model(x).shape == (2, 3, *SIZES[spatial_dims])
    before, after = _step(model, x)
    assert after < before


@pytest.mark.parametrize("encoder", ["test_vmamba", "test_convnext", "test_resnet"])
def test_any_pyramid_is_an_encoder(encoder: str) -> None:
    torch.manual_seed(0)
    model = UNet2d(2, 2, 3, encoder, **NARROW).eval()
    assert model(torch.randn(1, 2, 45, 71)).shape == (1, 3, 45, 71)
    assert model(torch.randn(1, 2, 1, 3)).shape == (1, 3, 1, 3)


def test_maps_with_the_channels_last() -> None:
    model = UNet2d(2, 3, 2, "mambaout_femto", encoder_kwargs={"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}).eval()
    assert model.channels_last
    assert model(torch.randn(1, 3, 33, 64)).shape == (1, 2, 33, 64)


@pytest.mark.parametrize("name", ["test_unet", "test_unet_nossm", "test_ssm_unet", "test_ssm_unet_nossm"])
def test_create_model_takes_both_names_of_channels(name: str) -> None:
    dims = 2 if "ssm_unet" not in name else 3
    x = torch.randn(1, 4, *(16,) * dims)
    for kwargs in ({"in_chans": 4, "num_classes": 5}, {"in_channels": 4, "out_channels": 5}):
        assert ssmvision.create_model(name, **kwargs).eval()(x).shape == (1, 5, *x.shape[2:])


@pytest.mark.parametrize(
    "name",
    [
        "unet_vmamba_tiny",
        "unet_mambavision_tiny",
        "unet_vssd_tiny",
        "unet_efficientvmamba_tiny",
        "ssm_unet_2d",
        "ssm_unet_3d",
    ],
)
def test_twin_has_as_many_parameters(name: str) -> None:
    networks = [ssmvision.create_model(each, device="meta") for each in (name, f"{name}_nossm")]
    count, twin_count = (sum(p.numel() for p in network.parameters()) for network in networks)
    assert twin_count == pytest.approx(count, rel=0.03)


def test_the_volume_scan_goes_along_every_axis_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    scan = SS3D.scan_tokens
    monkeypatch.setattr(SS3D, "scan_tokens", lambda self, u, ways: taken.append(ways) or scan(self, u, ways))
    assert SS3D(4)(torch.randn(1, 2, 3, 5, 4)).shape == (1, 2, 3, 5, 4)
    assert sorted((taken[0][:3, 1] - taken[0][:3, 0]).tolist()) == [1, 5, 15]
    assert torch.equal(taken[0][3:], taken[0][:3].flip(1))
    assert torch.equal(taken[0].sort().values, torch.arange(30).expand(6, 30))


def test_the_volume_scan_commutes_with_reversal_where_its_routes_share_their_dynamics() -> None:
    torch.manual_seed(0)
    layer, x = SS3D(4), torch.randn(1, 2, 3, 5, 4)
    with torch.no_grad():
        for parameter in (layer.x_proj_weight, layer.dt_projs_weight, layer.dt_projs_bias):
            parameter.copy_(parameter[:1].clone().expand_as(parameter))
        layer.conv3d.weight.copy_(torch.rand(8, 1, 1, 1, 1).expand_as(layer.conv3d.weight))
        torch.testing.assert_close(layer(x.flip(1, 2, 3)), layer(x).flip(1, 2, 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNet2d(encoder="vmamba_enormous"), "no encoder named 'vmamba_enormous'"),
        (lambda: UNet2d(encoder="test_vit"), "must be a hierarchical backbone.*test_vit"),
        (lambda: UNet2d(encoder="test_vmamba", decoder_channels=(8, 8)), "needs 5 decoder_channels.*not 2"),
        (lambda: MixerUNet(2, 1, 2, mixer="mamba9"), "mixer must be one of mamba, .* not 'mamba9'"),
        (lambda: MixerUNet(1, 1, 2), "spatial_dims must be 2 or 3, not 1"),
        (lambda: MixerUNet(2, 1, 2, channels=(8,)), r"at least two stages, not \(8,\)"),
        (lambda: ssmvision.create_model("test_unet", mixer="mamba"), "mixer must be 'ssm' or 'none'"),
        (lambda: ssmvision.create_model("test_unet", spatial_dims=3), "spatial_dims must be 2, not 3"),
    ],
)
def test_wrong_arguments_are_told(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
