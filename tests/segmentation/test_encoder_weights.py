"""Encoders that begin with a backbone's weights: what goes where, and nothing in silence."""

import json
import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ssmvision
from ssmvision.hub import CheckpointError
from ssmvision.models.vmamba import from_official
from ssmvision.segmentation import load_encoder
from ssmvision.segmentation.unet import UNet2d

MANIFESTS = Path(__file__).parents[1] / "manifests"
DIMS, DEPTHS = [8, 16, 32, 64], [2, 1, 2, 1]


def _file(tensors: dict[str, Tensor], folder: Path) -> Path:
    file = folder / "backbone.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    return file


def _vmamba(folder: Path, dims: list[int] = DIMS) -> tuple[dict[str, Tensor], Path]:
    """Random weights of a small VMamba v0 under the keys of its first release, and their file."""
    torch.manual_seed(0)
    arguments = {"dims": dims, "depths": DEPTHS, "forward_type": "v0", "mlp_ratio": 0.0, "downsample_version": "v1"}
    model = from_official("VSSM", arguments).model
    tensors = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^stages\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", key)
        key = re.sub(r"^stages", "layers", key).replace(".op.", ".self_attention.")
        key = re.sub(r"(blocks\.\d+)\.norm\.", r"\1.ln_1.", key)
        tensors[key.replace("embed.conv1", "embed.proj").replace("embed.norm1", "embed.norm")] = torch.randn_like(value)
    return tensors, _file(tensors, folder)


def _network(name: str, **kwargs) -> nn.Module:
    return ssmvision.create_model(name, d_state=16, depths=kwargs.pop("depths", (1, 1, 1, 1)), **kwargs)


def test_keys_of_the_small_vmamba_are_the_published_ones(tmp_path: Path) -> None:
    published = json.loads((MANIFESTS / "vmamba_v0_tiny.json").read_text())["state_dict"]
    first = {key for key in published if key.startswith("layers.0")}
    ours = {key.replace(".self_attention.", ".op.").replace(".ln_1.", ".norm.") for key in _vmamba(tmp_path)[0]}
    assert first <= ours


def test_vm_unet_starts_both_of_its_halves(tmp_path: Path) -> None:
    tensors, file = _vmamba(tmp_path)
    with pytest.warns(UserWarning, match=r"VMUNet takes \d+ tensors .* surplus \(.*blocks\.1"):
        model = _network("test_vm_unet", dims=DIMS, encoder_weights=file)
    own = model.state_dict()
    assert torch.equal(own["layers.2.blocks.0.op.A_logs"], tensors["layers.2.blocks.0.self_attention.A_logs"])
    assert torch.equal(own["layers_up.1.blocks.0.op.A_logs"], tensors["layers.2.blocks.0.self_attention.A_logs"])
    assert torch.equal(own["layers.0.downsample.reduction.weight"], tensors["layers.0.downsample.reduction.weight"])
    assert torch.equal(own["patch_embed.conv1.weight"], tensors["patch_embed.proj.weight"])


def test_nothing_is_left_over_in_silence(tmp_path: Path) -> None:
    tensors, file = _vmamba(tmp_path)
    model = _network("test_vm_unet_v2", dims=DIMS, depths=DEPTHS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="surplus"):
        report = load_encoder(model, file)
    assert not report.missing
    assert not report.mismatched
    assert {key.split(".")[0] for key in report.unexpected} == {"norm", "head"}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.startswith(("layers.", "patch_embed."))}
    assert len(changed) + len(report.unexpected) == len(tensors)


def test_a_file_that_fits_whole_is_no_matter_for_a_warning(tmp_path: Path) -> None:
    tensors, _ = _vmamba(tmp_path)
    encoder = _file({k: v for k, v in tensors.items() if not k.startswith(("norm.", "head."))}, tmp_path)
    model = _network("test_vm_unet_v2", dims=DIMS, depths=DEPTHS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_encoder(model, encoder).ok


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_swin_umamba_d_takes_the_stem_for_any_channels(channels: int, tmp_path: Path) -> None:
    tensors, file = _vmamba(tmp_path)
    model = _network("test_swin_umamba_d", in_channels=channels, features=DIMS, depths=DEPTHS)
    with pytest.warns(UserWarning, match="surplus"):
        report = load_encoder(model, file)
    assert not report.missing
    assert not report.mismatched
    own = model.state_dict()
    assert torch.equal(own["vssm_encoder.downsamples.1.norm.weight"], tensors["layers.1.downsample.norm.weight"])
    stem, official = own["vssm_encoder.patch_embed.conv1.weight"], tensors["patch_embed.proj.weight"]
    if channels == 1:
        torch.testing.assert_close(stem, official.sum(1, keepdim=True))
    elif channels == 3:
        assert torch.equal(stem, official)


def test_swin_umamba_keeps_its_own_stem(tmp_path: Path) -> None:
    _, file = _vmamba(tmp_path)
    with pytest.warns(UserWarning, match="4 missing"):
        report = load_encoder(_network("test_swin_umamba", features=[4, *DIMS], depths=DEPTHS), file)
    assert {key.rsplit(".", 2)[0] for key in report.missing} == {"vssm_encoder.patch_embed"}
    assert {key.split(".")[0] for key in report.unexpected} == {"patch_embed", "norm", "head"}


def test_other_widths_are_named(tmp_path: Path) -> None:
    _, file = _vmamba(tmp_path, dims=[8, 24, 32, 64])
    with pytest.warns(UserWarning, match=r"of another shape \(.*instead of"):
        report = load_encoder(_network("test_vm_unet_v2", dims=DIMS, depths=DEPTHS), file)
    assert "layers.1.blocks.0.norm.weight" in {key for key, _, _ in report.mismatched}


def test_vivim_takes_segformer_from_transformers(tmp_path: Path) -> None:
    model = ssmvision.create_model("test_vivim")
    torch.manual_seed(0)
    official = {
        "segformer.encoder.patch_embeddings.1.proj.weight": torch.randn(8, 8, 3, 3),
        "segformer.encoder.patch_embeddings.1.layer_norm.bias": torch.randn(8),
        "segformer.encoder.block.0.0.layer_norm_1.weight": torch.randn(8),
        "segformer.encoder.block.0.0.attention.self.query.weight": torch.randn(8, 8),
        "segformer.encoder.block.0.0.attention.output.dense.bias": torch.randn(8),
        "segformer.encoder.block.0.0.mlp.dwconv.dwconv.weight": torch.randn(32, 1, 3, 3),
        "decode_head.linear_c.2.proj.weight": torch.randn(16, 16),
        "decode_head.linear_fuse.weight": torch.randn(16, 64, 1, 1),
        "classifier.weight": torch.randn(3, 16),
    }
    with pytest.warns(UserWarning, match="forbids commercial use") as told:
        report = load_encoder(model, _file(official, tmp_path))
    licence, fit = (str(warning.message) for warning in told)
    assert "NVIDIA's licence of SegFormer, non-commercial" in licence
    assert re.search(r"Vivim takes 8 tensors .* 1 surplus \(classifier\.weight\)", fit)
    own = model.state_dict()
    for ours, theirs in (
        ("patch_embeds.1.proj.weight", "segformer.encoder.patch_embeddings.1.proj.weight"),
        ("blocks.0.0.attn.proj.bias", "segformer.encoder.block.0.0.attention.output.dense.bias"),
        ("linear_c.2.weight", "decode_head.linear_c.2.proj.weight"),
    ):
        assert torch.equal(own[ours], official[theirs])
    assert report.missing
    with pytest.raises(ValueError, match="no program downloads weights of its encoder"):
        load_encoder(model)


@pytest.mark.parametrize("encoder", ["test_vmamba", "test_convnext"])
def test_pyramids_take_their_backbones_weights(encoder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model(encoder).eval()
    model = UNet2d(encoder=encoder, decoder_channels=(8, 8, 8, 8, 8)).eval()
    with pytest.warns(UserWarning, match="surplus"):
        report = load_encoder(model, _file(backbone.state_dict(), tmp_path))
    assert not report.missing
    assert not report.mismatched
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        _, maps = backbone.forward_intermediates(x)
        torch.testing.assert_close(model.encoder(x)[-1], maps[-1])


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    file = _file({"cat.weight": torch.zeros(2, 2)}, tmp_path)
    with pytest.raises(CheckpointError, match="holds nothing that fits the encoder of VMUNet"):
        ssmvision.create_model("test_vm_unet", encoder_weights=file)
    with pytest.raises(ValueError, match="UMamba has no encoder that weights of a published backbone fit"):
        ssmvision.create_model("test_umamba_bot", encoder_weights=file)
    with pytest.raises(RuntimeError, match="No pretrained weights are registered for test_vmamba"):
        ssmvision.create_model("test_unet", encoder_weights=True)
    with pytest.raises(ValueError, match="encoder_weights are for segmenters, not for test_vmamba"):
        ssmvision.create_model("test_vmamba", encoder_weights=file)
