"""What LocalVMamba promises beyond the golden cases."""

import pytest
import torch

import ssmvision
from ssmvision.models.localvmamba import from_official

DIRECTIONS = [["h", "h_flip", "w7", "w7_flip"], ["h_flip", "v_flip", "w2_flip", "w7"]]


def make(**kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model("test_localvmamba", num_classes=5, **kwargs).eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (65, 40), (7, 9)])
def test_any_size_goes_in(size):
    assert make()(torch.randn(2, 3, *size)).isfinite().all()


def test_batch_entries_do_not_mix():
    model, x = make(), torch.randn(3, 3, 48, 40)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-6)


def test_drop_path_rises_over_all_blocks():
    rates = [b.drop_path.drop_prob for s in make(drop_path_rate=0.4).stages for b in s.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_training_under_autocast_is_finite():
    model = make().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 32, 48)).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_every_block_gets_its_directions():
    model = make(directions=[["h"], ["v"], ["w2"], ["w7_flip"], ["v_flip"]])
    found = [block.op.directions for stage in model.stages for block in stage.blocks]
    assert found == [["h"], ["v"], ["w2"], ["w7_flip"], ["v_flip"]]
    with pytest.raises(ValueError, match="directions of 2 blocks for 5 blocks"):
        make(directions=DIRECTIONS)


def test_the_tiny_model_whose_weights_were_never_released_has_the_official_size():
    model = ssmvision.create_model("localvmamba_tiny", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 25_527_160
    with pytest.raises(RuntimeError, match="No pretrained weights are registered for localvmamba_tiny"):
        ssmvision.create_model("localvmamba_tiny", pretrained=True)


def test_a_program_for_all_sizes_pads_as_each_size_needs():
    model, auto = make(dims=(8, 16), depths=(1, 1)), torch.export.Dim.AUTO
    example = (torch.randn(2, 3, 136, 160),)
    program = torch.export.export(model, example, dynamic_shapes={"x": {0: auto, 2: auto, 3: auto}})
    for size in ((112, 224), (224, 224)):
        x = torch.randn(3, 3, *size)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "shapes"),
    [
        ({}, {"stages.1.blocks.0.op.A_logs": (128, 16), "stages.0.blocks.0.op.attn.global_reduce.weight": (2, 16)}),
        (dict(dims=[8, 24], ssm_d_state=4), {"stages.1.downsample.reduction.weight": (24, 32)}),
        (dict(ssm_ratio=1.0, ssm_dt_rank=3), {"stages.0.blocks.0.op.dt_projs_weight": (4, 8, 3)}),
        (dict(depths=[2], dims=8), {"stages.0.blocks.1.op.x_proj_weight": (4, 33, 16)}),
        (dict(directions=[["h", "w3"], ["v"]]), {"stages.1.blocks.0.op.Ds": (32,), "stages.0.blocks.0.op.Ds": (32,)}),
    ],
)
def test_other_configurations_of_the_official_class(kwargs, shapes):
    model = from_official("VSSM", dict(dims=8, depths=[1, 1], num_classes=3, directions=DIRECTIONS) | kwargs).model
    state = model.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert model(torch.randn(1, 3, 33, 40)).shape == (1, 3)


@pytest.mark.parametrize(("name", "value"), [("directions", None), ("patch_size", 2), ("patch_norm", False)])
def test_what_was_never_published_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        from_official("VSSM", dict(dims=8, depths=[1, 1], directions=DIRECTIONS) | {name: value})
