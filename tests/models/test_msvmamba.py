"""What MSVMamba promises beyond the golden case."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ssmvision
from ssmvision.models.msvmamba import checkpoint_filter_fn, from_official

OFFICIAL = json.loads((Path(__file__).parents[1] / "parity/msvmamba/meta.json").read_text())["kwargs"]


def make(**kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model("test_msvmamba", num_classes=5, **kwargs).eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (65, 40), (4, 9)])
def test_any_size_goes_in(size: tuple[int, int]) -> None:
    assert make()(torch.randn(2, 3, *size)).isfinite().all()


def test_the_convolution_of_the_mlp_is_added_to_its_input() -> None:
    mlp, x = make().stages[0].blocks[0].mlp, torch.randn(1, 5, 7, 16)
    hidden = mlp.fc1(x).permute(0, 3, 1, 2)
    padded = F.pad(hidden, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    mixed = (padded * mlp.dwconv.weight[:, 0, None, None]).sum((4, 5)) + mlp.dwconv.bias[:, None, None]
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(hidden + mixed).permute(0, 2, 3, 1)))


def test_linear_layers_and_convolutions_of_one_pixel_are_exchanged() -> None:
    official = {
        "layers.0.blocks.0.convFFN.linear1.weight": torch.randn(32, 16, 1, 1),
        "layers.0.blocks.0.op.se.fc.2.weight": torch.randn(32, 4),
    }
    converted = checkpoint_filter_fn(official, make())
    assert {key: tuple(x.shape) for key, x in converted.items()} == {
        "stages.0.blocks.0.mlp.fc1.weight": (32, 16),
        "stages.0.blocks.0.op.se.fc2.weight": (32, 4, 1, 1),
    }


def test_other_configurations_of_the_official_class_are_built() -> None:
    other = dict(
        dims=[8, 24], depths=[1, 2], ssm_d_state=3, ssm_ratio=1.0, ssm_dt_rank=2, ssm_conv=5, ssm_conv_bias=False,
        ssm_act_layer="gelu", add_se=False, convFFN=False, mlp_ratio=3.0, in_chans=2,
    )  # fmt: skip
    model = from_official("VSSM", OFFICIAL | other).model.eval()
    assert model(torch.randn(1, 2, 24, 40)).shape == (1, 10)
    shapes = {key: tuple(x.shape) for key, x in model.state_dict().items() if key.startswith("stages.1.blocks.1.")}
    assert shapes["stages.1.blocks.1.op.A_logs"] == (48, 3)
    assert shapes["stages.1.blocks.1.op.dt_projs_weight"] == (2, 24, 2)
    assert shapes["stages.1.blocks.1.op.conv2d.weight"] == (24, 1, 5, 5)
    assert shapes["stages.1.blocks.1.op.conv2d_b1.weight"] == (24, 1, 7, 7)
    assert shapes["stages.1.blocks.1.mlp.fc1.weight"] == (72, 24)
    assert not any(("bias" in key and "conv2d" in key) or ".se." in key or "dwconv" in key for key in shapes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sep_norm", True), ("ms_split", [2, 2]), ("mlp_ratio", 4.0), ("ssm_rank_ratio", 1.0), ("ms_stage", [0, 2])],
)
def test_what_was_never_published_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"MSVMamba with {name}=.* was never published"):
        from_official("VSSM", OFFICIAL | {name: value})


def test_weights_are_fetched_by_hand() -> None:
    with pytest.raises(RuntimeError, match=r"by hand from https://drive\.google\.com/drive/folders/1ddNWk89"):
        ssmvision.create_model("msvmamba_tiny", pretrained=True)
