"""What Vim promises beyond the golden cases."""

import pytest
import torch

import ssmvision
from ssmvision.layers.pos_embed import resize_pos_embed
from ssmvision.models.vim import checkpoint_filter_fn, from_official


def make(**kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model("test_vim", img_size=(48, 80), num_classes=5, **kwargs).eval()


@pytest.mark.parametrize("cls_position", ["middle", "first", "none"])
def test_the_class_row_keeps_its_place_when_the_grid_changes(cls_position: str) -> None:
    model = make(cls_position=cls_position, global_pool="avg")
    old, new = (3, 5), (6, 4)
    index = {"middle": 7, "first": 0, "none": None}[cls_position]
    # The class row is an outlier among zeros: it must neither move out of place nor leak into its neighbours.
    rows = torch.zeros(1, 15, 48)
    if index is not None:
        rows = torch.cat([rows[:, :index], torch.full((1, 1, 48), 1000.0), rows[:, index:]], dim=1)
    resized = resize_pos_embed(rows, list(new), list(old), index)
    expected = {"middle": 12, "first": 0, "none": None}[cls_position]
    assert resized.shape[1] == 24 + (index is not None)
    peaks = (resized[0, :, 0] > 500).nonzero().flatten().tolist()
    assert peaks == ([] if expected is None else [expected])
    assert resized[0, :, 0].sum() == (0 if expected is None else 1000)
    assert model.pos_embed.shape[1] == 15 + (index is not None)


def test_any_size_goes_in_and_equals_a_model_built_for_it() -> None:
    model = make()
    x = torch.randn(2, 3, 96, 64)
    other = ssmvision.create_model("test_vim", img_size=(96, 64), num_classes=5).eval()
    other.load_state_dict({**model.state_dict(), "pos_embed": resize_pos_embed(model.pos_embed, [6, 4], [3, 5], 7)})
    assert torch.equal(model(x), other(x))
    model.set_input_size((96, 64))
    assert torch.equal(model(x), other(x))


def test_a_square_checkpoint_loads_into_another_size(tmp_path) -> None:

    small = ssmvision.create_model("test_vim", img_size=64)
    large = ssmvision.create_model("test_vim", img_size=96)
    converted = checkpoint_filter_fn(small.state_dict(), large)
    large.load_state_dict(converted)
    assert torch.equal(large.pos_embed[0, 18], small.pos_embed[0, 8]), "class rows are the middle ones"


def test_the_middle_token_is_the_class_token() -> None:
    model = make()
    x = torch.randn(1, 3, 48, 80)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features, pre_logits=True), features[:, 7])
    patches, cls = model.forward_intermediates(
        x, indices=1, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )[0]
    assert torch.equal(cls[:, 0], features[:, 7])
    assert torch.equal(patches, torch.cat([features[:, :7], features[:, 8:]], dim=1))


def test_intermediates_are_maps_in_raster_order() -> None:
    model = make()
    x = torch.randn(1, 3, 48, 80)
    nlc, nchw = (
        model.forward_intermediates(x, indices=[2], output_fmt=fmt, intermediates_only=True)[0]
        for fmt in ("NLC", "NCHW")
    )
    assert nchw.shape == (1, 48, 3, 5)
    assert torch.equal(nchw.flatten(2).transpose(1, 2), nlc)
    assert torch.equal(model.get_intermediate_layers(x, [2])[0], nlc)


def test_drop_path_rates_rise_from_zero_to_the_last_block() -> None:
    model = make(drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for block in model.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_residual_stream_stays_float32_under_autocast() -> None:
    model = make()
    seen = []
    model.layers[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(1, 3, 48, 80))
    assert seen == [torch.float32]
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"cls_position": "left"}, "cls_position must be"),
        ({"global_pool": "mean"}, "global_pool must be"),
        ({"cls_position": "none"}, "needs a class token"),
        ({"img_size": 8}, "smaller than a patch"),
    ],
)
def test_bad_arguments_get_a_sentence(kwargs, sentence: str) -> None:
    with pytest.raises((ValueError, AssertionError), match=sentence):
        ssmvision.create_model("test_vim", **{"img_size": 48, **kwargs})


def test_wrong_number_of_channels_is_named() -> None:
    with pytest.raises(AssertionError, match="number of channels"):
        make()(torch.randn(1, 1, 48, 80))


@pytest.mark.parametrize(("name", "value"), [("if_rope", True), ("bimamba_type", "v1"), ("final_pool_type", "all")])
def test_what_was_never_published_is_refused(name: str, value) -> None:
    official = dict(
        img_size=32, embed_dim=32, depth=1, bimamba_type="v2", final_pool_type="mean", if_abs_pos_embed=True
    )
    assert from_official("VisionMamba", official).model(torch.randn(1, 3, 32, 32)).shape == (1, 1000)
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        from_official("VisionMamba", official | {name: value})


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "vim_small_patch16_stride8_224"])
def test_official_names_still_work(name):
    official = f"{name}_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    with pytest.warns(UserWarning, match=rf"{name}\.midcls_in1k"):
        model = ssmvision.create_model(official, device="meta")
    assert model.pretrained_cfg["tag"] == "midcls_in1k"
    assert official not in ssmvision.list_models()
