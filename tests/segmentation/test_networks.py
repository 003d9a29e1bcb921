"""What every registered segmenter promises, checked on its micro networks and their twins."""

import copy
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from monai.inferers import sliding_window_inference
from safetensors.torch import save_file
from torch import Tensor, nn

import ssmvision
from ssmvision.models._networks import family_of, list_networks, network_cfg

MICRO = [
    name for name in list_networks(["test_*"], [], []) if family_of(name).__name__.startswith("ssmvision.segmentation.")
]
WITH_SSM = [name for name in MICRO if not name.endswith("_nossm")]
SSM_PARAMETERS = ("A_log", "A_logs", "A_b_log", "A_s_log")


def _build(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return ssmvision.create_model(name, **kwargs)


def _input(name: str, batch: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, *network_cfg(name).input_size)


def _logits(output: Tensor | list[Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_networks_are_found() -> None:
    assert {"test_umamba_bot", "test_umamba_enc_nossm", "test_segmamba", "test_lkm_unet_nossm"} <= set(MICRO)


@pytest.mark.parametrize("name", MICRO)
def test_trains(name: str) -> None:
    model, x = _build(name).train(), _input(name, batch=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    losses = []
    for _ in range(3):
        torch.manual_seed(2)  # the same dropout in every step
        loss = (_logits(model(x)) - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", WITH_SSM)
def test_twin_has_as_many_parameters_and_no_ssm(name: str) -> None:
    twin = network_cfg(name).twin
    assert network_cfg(twin).twin == name
    model, other = _build(name, device="meta"), _build(twin, device="meta")
    parameters, others = (sum(p.numel() for p in network.parameters()) for network in (model, other))
    assert others == pytest.approx(parameters, rel=0.03)
    assert any(key.endswith(SSM_PARAMETERS) for key in model.state_dict())
    assert not any(key.endswith(SSM_PARAMETERS) for key in other.state_dict())


@pytest.mark.parametrize("name", MICRO)
def test_exports(name: str, tmp_path: Path) -> None:
    model, x = _build(name).eval(), _input(name)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "network.pt2")
    program = torch.export.load(tmp_path / "network.pt2")
    with torch.no_grad():
        torch.testing.assert_close(_logits(program.module()(x)), _logits(model(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MICRO)
def test_reloads(name: str, tmp_path: Path) -> None:
    model, x = _build(name).eval(), _input(name)
    file = tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    torch.manual_seed(3)
    again = ssmvision.create_model(name, checkpoint_path=file).eval()
    with torch.no_grad():
        assert torch.equal(_logits(again(x)), _logits(model(x)))


# On maps of 2 x 2 x 4 voxels torch 2.14's oneDNN computes the bfloat16 weight gradients of a Conv3d from uninitialized
# memory (NaN in half of the runs of a bare layer of 16 or more channels, none from 4 x 4 x 8 on): here without it.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MICRO)
def test_large_inputs_stay_finite_under_autocast(name: str, dtype: torch.dtype) -> None:
    model, x = _build(name).train(), 1e3 * _input(name, batch=2)
    with torch.backends.mkldnn.flags(enabled=dtype is not torch.bfloat16 or x.dim() < 5):
        with torch.autocast("cpu", dtype):
            logits = _logits(model(x))
        loss = logits.float().abs().mean()
        loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", WITH_SSM)
def test_a_monai_bundle_builds_it(name: str) -> None:
    channels, *size = network_cfg(name).input_size
    definition = {
        "_target_": "ssmvision.create_model", "model_name": name,
        "spatial_dims": len(size), "in_channels": channels, "out_channels": 5,
    }  # fmt: skip
    model = ConfigParser({"network_def": definition}).get_parsed_content("network_def").eval()
    x = _input(name)
    with torch.no_grad():
        logits = _logits(model(x))
        assert logits.shape[:2] == (1, 5)
        assert logits.dtype == torch.float32
        if logits.dim() == 2:  # a classifier
            return
        assert logits.shape[2:] == x.shape[2:]
        large = torch.cat([x, x], dim=2)
        windows = sliding_window_inference(large, size, 2, lambda window: _logits(model(window)), overlap=0)
        torch.testing.assert_close(windows, torch.cat([logits, logits], dim=2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MICRO)
def test_inputs_that_do_not_fit_are_refused_in_a_sentence(name: str) -> None:
    model, x = _build(name).eval(), _input(name)
    for wrong in (torch.cat([x] * 4, dim=1), x[:, :0], x[0], x[..., 0], x[..., None]):
        with pytest.raises(ValueError, match=r"(takes|built for|needs|fix) [^\n]+$"):
            model(wrong)
    for axis in range(2, x.dim()):
        odd = torch.cat([x, x.narrow(axis, 0, 1)], dim=axis)
        result = _sentence_or_logits(model, odd)
        if isinstance(result, str):
            assert str(odd.shape[axis]) in result
        else:
            assert result.dim() == 2 or result.shape[2:] == odd.shape[2:]


def _sentence_or_logits(model: nn.Module, x: Tensor) -> str | Tensor:
    try:
        return _logits(model(x))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ["umamba_bot_2d", "segmamba", "nnmamba_seg", "nnmamba_cls", "lkm_unet_2d"])
def test_no_weights_are_promised(name: str) -> None:
    with pytest.raises(RuntimeError, match="No program can download"):
        ssmvision.create_model(name, pretrained=True)
    assert network_cfg(name).license


@pytest.mark.parametrize("name", ["test_umamba_bot", "test_umamba_enc", "test_lkm_unet"])
def test_deep_supervision_is_a_switch(name: str) -> None:
    model, x = _build(name, deep_supervision=True).eval(), _input(name)
    with torch.no_grad():
        outputs = model(x)
        model.decoder.deep_supervision = False
        assert torch.equal(outputs[0], model(x))
        assert len(outputs) == len(model.decoder.stages)
        assert [output.shape[-1] for output in outputs] == sorted((o.shape[-1] for o in outputs), reverse=True)


def test_channel_tokens_fix_the_size() -> None:
    model = _build("test_umamba_enc").eval()
    with pytest.raises(ValueError, match=r"stages with channels for tokens fix .* patch_size is \(8, 16, 16\)"):
        model(torch.zeros(1, 1, 8, 16, 24))
    no_channel_tokens = _build("test_umamba_enc", patch_size=(64, 64, 64)).eval()
    assert no_channel_tokens(torch.zeros(1, 1, 8, 16, 24)).shape == (1, 3, 8, 16, 24)


def test_slices_must_divide_the_tokens() -> None:
    model = _build("test_segmamba", nslices=(8, 4, 2, 3))
    with pytest.raises(ValueError, match="tokens of stage 3 must be a multiple of nslices=3"):
        model(_input("test_segmamba"))


def test_stage_mamba_layer_is_shared() -> None:
    model = _build("test_nnmamba_seg", blocks=3)
    calls = []
    model.layer1.mamba_layer.register_forward_hook(lambda *_: calls.append(1))
    model(_input("test_nnmamba_seg"))
    assert len(calls) == 2
    assert not [key for key in model.state_dict() if "blocks" in key and "mamba" in key]


def test_lkm_windows_scan_every_pixel_once() -> None:
    layer = copy.deepcopy(_build("test_lkm_unet").encoder.mamba_layers[0])
    x = torch.arange(2 * 8 * 10 * 28 * 24.0).view(2, 8, 10, 28, 24)
    split = layer._split(x)
    assert split.shape == (2 * 10 * 14 * 12, 8, 1, 2, 2)
    assert split[1, 0].flatten().tolist() == x[0, 0, 0, ::14, 1::12].flatten().tolist()
    assert torch.equal(layer._join(split, x), x)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("umamba_bot_2d", {"mixer": "mamba3"}, "mixer must be"),
        ("umamba_bot_2d", {"spatial_dims": 1}, "spatial_dims must be 2 or 3"),
        ("umamba_bot_2d", {"placement": "both"}, "placement must be"),
        ("umamba_enc_2d", {"patch_size": None}, "planned for one patch_size"),
        ("umamba_bot_2d", {"strides": (1, 2)}, "must be of one length"),
        ("umamba_bot_2d", {"n_conv_per_stage": (1, 2)}, "7 stages need as many numbers"),
        ("segmamba", {"spatial_dims": 2}, "spatial_dims must be 3"),
        ("segmamba", {"depths": (1, 1)}, "four stages"),
        ("nnmamba_cls", {"spatial_dims": 2}, "spatial_dims must be 3"),
    ],
)
def test_arguments_that_contradict_each_other(name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ssmvision.create_model(name, device="meta", **arguments)
