"""What Mamba-Reg promises beyond the golden case."""

import json
from pathlib import Path

import pytest
import torch

import ssmvision
from ssmvision.models.mamba_reg import checkpoint_filter_fn, from_official

GOLDEN = json.loads((Path(__file__).parents[1] / "parity/mambar/meta.json").read_text())


def make(**kwargs):
    torch.manual_seed(0)
    return ssmvision.create_model("test_mamba_reg", **{"img_size": (48, 80), "num_classes": 5, **kwargs}).eval()


def numbered(model, patches: int) -> torch.Tensor:
    """Tokens whose channels count the patches and then the registers."""
    with torch.no_grad():
        for parameter in (model.patch_embed.proj.weight, model.patch_embed.proj.bias, model.cls_token):
            parameter.zero_()
        model.pos_embed.copy_(torch.arange(patches).view(1, -1, 1).expand_as(model.pos_embed))
        model.pos_embed_cls.copy_(patches + torch.arange(model.num_registers).view(1, -1, 1).expand_as(model.cls_token))
    return model._embed(torch.zeros(2, 3, *(side * 16 for side in model.grid_size)))[0]


def test_registers_stand_where_the_official_code_puts_them() -> None:
    model = from_official("VisionMamba", GOLDEN["kwargs"]).model.eval()
    x = numbered(model, 36)
    assert x[1, :, 0].tolist() == GOLDEN["token_idx"]
    assert [i for i, token in enumerate(x[0, :, 0].tolist()) if token >= 36] == GOLDEN["cls_positions"]


@pytest.mark.parametrize(("size", "registers"), [((48, 80), 4), ((48, 80), 1), ((48, 80), 14), ((32, 32), 12)])
def test_split_takes_registers_out_again(size: tuple[int, int], registers: int) -> None:
    model, patches = make(img_size=size, num_registers=registers), size[0] * size[1] // 256
    cls, rest = model._split(numbered(model, patches))
    assert rest[0, :, 0].tolist() == list(range(patches))
    assert cls[0, :, 0].tolist() == list(range(patches, patches + registers))
    assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_classes_are_read_from_registers_alone() -> None:
    model = make()
    x = model.forward_features(torch.randn(2, 3, 48, 80))
    logits = model.forward_head(x)
    x[:, [i for i in range(19) if i not in (3, 7, 11, 15)]] = torch.nan
    assert torch.equal(model.forward_head(x), logits)
    registers = torch.cat([x[:, i] @ model.neck.weight.T for i in (3, 7, 11, 15)], dim=1)
    torch.testing.assert_close(logits, model.head(model.norm_neck(registers)))


def test_the_neck_follows_the_pooling() -> None:
    model, x = make(), torch.randn(2, 3, 48, 80)
    neck = model.neck.weight
    model.reset_classifier(7)
    assert model.neck.weight is neck
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features) == (2, 96)
    model.reset_classifier(3, "avg")
    assert not {"neck.weight", "norm_neck.weight"} & set(model.state_dict())
    patches = torch.cat([model.forward_features(x)[:, i : i + 3] for i in (0, 4, 8, 12, 16)], dim=1)
    torch.testing.assert_close(model(x), model.head(patches.mean(1)))
    weights = checkpoint_filter_fn(make(num_classes=3).state_dict(), model)
    assert weights.keys() == model.state_dict().keys()
    model.reset_classifier(3, "token")
    assert model(x).shape == (2, 3)


def test_any_size_goes_in_and_equals_a_model_built_for_it() -> None:
    model, x = make(), torch.randn(2, 3, 96, 64)
    logits = model(x)
    model.set_input_size((96, 64))
    assert model.pos_embed.shape[1] == 24
    assert torch.equal(model(x), logits)


def test_other_configurations_of_the_official_class_are_built() -> None:
    official = dict(img_size=(32, 48), patch_size=8, embed_dim=16, depth=2, num_cls_tokens=3, num_classes=4)
    model = from_official("VisionMamba", official).model
    assert model.head.weight.shape == (4, 48)
    assert not {"neck.weight", "norm_neck.weight"} & set(model.state_dict())
    reduced = from_official("VisionMamba", official | {"cls_reduce": 4}).model
    assert {"layers.1.norm.bias", "norm_neck.bias"} < set(reduced.state_dict())
    assert reduced.norm_neck.weight.shape == (12,)
    assert reduced(torch.randn(1, 3, 32, 48)).shape == (1, 4)


def test_what_is_not_built_is_named() -> None:
    with pytest.raises(ValueError, match="norm_epsilon=1e-06 was never published"):
        from_official("VisionMamba", {"norm_epsilon": 1e-6})
    with pytest.raises(ValueError, match="num_registers must be at least 1, not 0"):
        make(num_registers=0)
    with pytest.raises(AssertionError, match="global_pool must be token, avg or max, not 'mean'"):
        make(global_pool="mean")
