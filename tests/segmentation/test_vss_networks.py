"""What each segmenter of VSS blocks and light Mamba layers promises beyond the golden cases."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ssmvision
from ssmvision.layers import Mamba
from ssmvision.models._networks import family_of, network_cfg
from ssmvision.segmentation import h_vmunet, lightm_unet, swin_umamba, ultralight_vm_unet, vivim, vm_unet

MICRO = [
    "test_h_vmunet", "test_lightm_unet", "test_swin_umamba", "test_swin_umamba_d", "test_ultralight_vm_unet",
    "test_vivim", "test_vm_unet", "test_vm_unet_v2",
]  # fmt: skip


def _build(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return ssmvision.create_model(name, **kwargs).eval()


def _input(name: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, *network_cfg(name).input_size)


@pytest.mark.parametrize("twin", ["", "_nossm"])
@pytest.mark.parametrize("name", MICRO)
def test_logits_have_the_size_of_the_input(name: str, twin: str) -> None:
    x = _input(name)
    logits = _build(name + twin, num_classes=3)(x)
    assert logits.shape == (1, 3, *x.shape[2:])


@pytest.mark.parametrize("twin", ["", "_nossm"])
@pytest.mark.parametrize("name", MICRO)
def test_our_own_keys_pass_unchanged(name: str, twin: str) -> None:
    model = _build(name + twin)
    assert family_of(name).checkpoint_filter_fn(model.state_dict(), model).keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", MICRO)
def test_every_trained_parameter_gets_a_gradient(name: str) -> None:
    model = _build(name).train()
    model(torch.cat([_input(name)] * 2)).square().mean().backward()
    heads = {key for key, _ in model.named_parameters() if "out_layers" in key or "seg_layers" in key}
    without = {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without <= heads
    assert not [key for key, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]


@pytest.mark.parametrize("name", [name for name in ssmvision.list_models(module="vm_unet") if "nossm" not in name])
def test_twin_has_as_many_parameters(name: str) -> None:
    model, twin = (ssmvision.create_model(each, device="meta") for each in (name, f"{name}_nossm"))
    count, twin_count = (sum(p.numel() for p in each.parameters()) for each in (model, twin))
    assert twin_count == pytest.approx(count, rel=0.03)
    assert not any(key.endswith(("A_log", "A_logs")) for key in twin.state_dict())


@pytest.mark.parametrize("name", MICRO)
def test_inputs_that_do_not_fit_are_refused_in_a_sentence(name: str) -> None:
    model, x = _build(name), _input(name)
    with pytest.raises(ValueError, match=r"takes \(batch, channels, "):
        model(x[0])
    with pytest.raises(ValueError, match=r"was built for .* input channels, not 12"):
        model(torch.cat([x] * (12 // x.shape[1]), dim=1))
    with pytest.raises(ValueError, match="spatial_dims"):
        _build(name, spatial_dims=1)
    with pytest.raises(ValueError, match="mixer must be"):
        _build(name, mixer="mamba3")


@pytest.mark.parametrize("name", [name for name in MICRO if name != "test_vivim"])
def test_sides_must_be_multiples(name: str) -> None:
    x = _input(name)
    with pytest.raises(ValueError, match=f"multiples of .*{x.shape[-1] + 2}"):
        _build(name)(torch.cat([x, x[..., :2]], dim=-1))


@pytest.mark.parametrize("name", ["test_vm_unet", "test_vm_unet_v2"])
def test_grey_pictures_are_repeated(name: str) -> None:
    model, grey = _build(name), torch.randn(1, 1, 64, 64)
    assert torch.equal(model(grey), model(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("name", ["test_h_vmunet", "test_ultralight_vm_unet", "test_vm_unet", "test_vm_unet_v2"])
def test_probabilities_are_an_option(name: str) -> None:
    x = _input(name)
    torch.testing.assert_close(_build(name, sigmoid=True)(x), _build(name)(x).sigmoid())


def test_vm_unet_v2_never_runs_its_last_stage() -> None:
    model, x = _build("test_vm_unet_v2", out_channels=3), torch.randn(1, 3, 64, 96)
    expected = model(x)
    for dead in (model.layers[-1], model.deconvs[-1], model.seg_outs[0], model.seg_outs[1]):
        for parameter in dead.parameters():
            assert not parameter.requires_grad
            parameter.data.fill_(torch.nan)
    assert expected.shape == (1, 3, 64, 96)
    assert torch.equal(model(x), expected)


def test_vm_unet_v2_loads_checkpoints_with_an_unused_head() -> None:
    model = _build("test_vm_unet_v2")
    surplus = {"vmunet.final_conv.weight": torch.zeros(1), "vmunet.final_up.norm.bias": torch.zeros(1)}
    converted = vm_unet.checkpoint_filter_fn(model.state_dict() | surplus, model)
    assert converted.keys() == model.state_dict().keys()


def test_mirrored_decoders_only() -> None:
    kwargs = {"depths": [1] * 4, "depths_decoder": [1] * 4, "dims": [8, 16, 32, 64], "dims_decoder": [64, 32, 16, 16]}
    with pytest.raises(ValueError, match="dims_decoder must mirror dims"):
        vm_unet.from_official("VMUNet", kwargs)


@pytest.mark.parametrize(("classes", "probabilities"), [(1, True), (3, False)])
def test_official_vm_unet_gives_probabilities_of_one_class_only(classes: int, probabilities: bool) -> None:
    kwargs = {"num_classes": classes, "depths": [1] * 4, "depths_decoder": [1] * 4, "dims": [8, 16, 32, 64]}
    assert vm_unet.from_official("VMUNet", kwargs).model.sigmoid is probabilities
    v2 = {"num_classes": classes, "deep_supervision": False, "mid_channel": 8, "depths": [1] * 4}
    assert vm_unet.from_official("VMUNetV2", v2).model.sigmoid is probabilities


@pytest.mark.parametrize(
    ("name", "strides"), [("test_swin_umamba", (1, 2, 4, 8)), ("test_swin_umamba_d", (1, 4, 8, 16))]
)
def test_deep_supervision_goes_from_fine_to_coarse(name: str, strides: tuple[int, ...]) -> None:
    x = _input(name)
    outputs = _build(name, deep_supervision=True)(x)
    assert [output.shape[-1] for output in outputs] == [x.shape[-1] // stride for stride in strides]
    assert torch.equal(outputs[0], _build(name)(x))


def test_swin_umamba_widths_must_fit() -> None:
    with pytest.raises(ValueError, match="hidden_size must be 64"):
        swin_umamba.from_official("SwinUMamba", {"feat_size": [4, 8, 16, 32, 64], "hidden_size": 32})
    with pytest.raises(ValueError, match="patch_size=2 was never published"):
        swin_umamba.from_official("SwinUMambaD", {"num_classes": 2, "dims": 8, "patch_size": 2})


def test_lightm_unet_explains_its_widths() -> None:
    with pytest.raises(ValueError, match="init_filters must be a multiple of 8, not 12"):
        lightm_unet.LightMUNet(2, 1, 2, init_filters=12)
    with pytest.raises(ValueError, match="blocks_up must have one entry less"):
        lightm_unet.LightMUNet(2, 1, 2, blocks_down=(1, 1), blocks_up=(1, 1))


def test_groups_of_channels_share_one_mamba() -> None:
    torch.manual_seed(0)
    layer, x = ultralight_vm_unet.PVMLayer(16, 8, Mamba), torch.randn(2, 16, 4, 6)
    tokens = layer.norm(x.flatten(2).transpose(1, 2))
    mixed = torch.cat([layer.mamba(chunk) + layer.skip_scale * chunk for chunk in tokens.chunk(4, dim=-1)], dim=-1)
    expected = layer.proj(layer.norm(mixed)).transpose(1, 2).reshape(2, 8, 4, 6)
    torch.testing.assert_close(layer(x), expected)


def test_h_vmunet_reads_no_spectrum() -> None:
    model, x = _build("test_h_vmunet"), _input("test_h_vmunet")
    expected = model(x)
    unread = [p for key, p in model.named_parameters() if key.endswith("complex_weight")]
    assert len(unread) == 8
    for parameter in unread:
        assert not parameter.requires_grad
        parameter.data.fill_(torch.nan)
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="whose sum must be even"):
        h_vmunet.HVMUNet(dims=(4, 4, 8, 8, 16, 16))


def test_vivim_clips_have_five_frames_or_a_multiple() -> None:
    model = _build("test_vivim")
    with pytest.raises(ValueError, match="multiple of 5, not 6"):
        model(torch.zeros(1, 3, 6, 32, 32))
    with pytest.raises(ValueError, match="at least 32 x 32, not"):
        model(torch.zeros(1, 3, 5, 32, 24))
    assert model(torch.zeros(1, 3, 10, 40, 33)).shape == (1, 1, 10, 40, 33)


def test_vivim_clips_do_not_mix() -> None:
    model, x = _build("test_vivim", edge=True), torch.randn(2, 3, 5, 32, 32)
    together, alone = model(x), model(x[1:])
    assert [part.shape for part in together] == [(2, 1, 5, 32, 32)] * 2
    for whole, part in zip(together, alone, strict=True):
        torch.testing.assert_close(whole[1:], part, rtol=1e-4, atol=1e-5)


def test_vivim_checkpoints_may_come_from_lightning_and_without_what_nothing_reads() -> None:
    model = _build("test_vivim")
    surplus = {"unused_classifier.bias": torch.zeros(2)}
    weights = {f"model.{key}": value for key, value in (model.state_dict() | surplus).items()}
    assert vivim.checkpoint_filter_fn(weights, model).keys() == model.state_dict().keys()
