"""What GroupMamba promises beyond the golden cases."""

import pytest
import torch

import ssmvision
from ssmvision.models.groupmamba import checkpoint_filter_fn, from_official


def make(**kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model("test_groupmamba", num_classes=5, **kwargs).eval()


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
        loss = model(torch.randn(2, 3, 64, 48)).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_logits_are_the_mean_of_two_classifiers_of_the_refined_token():
    model, x = make(), torch.randn(2, 3, 64, 48)
    maps = model.forward_features(x)
    token = model.head.norm(model.head.block(maps.mean((2, 3))))
    assert torch.equal(model.forward_head(maps, pre_logits=True), token)
    one, two = model.get_classifier()
    torch.testing.assert_close(model(x), (one(token) + two(token)) / 2)


def test_without_pooling_classifiers_read_every_pixel():
    model, x = make(), torch.randn(2, 3, 64, 96)
    model.reset_classifier(7, "")
    maps = model.forward_features(x)
    logits = model(x)
    assert logits.shape == (2, 7, 2, 3)
    one, two = model.get_classifier()
    torch.testing.assert_close(logits[:, :, 1, 2], (one(maps[:, :, 1, 2]) + two(maps[:, :, 1, 2])) / 2)
    with pytest.raises(AssertionError, match="pooling 'catavgmax' changes the number of channels"):
        model.reset_classifier(7, "catavgmax")


def test_gradients_of_maps_that_are_not_square_are_those_of_finite_differences():
    """The official ones are not."""
    model = make().double()
    x = torch.randn(1, 3, 32, 64, dtype=torch.float64, requires_grad=True)
    toward = torch.randn_like(x)
    (slope,) = torch.autograd.grad(model(x).square().sum(), x)
    with torch.no_grad():
        after, before = (model(x + step * toward).square().sum() for step in (1e-6, -1e-6))
    torch.testing.assert_close((slope * toward).sum(), (after - before) / 2e-6, rtol=1e-5, atol=1e-9)


def test_the_norm_that_ends_an_official_stage_begins_the_next_or_the_head():
    x = torch.zeros(1)
    official = ["block1.0.norm2.bias", "block2.3.norm2.bias", "norm1.bias", "norm2.bias", "patch_embed2.norm.bias"]
    assert list(checkpoint_filter_fn(dict.fromkeys(official, x), make())) == [
        "stages.0.blocks.0.norm2.bias",
        "stages.1.blocks.3.norm2.bias",
        "stages.1.downsample.norm1.bias",
        "head.norm.bias",
        "stages.1.downsample.norm2.bias",
    ]


OFFICIAL = dict(
    stem_hidden_dim=8, embed_dims=[16, 32], mlp_ratios=[2, 3], depths=[1, 2], num_classes=3,
    norm_layer="LayerNorm eps 1e-6",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kwargs", "shapes"),
    [
        ({}, {"stages.1.blocks.1.mlp.fc1.weight": (96, 32), "head.block.mlp.fc1.weight": (96, 32)}),
        (dict(embed_dims=[16, 84]), {"stages.1.blocks.0.attn.mixer.x_proj_weight": (4, 4, 21)}),
        (dict(stem_hidden_dim=12), {"patch_embed.conv1.conv.weight": (12, 3, 7, 7)}),
        (
            dict(depths=[1, 1, 1, 1], embed_dims=[16, 16, 32, 64], mlp_ratios=[2, 2, 2, 2]),
            {"head.norm.weight": (64,), "stages.3.blocks.0.attn.fc1.weight": (4, 64)},
        ),
    ],
)
def test_other_configurations_of_the_official_class(kwargs, shapes):
    model = from_official("GroupMamba", OFFICIAL | kwargs).model.eval()
    state = model.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    assert model(torch.randn(1, 3, 33, 40)).shape == (1, 3)


def test_bad_arguments_get_a_sentence():
    with pytest.raises(ValueError, match="norm_layer='BatchNorm' was never published"):
        from_official("GroupMamba", OFFICIAL | {"norm_layer": "BatchNorm"})
    with pytest.raises(ValueError, match="4 dims, 2 depths and 4 mlp_ratios"):
        make(depths=(1, 1))
