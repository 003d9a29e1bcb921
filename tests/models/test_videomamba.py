"""What VideoMamba promises beyond the golden cases."""

import pytest
import safetensors.torch
import timm
import torch

import ssmvision
from ssmvision.hub import CheckpointError
from ssmvision.layers.pos_embed import resize_temporal_embed
from ssmvision.models.videomamba import (
    VideoMambaDistilled,
    VideoMambaPretrain,
    checkpoint_filter_fn,
    from_official,
)

SIZE = (32, 48)  # 2 × 3 patches


def make(name: str = "test_videomamba_video", **kwargs):
    torch.manual_seed(0)
    model = ssmvision.create_model(name, **{"img_size": SIZE, "num_classes": 5, **kwargs}).eval()
    if name == "test_videomamba_video":
        torch.nn.init.normal_(getattr(model, "model", model).temporal_pos_embedding)  # zeros would hide mistakes
    return model


def clips(frames: int, size=SIZE) -> torch.Tensor:
    return torch.randn(2, 3, frames, *size)


def test_time_is_interpolated_linearly() -> None:
    steps = torch.tensor([0.0, 1.0]).view(1, 2, 1)
    assert resize_temporal_embed(steps, 4).flatten().tolist() == [0, 0.25, 0.75, 1]
    assert resize_temporal_embed(steps.bfloat16(), 1).dtype == torch.bfloat16


@pytest.mark.parametrize(("frames", "size"), [(7, SIZE), (4, (64, 32)), (1, (16, 16))])
def test_any_number_of_frames_and_any_size_equal_a_model_built_for_them(frames: int, size) -> None:
    model, x = make(), clips(frames, size)
    interpolated = model(x)
    model.set_input_size(size, num_frames=frames)
    assert model.temporal_pos_embedding.shape[1] == frames
    assert torch.equal(model(x), interpolated)
    built = make(num_frames=frames, img_size=size)
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(x), interpolated)


def test_the_order_of_frames_matters() -> None:
    model, x = make(), clips(4)
    assert not torch.allclose(model(x), model(x.flip(2)))


def test_feature_maps_keep_time() -> None:
    model, x = make(), clips(4)
    for block in model.layers:
        torch.nn.init.zeros_(block.mixer.out_proj.weight)  # tokens stay as embedded: position in, position out
    changed = x.clone()
    changed[:, :, 2, :16, 16:32] += 1
    maps, others = (model.forward_intermediates(v, [1], intermediates_only=True)[0] for v in (x, changed))
    assert maps.shape == (2, 48, 4, 2, 3)
    assert (maps != others).any(1)[0].nonzero().tolist() == [[2, 0, 1]]
    tokens = model.forward_intermediates(x, [1], output_fmt="NLC", intermediates_only=True)[0]
    assert torch.equal(tokens.transpose(1, 2).unflatten(2, (4, 2, 3)), maps)
    assert torch.equal(make(features_only=True, out_indices=[1])(x)[0], make().forward_intermediates(x)[1][1])


def test_an_image_is_a_clip_of_one_frame() -> None:
    model, image = make(), torch.randn(2, 3, *SIZE)
    assert torch.equal(model(image), model(image.unsqueeze(2)))
    (of_image,), (of_clip,) = (
        model.forward_intermediates(x, 1, intermediates_only=True) for x in (image, image.unsqueeze(2))
    )
    assert of_image.shape == (2, 48, 2, 3)
    assert torch.equal(of_image, of_clip.squeeze(2))


def test_tubelets_span_frames() -> None:
    model = make(tubelet_size=2, num_frames=6)
    assert model.temporal_pos_embedding.shape[1] == 3
    assert model.forward_intermediates(clips(8), 1)[1][0].shape == (2, 48, 4, 2, 3)
    with pytest.raises(AssertionError, match="fewer frames than a tubelet"):
        model(torch.randn(1, 3, *SIZE))
    with pytest.raises(ValueError, match=r"1 frames are fewer than a tubelet \(2\)"):
        make(tubelet_size=2, num_frames=1)


@pytest.mark.parametrize(("tubelet", "middle"), [(1, 0), (2, 1), (3, 1)])
def test_an_image_model_is_inflated(tubelet: int, middle: int, tmp_path) -> None:
    images = make("test_videomamba", num_classes=7)
    safetensors.torch.save_file(images.state_dict(), tmp_path / "images.safetensors")
    image = torch.randn(2, 3, *SIZE)
    clip = clips(tubelet)
    clip[:, :, middle] = image
    model = ssmvision.create_model(
        "test_videomamba_video", img_size=SIZE, num_classes=5, tubelet_size=tubelet, num_frames=2 * tubelet,
        checkpoint_path=tmp_path / "images.safetensors",
    ).eval()  # fmt: skip
    torch.testing.assert_close(model.forward_features(clip), images.forward_features(image))
    assert model.temporal_pos_embedding.count_nonzero() == 0
    assert model.head.weight.shape == (5, 48)
    assert model.head.weight.count_nonzero() > 0


def test_inflation_accounts_for_every_other_key() -> None:
    images = make("test_videomamba").state_dict()
    del images["layers.1.mixer.D_b"]
    model = make()
    with pytest.raises(RuntimeError, match=r"layers\.1\.mixer\.D_b"):
        model.load_state_dict(checkpoint_filter_fn(images, model))


def test_weights_load_into_other_sizes_and_frames() -> None:
    small, large = make(img_size=32, num_frames=2), make(img_size=64, num_frames=6)
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    assert torch.equal(large.pos_embed[0, 0], small.pos_embed[0, 0])
    torch.testing.assert_close(large.temporal_pos_embedding[:, ::5], small.temporal_pos_embedding)
    x = clips(6, (64, 64))
    torch.testing.assert_close(large(x), small(x))


def test_weights_of_clips_adapt_to_other_channels(tmp_path) -> None:
    model = make()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "clips.safetensors")
    grey = ssmvision.create_model(
        "test_videomamba_video", pretrained=True, img_size=SIZE, in_chans=1, num_classes=5,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "clips.safetensors"), num_classes=5),
    ).eval()  # fmt: skip
    x = torch.randn(1, 1, 4, *SIZE)
    torch.testing.assert_close(grey(x), model(x.expand(-1, 3, -1, -1, -1)))


def test_tags_set_size_frames_and_classes() -> None:
    model = ssmvision.create_model("videomamba_tiny_patch16_video.k400_f64_384", device="meta")
    assert model.temporal_pos_embedding.shape == (1, 64, 192)
    assert model.pos_embed.shape == (1, 1 + 24 * 24, 192)
    assert model.num_classes == 400
    assert ssmvision.create_model("videomamba_small_patch16.in1k_576", device="meta").grid_size == (36, 36)
    fewer = ssmvision.create_model("videomamba_tiny_patch16_video.ssv2_f16", num_frames=4, img_size=64, device="meta")
    assert (fewer.temporal_pos_embedding.shape[1], fewer.grid_size, fewer.num_classes) == (4, (4, 4), 174)


def test_official_names_still_work() -> None:
    with pytest.warns(UserWarning, match=r"videomamba_tiny_patch16_video\.ssv2_f16_288"):
        model = timm.create_model("videomamba_t16_ssv2_f16_res224to288", device="meta")
    assert (model.temporal_pos_embedding.shape[1], model.grid_size) == (16, (18, 18))


def test_an_export_keeps_its_frames(tmp_path) -> None:
    model = make()
    model.set_input_size(num_frames=7)
    timm.models.save_for_hf(model, tmp_path)
    restored = ssmvision.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert restored.temporal_pos_embedding.shape[1] == 7
    x = clips(7)
    assert torch.equal(restored(x), model(x))


def test_every_parameter_learns_from_clips_with_and_without_checkpointing() -> None:
    model, x = make(), clips(4)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.train()(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert gradients[0].keys() == model.state_dict().keys()
    # At the last block the class token, the first of the sequence, sees no state of the forward scan.
    assert [n for n, g in gradients[0].items() if not g.any()] == ["layers.3.mixer.A_log"]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_clips_script_compile_and_export() -> None:
    model, x = make(depth=1), clips(4)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(batch,)).module()
    many = torch.cat([x, -x])
    torch.testing.assert_close(exported(many), model(many))


def test_positions_decay_nowhere_and_belong_to_the_stem() -> None:
    model = make()
    assert {"pos_embed", "temporal_pos_embedding", "cls_token"} <= model.no_weight_decay()
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["temporal_pos_embedding"] == groups["pos_embed"] == groups["patch_embed.proj.weight"] == 0
    assert groups["layers.1.norm.weight"] == 2


def test_a_student_imitates_its_teacher_and_leaves_that_head_behind() -> None:
    student = VideoMambaDistilled(teacher_dim=8, img_size=SIZE, embed_dim=48, depth=4, num_classes=5).eval()
    logits, tokens = student(torch.randn(2, 3, *SIZE))
    assert tokens.shape == (2, 7, 8)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(2, 7))
    plain = make("test_videomamba")
    plain.load_state_dict(checkpoint_filter_fn(student.state_dict(), plain))
    image = torch.randn(2, 3, *SIZE)
    assert torch.equal(plain(image), student(image)[0])
    assert logits.shape == (2, 5)


def pretraining(**kwargs) -> VideoMambaPretrain:
    torch.manual_seed(0)
    return VideoMambaPretrain(
        teacher_dim=8, img_size=SIZE, num_frames=4, **{"embed_dim": 48, "depth": 4, **kwargs}
    ).eval()


def hide(*tokens: int) -> torch.Tensor:
    mask = torch.zeros(2, 25, dtype=torch.bool)
    mask[:, list(tokens)] = True
    return mask


def test_hidden_tokens_are_not_seen() -> None:
    model, x = pretraining(num_decoders=2, decoder_interval=2), clips(4)
    features = model(x, hide(5, 24))
    assert features.shape == (2, 2, 23, 8)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 2, 23))
    changed = x.clone()
    changed[:, :, 3, 16:, 32:] += 1  # the last patch, token 24
    assert torch.equal(model(changed, hide(5, 24)), features)
    assert not torch.equal(model(changed, hide(5, 23)), model(x, hide(5, 23)))
    assert model(x).shape == (2, 2, 25, 8)


def test_bad_masks_get_a_sentence() -> None:
    model, uneven = pretraining(), hide(3, 4)
    uneven[1, 3] = False
    with pytest.raises(ValueError, match=r"different numbers of tokens visible in the clips: \[23, 24\]"):
        model(clips(4), uneven)
    with pytest.raises(ValueError, match=r"not \(b, 25\): a class token and 24 patches"):
        model(clips(4), torch.zeros(2, 24))


@pytest.mark.parametrize("decode_last_input", [True, False])
def test_what_the_official_decoder_leaves_untrained(decode_last_input: bool) -> None:
    model = pretraining(decode_last_input=decode_last_input)
    (model(clips(4)) * torch.randn(8)).sum().backward()
    untrained = {name for name, p in model.named_parameters() if p.grad is None}
    last = {name for name in model.state_dict() if name.startswith(("layers.3.", "norm_f."))}
    assert untrained == (last if decode_last_input else set())


def test_fine_tuning_starts_from_pretraining() -> None:
    pretrained, model = pretraining(), make()
    official = {
        k.replace("norm_f", "norm") if k.startswith("norm_f") else k: v for k, v in pretrained.state_dict().items()
    }
    model.load_state_dict(checkpoint_filter_fn(official, model))
    x = clips(4)
    assert torch.equal(model.forward_features(x), pretrained.forward_features(x))
    official["layers.9.norm.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"layers\.9"):
        model.load_state_dict(checkpoint_filter_fn(official, model))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: make(img_size=8), "VideoMamba: image size .* is smaller than a patch"),
        (lambda: make(global_pool="mean"), "global_pool must be"),
        (lambda: make()(torch.randn(1, 1, 4, *SIZE)), "number of channels"),
        (lambda: pretraining(num_classes=3), "has no classifier"),
        (lambda: pretraining(num_decoders=3, decoder_interval=2), "4 blocks do not have 3 that are 2 apart"),
    ],
)
def test_mistakes_get_a_sentence(build, sentence: str) -> None:
    with pytest.raises((ValueError, AssertionError), match=sentence):
        build()


def test_a_misfit_is_named(tmp_path) -> None:
    safetensors.torch.save_file(make().state_dict(), tmp_path / "clips.safetensors")
    with pytest.raises(CheckpointError, match="temporal_pos_embedding"):
        make("test_videomamba", checkpoint_path=tmp_path / "clips.safetensors")


IMAGES, CLIPS = "image_sm/models/videomamba.py:VisionMamba", "video_sm/models/videomamba.py:VisionMamba"
PRETRAIN = "video_sm/models/videomamba_pretrain.py:VisionMamba"
TINY = dict(img_size=32, embed_dim=32, depth=2)


def test_other_configurations_of_the_official_classes() -> None:
    layer_norm = from_official(IMAGES, TINY | dict(rms_norm=False, patch_size=8, channels=1, drop_path_rate=0.1)).model
    assert layer_norm(torch.randn(1, 1, 32, 32)).shape == (1, 1000)
    assert "layers.0.norm.bias" in layer_norm.state_dict()
    tubelets = from_official(CLIPS, TINY | dict(kernel_size=2, num_frames=8, fc_drop_rate=0.5, num_classes=3)).model
    assert tubelets.eval()(torch.randn(1, 3, 8, 32, 32)).shape == (1, 3)
    decoders = dict(clip_return_layer=2, clip_norm_type="none", clip_decoder_embed_dim=32, clip_output_dim=7)
    features = from_official(PRETRAIN, TINY | decoders).model(torch.randn(1, 3, 8, 32, 32))
    assert features.shape == (2, 1, 33, 7)
    torch.testing.assert_close(features.norm(dim=-1), torch.full((2, 1, 33), 7**0.5), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("official_class", "kwargs", "sentence"),
    [
        (IMAGES, dict(bimamba=False), "bimamba=False"),
        (IMAGES, dict(norm_epsilon=1e-6), "norm_epsilon=1e-06"),
        (IMAGES, dict(num_frames=8), "num_frames"),
        (PRETRAIN, dict(clip_decoder_embed_dim=64), "read 64 channels and its blocks give 32"),
        ("video_mm/models/videomamba.py:VisionMamba", {}, "videos and texts"),
    ],
)
def test_what_was_never_published_is_refused(official_class: str, kwargs, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        from_official(official_class, TINY | kwargs)
