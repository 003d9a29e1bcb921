"""Official weights through `create_model`, against the test server, with a toy family in place of a real one."""

import subprocess
import sys
import textwrap
from collections import deque
from pathlib import Path

import pytest
import timm
import torch
from hub_server import torch_bytes

import ssmvision
from ssmvision.hub import CheckpointError, DownloadError
from ssmvision.models import _builder

NAME = "toyssm_a.orig_in1k"


def image(channels=3):
    return torch.randn(1, channels, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reference(toy, official):
    """The toy filled with its official weights by hand."""
    model = toy.ToyNet()
    model.load_state_dict(toy.checkpoint_filter_fn(official, model))
    return model.eval()


@pytest.mark.parametrize("create", [ssmvision.create_model, timm.create_model])
def test_official_file_is_fetched_converted_and_cached(create, reference, hub):
    for _ in range(2):
        model = create(NAME, pretrained=True).eval()
        assert torch.equal(model(image()), reference(image()))
    assert hub.count("GET") == 1


def test_cfg_keeps_its_source_and_no_weights(reference, hub):
    cfg = ssmvision.create_model(NAME, pretrained=True).pretrained_cfg
    assert (cfg["hf_hub_id"], cfg["hf_hub_filename"]) == ("owner/toy", "toy_76p1acc.pth")
    assert "state_dict" not in cfg


def test_new_head_and_new_channels(reference):
    model = ssmvision.create_model(NAME, pretrained=True, num_classes=2, in_chans=1)
    assert model(image(1)).shape == (1, 2)
    assert torch.equal(model.body.weight, reference.body.weight)
    assert torch.allclose(model.stem.weight, reference.stem.weight.sum(1, keepdim=True))
    assert not ssmvision.create_model(NAME, pretrained=True, num_classes=0).state_dict().keys() & {"head.weight"}


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook"])
def test_features_only(feature_cls, reference):
    model = ssmvision.create_model(NAME, pretrained=True, features_only=True, feature_cls=feature_cls)
    features = model(image())
    features = list(features.values()) if isinstance(features, dict) else features
    assert torch.equal(features[0], reference.stem(image()))
    assert not any("state_dict" in getattr(module, "pretrained_cfg", {}) for module in model.modules())


def test_weights_in_place_of_the_published_ones(toy, hub, tmp_path):
    other = toy.official_checkpoint(seed=5)
    file = tmp_path / "local.pth"
    file.write_bytes(torch_bytes(other))
    release = "/owner/toy/releases/download/%23v2cls/toy.pth"
    hub.files[release] = file.read_bytes()
    for overlay in ({"file": str(file)}, {"url": hub.url + release}, {"state_dict": other}):
        model = ssmvision.create_model("toyssm_a.pinned", pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(model.stem.weight, other["patch.weight"]), overlay
        assert "state_dict" not in model.pretrained_cfg
    assert hub.log == [("GET", release)]


def test_tag_as_argument_and_cfg_as_dict(reference):
    cfg = timm.get_pretrained_cfg(NAME)
    for pretrained_cfg in ("orig_in1k", cfg, cfg.to_dict()):
        model = timm.create_model("toyssm_a", pretrained=True, pretrained_cfg=pretrained_cfg)
        assert torch.equal(model.stem.weight, reference.stem.weight)


def test_cache_dir_is_respected(reference, tmp_path):
    ssmvision.create_model(NAME, pretrained=True, cache_dir=tmp_path / "mine")
    assert list((tmp_path / "mine").rglob("toy_76p1acc.pth"))


def test_pinned_digest_is_checked(reference):
    with pytest.raises(DownloadError, match=f"not the published {'0' * 64}"):
        ssmvision.create_model("toyssm_a.pinned", pretrained=True)


def test_timm_exports_take_timms_own_path(reference, tmp_path):
    model = ssmvision.create_model(NAME, pretrained=True)
    timm.models.save_for_hf(model, tmp_path / "export")
    again = ssmvision.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    assert torch.equal(again(image()), reference(image()))
    damaged = {key: value for key, value in model.state_dict().items() if key != "body.bias"}
    torch.save(damaged, tmp_path / "export/pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"1 missing \(body\.bias\)"):  # timm alone is not strict here
        ssmvision.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True, num_classes=2)


def test_every_key_is_accounted_for(toy, hub):
    weights = toy.official_checkpoint()
    weights.pop("trunk.bias")
    hub.add("owner/toy", "toy_76p1acc.pth", torch_bytes(weights))
    for kwargs in ({}, {"num_classes": 2}, {"in_chans": 1}, {"features_only": True}):
        with pytest.raises(CheckpointError, match=r"does not fit toyssm_a, keys: 1 missing \(body\.bias\)\."):
            ssmvision.create_model(NAME, pretrained=True, **kwargs)
    ssmvision.create_model(NAME, pretrained=True, pretrained_strict=False)


def test_wrong_head_is_never_replaced_unasked(toy, hub, tmp_path):
    (tmp_path / "w.pth").write_bytes(torch_bytes(toy.official_checkpoint(classes=4)))
    overlay = {"file": str(tmp_path / "w.pth")}
    with pytest.raises(CheckpointError, match=r"has 4 classes and toyssm_a was built with 7.*num_classes=4"):
        ssmvision.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    overlay["num_classes"] = 4
    assert ssmvision.create_model(NAME, True, pretrained_cfg_overlay=overlay, num_classes=7).head.out_features == 7


def test_models_without_weights_say_so(toy):
    with pytest.raises(RuntimeError, match="No pretrained weights are registered for toyssm_b; use pretrained=False"):
        ssmvision.create_model("toyssm_b", pretrained=True)


def test_weights_that_no_program_can_download_say_where_they_are(reference, official, tmp_path):
    name = "toyssm_a.shared"
    assert name not in ssmvision.list_models(pretrained=True)
    with pytest.raises(RuntimeError) as caught:
        ssmvision.create_model(name, pretrained=True)
    assert str(caught.value) == (
        "No program can download the weights toyssm_a.shared: get them by hand from https://example.org/d/toy/view and "
        "pass pretrained_cfg_overlay=dict(file=...)."
    )
    (tmp_path / "toy.pth").write_bytes(torch_bytes(official))
    overlay = {"file": str(tmp_path / "toy.pth")}
    model = ssmvision.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(model(image()), reference(image()))


def test_licences_that_forbid_commercial_use_are_announced_once(reference, recwarn):
    _builder.announce_licence.cache_clear()
    for _ in range(2):
        ssmvision.create_model("toyssm_a.nc", pretrained=True)
        ssmvision.create_model(NAME, pretrained=True)
    texts = [str(warning.message) for warning in recwarn if "commercial" in str(warning.message)]
    assert texts == ["The weights toyssm_a.nc come under CC BY-NC-SA 4.0, which forbids commercial use."]


@pytest.mark.parametrize(
    ("licence", "forbids"),
    [
        ("apache-2.0", False),
        ("MIT", False),
        ("cc-by-sa-4.0", False),
        ("CC BY-NC-SA 4.0", True),
        ("NVIDIA Source Code License-NC", True),
        ("non-commercial research only", True),
        ("", False),
    ],
)
def test_which_licences_forbid_commercial_use(licence, forbids):
    assert _builder.forbids_commercial_use(licence) is forbids


SCRIPT = """
import importlib.util, sys
import torch, ssmvision
spec = importlib.util.spec_from_file_location("ssmvision.models.toy_hub", sys.argv[1])
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = ssmvision.create_model("toyssm_a.orig_in1k", pretrained=True)
print(model(torch.ones(1, 3, 32, 32)).sum().item())
"""


@pytest.mark.slow
def test_a_fresh_process_loads_online_then_offline(official, reference, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub.faults[hub.path] = deque(["reset"])
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(Path(__file__).with_name("toy_family.py"))]
    online = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert float(online) == pytest.approx(reference(torch.ones(1, 3, 32, 32)).sum().item())
    hub.close()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == online
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cold"))
    cold = subprocess.run(command, check=False, capture_output=True, text=True)
    assert cold.returncode == 1
    assert "owner/toy/toy_76p1acc.pth is not in the cache and HF_HUB_OFFLINE is set" in cold.stderr.splitlines()[-1]
