import inspect

import pytest
import timm
import torch

import ssmvision
from ssmvision import registry


def family_names():
    return [name for name in ssmvision.list_models() if timm.is_model(name)]


def test_signatures_are_timms():
    for ours, theirs in (
        (registry.create_model, timm.create_model),
        (registry.list_models, timm.list_models),
        (registry.is_model, timm.is_model),
    ):
        ours, theirs = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


def test_only_our_names_are_listed():
    names = ssmvision.list_models()
    assert all(ssmvision.is_model(name) for name in names)
    assert {name for name in names if timm.is_model(name)} == {n for n in timm.list_models() if ssmvision.is_model(n)}
    assert not set(names) & {"resnet18", "efficientvim_m1", "test_vit"}
    assert not ssmvision.is_model("resnet18")
    assert not ssmvision.is_model("no_such_model")


def test_no_family_takes_a_module_name_of_timms():
    ours = {timm.models.model_entrypoint(name).__module__ for name in family_names()}
    everyone = {name: timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    short = {module.rpartition(".")[2] for module in ours}
    assert not [name for name, module in everyone.items() if module not in ours and module.rpartition(".")[2] in short]


@pytest.mark.parametrize("family", ["mambavision", "videomamba", "vim", "vmamba"])
def test_filters(family):
    names = ssmvision.list_models(module=family)
    if not names:
        pytest.skip(f"{family} is not registered")
    assert set(ssmvision.list_models(f"{family}_*")) <= set(names)
    assert f"test_{family}" in names
    assert f"test_{family}" not in ssmvision.list_models(exclude_filters="test_*")
    tagged = ssmvision.list_models(f"{family}_*", pretrained=True)
    assert tagged
    assert all("." in name and ssmvision.is_model(name) for name in tagged)


@pytest.mark.parametrize("create", [timm.create_model, ssmvision.create_model])
def test_one_line_builds_our_models_and_timms(create):
    for name in [name for name in family_names() if name.startswith("test_")] + ["test_vit"]:
        assert sum(p.numel() for p in create(name, num_classes=3).parameters()) < 2e6


def test_timm_works_unchanged():
    """A third-party package must leave what timm itself does alone."""
    assert "test_resnet" in timm.list_models("test_res*")
    model = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2))
    assert [tuple(f.shape[2:]) for f in model(torch.zeros(1, 3, 32, 32))] == [(8, 8), (4, 4)]
    for name in [name for name in family_names() if name.startswith("test_")]:
        features = timm.create_model(name, features_only=True, feature_cls="getter")(torch.zeros(1, 3, 160, 160))
        assert all(feature.ndim == 4 for feature in features)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet_18", r"There is no model named 'resnet_18'; did you mean resnet18"),
        ("resnet18.nope", r"resnet18 has no weights tagged 'nope'; its names are: resnet18\.a1_in1k"),
        ("qqqqqq", r"There is no model named 'qqqqqq'; ssmvision\.list_models\(\) lists the names\."),
    ],
)
def test_unknown_names_get_advice(name, message):
    with pytest.raises(RuntimeError, match=message):
        ssmvision.create_model(name)


def test_near_names_are_ours_first():
    names = [name for name in family_names() if not name.startswith("test_")]
    if not names:
        pytest.skip("no family is registered")
    with pytest.raises(RuntimeError, match=f"did you mean.*{names[0]}"):
        ssmvision.create_model(names[0][:-1] + "_" + names[0][-1])


@pytest.mark.parametrize("name", ["owner/name", "ftp:owner/name", "hf-hub:"])
def test_malformed_sources_are_refused(name):
    with pytest.raises(ValueError, match=r"source|prefix"):
        ssmvision.create_model(name)


def test_exports_of_unknown_architectures_say_so(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vim_gigantic", "pretrained_cfg": {}}')
    with pytest.raises(
        RuntimeError, match=r"holds weights of an unknown architecture\. There is no model named 'vim_gig"
    ):
        ssmvision.create_model(f"local-dir:{tmp_path}")
