"""What MambaVision promises beyond the golden cases."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import Attention

import ssmvision
from ssmvision.hub import CheckpointError
from ssmvision.layers import MambaVisionMixer
from ssmvision.models import _builder
from ssmvision.models.mambavision import WindowStage, from_official, from_windows, to_windows

CASE = Path(__file__).parents[1] / "parity" / "mambavision_ls"


def make(**kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model("test_mambavision", num_classes=5, **kwargs).eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (161, 40), (7, 9), (1, 300)])
def test_any_size_goes_in(size: tuple[int, int]) -> None:
    assert make()(torch.randn(2, 3, *size)).isfinite().all()


def test_windows_are_padded_below_and_to_the_right() -> None:
    image = torch.arange(1.0, 13).view(1, 1, 3, 4)  # 1 2 3 4 / 5 6 7 8 / 9 10 11 12
    assert to_windows(image, 2)[..., 0].tolist() == [[1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 0, 0], [11, 12, 0, 0]]
    assert to_windows(image, 3)[..., 0].tolist() == [[1, 2, 3, 5, 6, 7, 9, 10, 11], [4, 0, 0, 8, 0, 0, 12, 0, 0]]
    batch = torch.randn(2, 3, 5, 11)
    for size in (1, 4, 11, 20):
        assert torch.equal(from_windows(to_windows(batch, size), size, like=batch), batch)


def window_stage() -> WindowStage:
    torch.manual_seed(0)
    blocks = [MambaVisionMixer(8), Attention(8, num_heads=2)]
    stage = WindowStage(torch.nn.Identity(), blocks, window_size=4).eval()
    for parameter in stage.parameters():  # large enough that tokens matter to each other
        torch.nn.init.normal_(parameter, std=0.5)
    return stage


def test_windows_do_not_see_each_other_but_see_their_padding() -> None:
    stage, x = window_stage(), torch.randn(1, 8, 6, 7)
    y = stage(x)
    assert y.shape == x.shape
    torch.testing.assert_close(stage(F.pad(x, (0, 1, 0, 2)))[:, :, :6, :7], y)
    torch.testing.assert_close(stage(x[:, :, :4, :4]), y[:, :, :4, :4], rtol=1e-5, atol=1e-4)
    # Zero tokens are no neutral ones: attention spreads over them.
    narrow = x[:, :, :4, :3]
    alone = stage.blocks(narrow.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(narrow.shape)
    assert (stage(narrow) - alone).abs().max() > 0.1 * alone.abs().max()


def test_windows_export_for_images_of_any_size() -> None:
    stage, free = window_stage(), torch.export.Dim.DYNAMIC
    program = torch.export.export(stage, (torch.randn(2, 8, 10, 13),), dynamic_shapes=({0: free, 2: free, 3: free},))
    for shape in ((3, 8, 8, 8), (2, 8, 17, 9)):  # without and with padding
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), stage(x))


def test_the_later_half_of_a_stage_is_attention() -> None:
    model = make(depths=(1, 1, 5, 4))
    kinds = [[type(block.mixer) for block in stage.blocks] for stage in model.stages[2:]]
    assert kinds == [[MambaVisionMixer] * 3 + [Attention] * 2, [MambaVisionMixer] * 2 + [Attention] * 2]


def test_the_step_size_bias_counts_twice() -> None:
    torch.manual_seed(0)
    mixer = MambaVisionMixer(8, d_state=2)
    x = torch.randn(1, 6, 8)
    u, z = mixer.in_proj(x).transpose(1, 2).chunk(2, 1)
    u, z = F.silu(mixer.conv1d_x(u)), F.silu(mixer.conv1d_z(z))
    low, b, c = mixer.x_proj(u.transpose(1, 2)).split([mixer.dt_rank, 2, 2], dim=-1)
    step = F.softplus(mixer.dt_proj(low) + mixer.dt_proj.bias)
    h, y = torch.zeros(4, 2), []
    for t in range(6):
        h = torch.exp(-step[0, t, :, None] * mixer.A_log.exp()) * h + (step[0, t] * u[0, :, t]).outer(b[0, t])
        y.append(h @ c[0, t] + mixer.D * u[0, :, t])
    expected = mixer.out_proj(torch.cat([torch.stack(y), z[0].T], dim=1))
    torch.testing.assert_close(mixer(x)[0], expected)


def test_step_sizes_keep_their_own_initialization() -> None:
    model = make()
    for again in (False, True):
        if again:
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, torch.nan)
            model.init_weights()
        for mixer in (m for m in model.modules() if isinstance(m, MambaVisionMixer)):
            steps = F.softplus(mixer.dt_proj.bias)
            assert steps.min() >= 0.999e-3
            assert steps.max() <= 1.001e-1


def test_features_are_stage_outputs_before_downsampling() -> None:
    model = make()
    x = torch.randn(1, 3, 96, 135)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 24, 34), (32, 12, 17), (64, 6, 9), (128, 3, 5)]
    assert torch.equal(model.stages[3](maps[2]), maps[3])
    assert torch.equal(model.norm(maps[3]), model.forward_features(x))
    backbone = ssmvision.create_model("test_mambavision", features_only=True).eval()
    trunk = {k: v for k, v in model.state_dict().items() if k.startswith(("patch_embed", "stages"))}
    backbone.load_state_dict({k.replace(".", "_", 1): v for k, v in trunk.items()})
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == ([16, 32, 64, 128], [4, 8, 16, 32])
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), maps, strict=True))


def test_drop_path_rises_over_all_blocks() -> None:
    model = make(drop_path_rate=0.6)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def official_weights() -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Weights under the official names, and arguments that make `test_mambavision` fit them."""
    official = json.loads((CASE / "meta.json").read_text())["kwargs"]
    ours = {
        "dim": official["dim"],
        "stem_dim": official["in_dim"],
        "depths": official["depths"],
        "window_sizes": official["window_size"][2:],
        "num_heads": official["num_heads"][2:],
        "num_classes": official["num_classes"],
    }
    return load_file(CASE / "ckpt.safetensors"), ours


WRAPPERS = {
    "pth.tar": lambda weights: {"state_dict": weights, "epoch": 3},
    "distributed": lambda weights: {"model": {f"module.{key}": value for key, value in weights.items()}},
    "encoder": lambda weights: {"state_dict": {f"module.encoder.{key}": value for key, value in weights.items()}},
    "transformers": lambda weights: {f"model.{key}": value for key, value in weights.items()},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper_of_official_files_loads(wrapper: str, tmp_path: Path) -> None:
    weights, arguments = official_weights()
    model = ssmvision.create_model("test_mambavision", **arguments).eval()
    torch.save(WRAPPERS[wrapper](weights), tmp_path / "w.pth.tar")
    loaded = ssmvision.create_model("test_mambavision", checkpoint_path=tmp_path / "w.pth.tar", **arguments).eval()
    io = load_file(CASE / "io.safetensors")
    torch.testing.assert_close(loaded(io["input"]), io["output"], rtol=1e-4, atol=4e-4)
    assert not torch.allclose(model(io["input"]), io["output"], atol=0.1)


def test_a_key_that_is_missing_or_too_many_is_named(tmp_path: Path) -> None:
    weights, arguments = official_weights()
    weights["decoder.weight"] = weights.pop("levels.2.blocks.0.mixer.conv1d_z.weight")
    torch.save({"state_dict": weights}, tmp_path / "w.pth.tar")
    with pytest.raises(CheckpointError, match=r"missing \(stages\.2\.blocks\.0\.mixer\.conv1d_z.*decoder\.weight"):
        ssmvision.create_model("test_mambavision", checkpoint_path=tmp_path / "w.pth.tar", **arguments)


def test_the_licence_is_announced_once(tmp_path: Path) -> None:
    weights, arguments = official_weights()
    torch.save({"state_dict": weights}, tmp_path / "w.pth.tar")
    overlay = {"file": str(tmp_path / "w.pth.tar"), "num_classes": arguments["num_classes"]}
    _builder.announce_licence.cache_clear()
    seen = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ssmvision.create_model("test_mambavision", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
        seen += [str(w.message) for w in caught if "forbids commercial use" in str(w.message)]
    assert len(seen) == 1
    assert "nvidia-source-code-license-nc" in seen[0]


def test_official_names_are_aliases() -> None:
    for alias, architecture, tag in (
        ("mamba_vision_T", "mambavision_tiny", "in1k"),
        ("mamba_vision_B_21k", "mambavision_base", "in21k_ft_in1k"),
    ):
        with pytest.warns(UserWarning, match=f"{alias} to current {architecture}.{tag}"):
            cfg = ssmvision.create_model(alias, device="meta").pretrained_cfg
        assert (cfg["architecture"], cfg["tag"]) == (architecture, tag)
        assert alias not in ssmvision.list_models()


OFFICIAL = dict(
    dim=8, in_dim=4, depths=[1, 1, 1, 1], window_size=[8, 8, 3, 2], mlp_ratio=2, num_heads=[1, 1, 2, 4], num_classes=3
)


@pytest.mark.parametrize(
    ("kwargs", "shapes"),
    [
        (dict(layer_scale_conv=0.1), {"stages.1.blocks.0.ls.gamma": (16,)}),
        (dict(layer_scale=0.1), {"stages.3.blocks.0.ls2.gamma": (64,)}),
        (dict(depths=[1, 2, 2, 1]), {"stages.2.blocks.1.mixer.qkv.bias": (96,)}),
        (dict(depths=[1, 2, 2, 1], qkv_bias=False), {"stages.2.blocks.1.mixer.qkv.bias": None}),
        (dict(in_chans=1), {"patch_embed.conv1.weight": (4, 1, 3, 3)}),
    ],
)
def test_other_configurations_of_the_official_class(kwargs, shapes) -> None:
    model = from_official("MambaVision", OFFICIAL | kwargs).model.eval()
    state = model.state_dict()
    assert {key: tuple(state[key].shape) if key in state else None for key in shapes} == shapes
    assert model(torch.randn(1, kwargs.get("in_chans", 3), 33, 40)).shape == (1, 3)


def test_what_was_never_published_is_refused() -> None:
    with pytest.raises(ValueError, match=r"qk_scale=0\.5"):
        from_official("MambaVision", OFFICIAL | dict(qk_scale=0.5))


def test_a_window_stage_without_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="not 2 and 1 to 4 stages"):
        make(num_heads=(4,))


def test_wrong_number_of_channels_is_named() -> None:
    with pytest.raises(AssertionError, match="number of channels"):
        make(in_chans=1)(torch.randn(1, 3, 32, 32))
