"""What LocalVim promises beyond the golden cases."""

import pytest
import torch

import ssmvision
from ssmvision.layers.pos_embed import rotary_table
from ssmvision.models.localvim import checkpoint_filter_fn, from_official

MIDDLE = dict(cls_position="middle", global_pool="token", rope=False)
each_form = pytest.mark.parametrize("kwargs", [{}, MIDDLE], ids=["rope", "class token"])


def make(**kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model("test_localvim", img_size=(48, 80), num_classes=5, **kwargs).eval()


@each_form
@pytest.mark.parametrize("size", [(96, 64), (40, 70), (16, 16), (1, 17)])
def test_any_size_goes_in_and_equals_a_model_built_for_it(size, kwargs):
    model, x = make(**kwargs), torch.randn(2, 3, *size)
    y = model(x)
    model.set_input_size(size)
    assert model.grid_size == (-(-size[0] // 16), -(-size[1] // 16))
    assert torch.equal(model(x), y)


@each_form
def test_batch_entries_do_not_mix(kwargs):
    model, x = make(**kwargs), torch.randn(3, 3, 48, 40)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-6)


@each_form
def test_training_under_autocast_is_finite(kwargs):
    model = make(**kwargs).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 48, 80)).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_columns_are_those_of_the_transposed_image():
    """On maps that are not square, too: there the official code puts columns back in wrong places."""
    orders = {"h": "v", "w2": "w2_flip", "h_flip": "v_flip"}
    rows = make(directions=tuple(orders)[::2], rope=False, pos_embed=False, depth=1, global_pool="")
    columns = make(directions=tuple(orders.values())[::2], rope=False, pos_embed=False, depth=1, global_pool="")
    columns.load_state_dict(rows.state_dict())
    columns.patch_embed.proj.weight.data = columns.patch_embed.proj.weight.data.transpose(2, 3)
    x = torch.randn(1, 3, 48, 80)
    wanted = rows.forward_features(x).unflatten(1, (3, 5))
    found = columns.forward_features(x.transpose(2, 3)).unflatten(1, (5, 3)).transpose(1, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_class_token_is_the_middle_one():
    model, x = make(**MIDDLE), torch.randn(1, 3, 48, 80)
    features = model.forward_features(x)
    assert features.shape[1] == 16
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 7])


OFFICIAL = dict(
    img_size=32, embed_dim=32, depth=2, num_classes=3, if_rope=True, if_rope_residual=True, if_abs_pos_embed=True,
    rms_norm=True, final_pool_type="mean", bimamba_type="v2", mamba_cls="MultiMamba",
    directions=[["h", "v_flip", "w7", "w2_flip"], ["h_flip", "w2", "v", "w7_flip"]],
)  # fmt: skip
OFFICIAL_KEYS = (
    "A_log_{}", "D_{}", "conv1d_{}.weight", "conv1d_{}.bias", "x_proj_{}.weight", "dt_proj_{}.weight", "dt_proj_{}.bias"
)  # fmt: skip


@pytest.mark.parametrize(
    ("kwargs", "shapes"),
    [
        ({}, {"layers.1.mixer.A_logs": (4, 64, 16), "layers.0.mixer.x_proj_weight": (4, 34, 64)}),
        (dict(embed_dim=64, img_size=64), {"layers.1.mixer.conv_weight": (4, 128, 4), "pos_embed": (1, 16, 64)}),
        (dict(depth=1, directions=[["h", "w4"]]), {"layers.0.mixer.Ds": (2, 64), "norm_f.weight": (32,)}),
        (
            dict(if_rope=False, if_cls_token=True, use_middle_cls_token=True, rms_norm=False),
            {"pos_embed": (1, 5, 32), "cls_token": (1, 1, 32), "norm_f.bias": (32,)},
        ),
        (dict(patch_size=8, channels=1, if_abs_pos_embed=False), {"patch_embed.proj.weight": (32, 1, 8, 8)}),
    ],
)
def test_other_configurations_of_the_official_class(kwargs, shapes):
    official = OFFICIAL | kwargs
    model = from_official("VisionMamba", official).model
    state = model.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    size = official["img_size"]
    assert model(torch.randn(1, official.get("channels", 3), size, size)).shape == (1, 3)


def test_branches_are_stacked_in_their_order():
    model = from_official("VisionMamba", OFFICIAL).model
    state = {f"layers.0.mixer.{key.format(i)}": torch.full((2, 1, 3), i) for key in OFFICIAL_KEYS for i in range(4)}
    converted = checkpoint_filter_fn(state, model)
    assert len(converted) == 7
    assert all(value.flatten(1)[:, 0].tolist() == [0, 1, 2, 3] for value in converted.values())
    assert converted["layers.0.mixer.conv_weight"].shape == (4, 2, 3)


def test_the_published_rotations_are_recomputed_and_others_are_reported():
    model = make()
    sin, cos = rotary_table(torch.empty(1, 6, 6, 48), 14).flatten(1, 3)
    state = {"rope.freqs_sin": sin, "rope.freqs_cos": cos}
    assert checkpoint_filter_fn(state, model) == {}
    assert checkpoint_filter_fn(state | {"rope.freqs_cos": cos + 0.1}, model).keys() == {"rope.freqs_cos"}
    assert checkpoint_filter_fn(state, make(**MIDDLE)).keys() == state.keys()


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"cls_position": "first"}, "cls_position must be"),
        ({"cls_position": "middle"}, "rope needs tokens without a class token"),
        ({"directions": [["h"], ["v"]]}, "directions of 2 blocks for 4 blocks"),
        ({"directions": ["h", "d"]}, "not 'd'"),
    ],
)
def test_bad_arguments_get_a_sentence(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"if_rope_residual": False}, "if_rope_residual=False"),
        ({"if_cls_token": True}, "use_middle_cls_token=False"),
        ({"mamba_cls": "MambaMultiScan"}, "mamba_cls='MambaMultiScan'"),
        ({"bimamba_type": "v1"}, "bimamba_type='v1'"),
        ({"directions": None}, "directions=None"),
    ],
)
def test_what_was_never_published_is_refused(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_official("VisionMamba", OFFICIAL | kwargs)
