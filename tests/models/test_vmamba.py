"""What VMamba promises beyond the golden cases."""

import pytest
import torch

import ssmvision
from ssmvision.models.vmamba import PatchMerging, checkpoint_filter_fn, from_official

V0 = dict(d_state=16, ssm_ratio=2.0, conv_bias=True, gate=True, mlp_ratio=0.0, stem="patch", downsample="merge")


def make(**kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model("test_vmamba", num_classes=5, **kwargs).eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (65, 40), (7, 9)])
@pytest.mark.parametrize("kwargs", [{}, V0], ids=["v05", "v0"])
def test_any_size_goes_in(size: tuple[int, int], kwargs) -> None:
    model = make(**kwargs)
    assert model(torch.randn(2, 3, *size)).isfinite().all()


def test_patch_merging_takes_neighbours_in_the_official_order() -> None:
    merge = PatchMerging(1, 4)
    torch.nn.init.eye_(merge.reduction.weight)
    merge.norm = torch.nn.Identity()
    image = torch.arange(6.0).view(1, 1, 2, 3)  # 0 1 2 / 3 4 5, odd width padded by zeros
    merged = merge(image)
    assert merged[0, :, 0, 0].tolist() == [0, 3, 1, 4]
    assert merged[0, :, 0, 1].tolist() == [2, 5, 0, 0]


def test_pyramid_backbone_normalises_every_stage_before_downsampling() -> None:
    model = make(out_norms=True)
    x = torch.randn(1, 3, 64, 96)
    plain = model.stages(model.patch_embed(x))
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    assert torch.equal(maps[-1], model.out_norms[-1](plain))
    for feature in maps:  # freshly initialized norms leave unit variance over channels
        assert feature.var(1, unbiased=False).mean().item() == pytest.approx(1, abs=1e-2)
    features = ssmvision.create_model("test_vmamba", features_only=True, out_norms=True, out_indices=(0, 2)).eval()
    assert [f.shape[1] for f in features(x)] == [16, 64]


def test_a_classification_checkpoint_is_not_silently_taken_for_a_pyramid() -> None:
    classifier, pyramid = make(), make(out_norms=True)
    with pytest.raises(RuntimeError, match="out_norms"):
        pyramid.load_state_dict(checkpoint_filter_fn(classifier.state_dict(), pyramid))


def test_old_names_and_pointwise_convolutions_convert() -> None:
    model = make(**V0)
    old = {}
    for key, value in model.state_dict().items():
        stage, _, rest = key.removeprefix("stages.").partition(".")
        if key.startswith("stages."):
            stage = int(stage) - rest.startswith("downsample")
            key = f"layers.{stage}.{rest}".replace(".norm.", ".ln_1.", 1 if ".blocks." in key else 0)
            key = key.replace(".op.", ".self_attention.")
        key = key.replace("patch_embed.conv1", "patch_embed.proj").replace("patch_embed.norm1", "patch_embed.norm")
        key = key.replace("head.fc", "head")
        old[key] = value[..., None, None] if key.endswith("in_proj.weight") else value
    assert any(".ln_1." in key for key in old)
    converted = checkpoint_filter_fn(old, model)
    assert converted.keys() == model.state_dict().keys()
    model.load_state_dict(converted)


def test_detection_checkpoints_carry_a_prefix() -> None:
    model = make(out_norms=True)
    official = {
        f"backbone.{k.replace('out_norms.', 'outnorm')}": v for k, v in model.state_dict().items() if "norms" in k
    }
    assert set(checkpoint_filter_fn(official, model)) == {k for k in model.state_dict() if "norms" in k}


def test_drop_path_rises_over_all_blocks() -> None:
    rates = [b.drop_path.drop_prob for s in make(drop_path_rate=0.4).stages for b in s.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_wrong_number_of_channels_is_named() -> None:
    with pytest.raises(AssertionError, match="number of channels"):
        make(in_chans=1)(torch.randn(1, 3, 32, 32))


OFFICIAL = dict(
    depths=(1, 1), dims=16, num_classes=3, patchembed_version="v2", downsample_version="v3", norm_layer="ln2d"
)


@pytest.mark.parametrize(
    ("kwargs", "shapes"),
    [
        (dict(forward_type="v05"), {"stages.0.blocks.0.op.in_proj.weight": (64, 16)}),
        (dict(forward_type="v05_noz", ssm_dt_rank=5), {"stages.0.blocks.0.op.dt_projs_weight": (4, 32, 5)}),
        (dict(forward_type="v05_noz", ssm_conv=5), {"stages.0.blocks.0.op.conv2d.weight": (32, 1, 5, 5)}),
        (dict(forward_type="v05_noz", downsample_version="v2"), {"stages.1.downsample.conv.weight": (32, 16, 2, 2)}),
        (dict(forward_type="m0_noz", ssm_ratio=1.0, ssm_act_layer="gelu"), {"stages.1.blocks.0.op.A_logs": (4, 2)}),
    ],
)
def test_other_configurations_of_the_official_class(kwargs, shapes) -> None:
    model = from_official("VSSM", OFFICIAL | kwargs).model
    state = model.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert model(torch.randn(1, 3, 33, 40)).shape == (1, 3)


def test_without_a_convolution_the_scan_reads_the_projection() -> None:
    model = from_official("VSSM", OFFICIAL | dict(forward_type="v05_noz", ssm_conv=1)).model
    assert not any("conv2d" in key for key in model.state_dict())
    assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_what_was_never_published_is_refused() -> None:
    with pytest.raises(ValueError, match="gmlp=True"):
        from_official("VSSM", OFFICIAL | dict(gmlp=True))
