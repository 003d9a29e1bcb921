"""Tests that timm wrote for a fixed list of its own models, called with ours.

Runs beside a copy of timm's `test_models.py` and `test_model_input.py`; see `test_contract.py`.
"""

import contract_plugin
import pytest
import timm
import timm_model_input
import timm_models
import torch
from timm.models import save_for_hf

on_every_model = pytest.mark.parametrize("model_name", contract_plugin.MODELS)
on_pyramids = pytest.mark.parametrize(
    "model_name", sorted(set(contract_plugin.MODELS) - set(contract_plugin.ISOTROPIC))
)
on_isotropic = pytest.mark.parametrize("model_name", contract_plugin.ISOTROPIC)


@pytest.fixture
def at_size(monkeypatch):
    """Build token models for the input size that a timm test hard-codes."""

    def build_at(model_name: str, size: int) -> None:
        extra = {"img_size": size} if model_name in contract_plugin.ISOTROPIC else {}
        monkeypatch.setattr(timm_models, "create_model", lambda name, **kw: timm.create_model(name, **kw, **extra))

    return build_at


@on_every_model
@pytest.mark.parametrize(
    ("check", "size"),
    [
        ("test_reset_classifier_keeps_pool", 64),
        ("test_feature_getter_stage_ends_torchscript", 96),
    ],
)
def test_at_fixed_size(check, size, model_name, at_size):
    at_size(model_name, size)
    getattr(timm_models, check)(model_name)


@on_every_model
def test_forward_after_prune_intermediate_layers(model_name, at_size, monkeypatch):
    # It expects the last tap to be the model's features. That needs a trunk without a final norm: timm's resnetv2 would
    # fail it, too.
    at_size(model_name, 128)
    create_model = timm_models.create_model

    def without_final_norm(name):
        model = create_model(name)
        model.norm = torch.nn.Identity()
        return model

    monkeypatch.setattr(timm_models, "create_model", without_final_norm)
    timm_models.test_forward_after_prune_intermediate_layers(model_name)


@on_every_model
@pytest.mark.parametrize("check", ["test_head_hidden_size", "test_model_init_weights_after_to_empty"])
def test_at_64_with_kwargs(check, model_name, at_size):
    at_size(model_name, 64)
    getattr(timm_models, check)(model_name, {})


@on_every_model
def test_headless_checkpoint_reload(model_name):
    timm_models.test_headless_checkpoint_reload(model_name, {})


@on_every_model
def test_prune_intermediate_layers_params_used(model_name):
    timm_models.test_prune_intermediate_layers_params_used(model_name)


@on_pyramids
def test_features_only_grad_checkpointing_backward(model_name):
    # timm's wrapper for token models (FeatureGetterNet) has no set_grad_checkpointing.
    timm_models.test_features_only_grad_checkpointing_backward(model_name)


@on_isotropic
def test_hub_round_trip_after_resize(model_name, tmp_path):
    size = timm.models.get_pretrained_cfg_value(model_name, "input_size")[-1]
    timm_model_input.test_default_resize_hub_roundtrip(tmp_path, model_name, {}, size, 2 * size)


@on_every_model
def test_hub_round_trip_of_another_stem_and_head(model_name, tmp_path):
    model = timm.create_model(model_name, in_chans=4, num_classes=5).eval()
    save_for_hf(model, tmp_path)
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 4, *model.pretrained_cfg["input_size"][-2:])
    with torch.no_grad():
        torch.testing.assert_close(restored(x), model(x), rtol=0, atol=0)
