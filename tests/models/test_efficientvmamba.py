"""What EfficientVMamba promises beyond the golden cases."""

import pytest
import torch

import ssmvision
from ssmvision.models.efficientvmamba import InvertedResidual, checkpoint_filter_fn, from_official


def make(**kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model("test_efficientvmamba", num_classes=5, **kwargs).eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (65, 40), (7, 9)])
def test_any_size_goes_in(size):
    assert make()(torch.randn(2, 3, *size)).isfinite().all()


def test_batch_entries_do_not_mix():
    model, x = make(), torch.randn(3, 3, 48, 40)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-6)


def test_drop_path_rises_over_all_blocks():
    rates = [b.drop_path.drop_prob for s in make(drop_path_rate=0.3).stages for b in s.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_training_under_autocast_is_finite():
    model = make().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 64, 48)).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_later_stages_are_convolutional():
    for scanning in (0, 1, 4):
        kinds = [isinstance(s.blocks[0], InvertedResidual) for s in make(ssm_stages=scanning).stages]
        assert kinds == [i >= scanning for i in range(4)]


def test_what_stands_beside_blocks_in_an_official_list_is_told_apart():
    x = torch.zeros(1)
    official = ["layers.2.1.conv_pw.0.weight", "layers.2.9.se.conv_reduce.bias", "layers.2.11.norm.weight"]
    official += ["layers.1.downsample.norm.weight", "layers.0.blocks.0.norm.weight", "layers.0.blocks.0.se.norm.bias"]
    assert list(checkpoint_filter_fn(dict.fromkeys(official, x), make())) == [
        "stages.2.blocks.0.conv_pw.0.weight",
        "stages.2.blocks.8.se.fc1.bias",
        "stages.3.downsample.norm.weight",
        "stages.2.downsample.norm.weight",
        "stages.0.blocks.0.norm.weight",
        "stages.0.blocks.0.se.norm.bias",
    ]


OFFICIAL = dict(depths=[1, 1, 2, 1], dims=8, num_classes=3, mlp_ratio=0.0, downsample_version="v1")


@pytest.mark.parametrize(
    ("kwargs", "shapes"),
    [
        ({}, {"stages.2.blocks.1.conv_pw.0.weight": (128, 32, 1, 1), "stages.0.blocks.0.op.A_logs": (64, 16)}),
        (dict(dims=[8, 24, 32, 40]), {"stages.1.downsample.reduction.weight": (24, 32)}),
        (dict(ssm_d_state=4, ssm_ratio=1.0), {"stages.1.blocks.0.op.A_logs": (64, 4)}),
        (dict(ssm_dt_rank=3), {"stages.1.blocks.0.op.dt_projs_weight": (4, 32, 3)}),
        (dict(mlp_ratio=2.0), {"stages.1.blocks.0.mlp.fc1.weight": (32, 16)}),
        (dict(depths=[2, 1, 1]), {"norm.weight": (32,), "stages.2.blocks.0.se.fc1.weight": (16, 128, 1, 1)}),
    ],
)
def test_other_configurations_of_the_official_class(kwargs, shapes):
    model = from_official("EfficientVSSM", OFFICIAL | kwargs).model.eval()
    state = model.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert model(torch.randn(1, 3, 33, 40)).shape == (1, 3)


@pytest.mark.parametrize(("name", "value"), [("downsample_version", "v3"), ("step_size", 4), ("patch_size", 2)])
def test_what_was_never_published_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} was never published"):
        from_official("EfficientVSSM", OFFICIAL | {name: value})
