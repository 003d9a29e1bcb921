"""What MLLA, VSSD and Spatial-Mamba promise beyond the golden cases."""

import pytest
import torch

import ssmvision
from ssmvision.models import mlla, spatial_mamba, vssd

FAMILIES = {"mlla": mlla, "vssd": vssd, "spatial_mamba": spatial_mamba}
each_family = pytest.mark.parametrize("family", FAMILIES)


def make(family, **kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model(f"test_{family}", num_classes=5, **kwargs).eval()


@each_family
def test_any_size_goes_in_and_sides_are_rounded_up(family):
    model = make(family)
    maps = model.forward_intermediates(torch.randn(2, 3, 65, 34), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 17, 9), (32, 9, 5), (64, 5, 3), (128, 3, 2)]
    assert model(torch.randn(1, 3, 7, 9)).isfinite().all()


@each_family
def test_batch_entries_do_not_mix(family):
    model, x = make(family), torch.randn(3, 3, 48, 40)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-6)


@each_family
def test_drop_path_rises_over_all_blocks(family):
    rates = [b.drop_path.drop_prob for s in make(family, drop_path_rate=0.4).stages for b in s.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@each_family
def test_training_under_autocast_is_finite(family):
    model = make(family).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 32, 48)).float().square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_stages_and_mixers_must_agree():
    with pytest.raises(ValueError, match="MLLA: 3 depths, 3 dims and the mixers of 4 stages"):
        make("mlla", depths=(1, 1, 1))
    with pytest.raises(ValueError, match=r"mixers must be 'ssd' or 'attention', not \['conv'\]"):
        make("vssd", mixers=("ssd", "conv", "ssd", "attention"))


OFFICIAL = {
    "mlla": dict(img_size=32, embed_dim=8, depths=[1, 1], num_heads=[2, 4], num_classes=5),
    "vssd": dict(
        embed_dim=8, depths=[1, 1], num_heads=[2, 4], num_classes=5, attn_types=["standard", "mamba2"], d_state=4,
        linear_attn_duality=True, ssd_positve_dA=True,
    ),
    "spatial_mamba": dict(dims=[8, 24], depths=[1, 1], num_classes=5, d_state=1),
}  # fmt: skip


@each_family
def test_other_configurations_of_the_official_class_are_built(family):
    official = FAMILIES[family].from_official("", OFFICIAL[family])
    seen = {}
    for name in ("patch_embed", "layers.0.blocks.0", "layers.0", "layers.1"):
        (tap,) = official.taps(name)
        official.model.get_submodule(tap.module).register_forward_hook(
            lambda module, inputs, output, name=name, tap=tap: seen.update({name: tap.read(inputs, output)})
        )
    assert official.model(torch.randn(1, 3, 32, 48)).shape == (1, 5)
    wide = 24 if family == "spatial_mamba" else 16
    shapes = [(1, 8, 12, 8), (1, 8, 12, 8), (1, 4, 6, wide), (1, 4, 6, wide)]
    if family != "spatial_mamba":
        shapes = [(b, h * w, c) for b, h, w, c in shapes]
    assert [tuple(t.shape) for t in seen.values()] == shapes
    with pytest.raises(ValueError, match=r"has no module 'layers\.0\.attn'"):
        official.taps("layers.0.attn")


def test_the_rotations_of_an_exported_program_follow_the_image_size():
    model, auto = make("mlla", dims=8, depths=(1,), num_heads=(2,)), torch.export.Dim.AUTO
    example = (torch.randn(2, 3, 32, 48),)
    program = torch.export.export(model, example, dynamic_shapes={"x": {0: auto, 2: auto, 3: auto}})
    x = torch.randn(3, 3, 48, 32)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("mlla", "ape", True),
        ("vssd", "linear_attn_duality", False),
        ("vssd", "simple_downsample", True),
        ("spatial_mamba", "d_state", 16),
    ],
)
def test_what_was_never_published_is_refused(family, name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} was never published"):
        FAMILIES[family].from_official("", OFFICIAL[family] | {name: value})


def with_rotations(model):
    """Our weights of MLLA under official keys, as far as the filter cares, with the official table."""
    state = {f"layers.{key.removeprefix('stages.')}": x for key, x in model.state_dict().items() if ".mixer.qk" in key}
    grid = torch.arange(8.0)
    angles = torch.cat(
        [t[..., None] / 10000 ** (torch.arange(4) / 4) for t in torch.meshgrid(grid, grid, indexing="ij")], 2
    )
    return state | {"layers.0.blocks.0.attn.rope.rotations": torch.stack([angles.cos(), angles.sin()], dim=3)}


def test_the_published_rotations_are_recomputed_and_others_are_reported():
    model = make("mlla")
    state = with_rotations(model)
    assert not [key for key in mlla.checkpoint_filter_fn(state, model) if "rope" in key]
    state["layers.0.blocks.0.attn.rope.rotations"][3, 2, 1, 0] += 0.1
    assert [key for key in mlla.checkpoint_filter_fn(state, model) if "rope" in key] == [
        "stages.0.blocks.0.mixer.rope.rotations"
    ]


def test_fusion_padding_reaches_every_block_and_defaults_to_the_official_one():
    x = torch.randn(2, 3, 64, 64)
    official, replicate, zeros = (
        make("spatial_mamba", **kw) for kw in ({}, *({"fusion_padding": p} for p in ("replicate", "zeros")))
    )
    assert torch.equal(official(x), zeros(x))
    assert not torch.allclose(official(x), replicate(x))
    for block in (b for s in official.stages for b in s.blocks):
        block.mixer.state_fusion.train()
    assert torch.equal(official(x), replicate(x))
