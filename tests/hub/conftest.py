import importlib.util
import sys
from pathlib import Path

import pytest
from hub_server import HubServer, torch_bytes
from timm.models import _registry

from ssmvision.hub import download

TOY = "ssmvision.models.toy_hub"


@pytest.fixture(scope="session")
def toy_module():
    spec = importlib.util.spec_from_file_location(TOY, Path(__file__).with_name("toy_family.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[TOY] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy(toy_module):
    """The toy family, registered for the time of one test only: other tests look at all that is registered."""
    for fn in (toy_module.toyssm_a, toy_module.toyssm_b):
        if fn.__name__ not in _registry._model_entrypoints:
            _registry.register_model(fn)
    yield toy_module
    for fn in (toy_module.toyssm_a, toy_module.toyssm_b):
        _registry._clear_model_entries(fn.__name__)
        del _registry._model_entrypoints[fn.__name__]


@pytest.fixture
def server():
    hub = HubServer()
    yield hub
    hub.close()


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The test server as the only hub, with empty caches and no pauses between tries."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.0)
    return server


@pytest.fixture
def official(toy, hub):
    """The toy's official training checkpoint, published on the test server; returns its weights."""
    weights = toy.official_checkpoint()
    hub.path = hub.add("owner/toy", "toy_76p1acc.pth", torch_bytes({"model": weights, "epoch": 3}))
    return weights
