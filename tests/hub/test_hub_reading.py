import argparse
import collections
import contextlib
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from hub_server import torch_bytes

from ssmvision.hub import (
    CheckpointError,
    compare_keys,
    extract_state_dict,
    inert_pickle,
    load_state_dict,
    read_checkpoint,
)
from ssmvision.hub.inert_pickle import Placeholder


def weights(value=1.0):
    return {"a.weight": torch.full((2, 3), value), "a.bias": torch.zeros(3)}


class CfgNode(dict):
    """Pickles as a yacs config does: a dict subclass with attributes, from a module that need not be installed."""


class ListNode(list):
    pass


CfgNode.__module__ = ListNode.__module__ = "yacs_config"


@pytest.fixture
def strange_training_dict(monkeypatch):
    """A training checkpoint full of classes, whose module is gone again when it is read."""
    import types

    module = types.ModuleType("yacs_config")
    module.CfgNode, module.ListNode = CfgNode, ListNode
    monkeypatch.setitem(sys.modules, "yacs_config", module)
    config = CfgNode(DATA=CfgNode(BATCH_SIZE=8), AUG=ListNode([1, 2]))
    config.attribute = 3
    return {
        "model": weights(1.0),
        "model_ema": weights(2.0),
        "config": config,
        "max_accuracy": np.float64(82.6),
        "lr": np.arange(3),
        "names": {frozenset([1])},
        "scaler": collections.defaultdict(list, {1: [2]}),
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict(),
        "epoch": 264,
    }


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_any_training_dict_is_read_without_its_classes(strange_training_dict, zipped, tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pth"
    torch.save(strange_training_dict, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "yacs_config")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    checkpoint = read_checkpoint(path)
    assert isinstance(checkpoint["config"], Placeholder)
    assert repr(checkpoint["config"]) == "<yacs_config.CfgNode, not loaded>"
    assert checkpoint["epoch"] == 264
    assert equal(load_state_dict(path), weights(2.0))
    assert equal(load_state_dict(path, use="model"), weights(1.0))


class Bomb:
    """Runs a command when unpickled in the usual way."""

    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


def bombs(marker):
    command = f"touch {marker}"
    return {
        "os.system": Bomb(__import__("os").system, command),
        "eval": Bomb(eval, f"__import__('os').system({command!r})"),
        "exec": Bomb(exec, f"__import__('os').system({command!r})"),
        "popen": Bomb(subprocess.check_output, command.split()),
        "import": Bomb(__import__, "antigravity"),
        "getattr": Bomb(getattr, "text", "upper"),
        "nested load": Bomb(torch.storage._load_from_bytes, b"cos\nsystem\n(S'" + command.encode() + b"'\ntR."),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", bombs("x"))
def test_no_code_of_a_hostile_file_runs(name, zipped, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "bomb.pth"
    torch.save({"model": weights(), "extra": bombs(marker)[name]}, path, _use_new_zipfile_serialization=zipped)
    assert equal(load_state_dict(path), weights())
    assert isinstance(read_checkpoint(path)["extra"], Placeholder)
    assert not marker.exists()


def test_the_bombs_are_live(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "bomb.pth"
    torch.save(bombs(marker)["os.system"], path)
    torch.load(path, weights_only=False)
    assert marker.exists()


HAND_WRITTEN = {
    "instance opcode": b"(ios\nsystem\n(S'touch MARK'\n.",
    "dotted name": b"\x80\x04\x8c\x0bcollections\x8c\x1fOrderedDict.__class__.__bases__\x93.",
    "setstate": b"\x80\x02cos\nsystem\n)\x81}X\x01\x00\x00\x00aX\x01\x00\x00\x00bsb.",
    "extension code": b"\x80\x02\x82\x01.",
    "rewrite a torch class": (
        b"\x80\x02ctorch.nn.parameter\nParameter\nN}X\x08\x00\x00\x00__init__ctorch._utils\n_rebuild_tensor\ns\x86b."
    ),
    "rewrite a torch function": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    ),
    "long memo": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
    "build on allowed": b"\x80\x02ccollections\nOrderedDict\n)R}X\x09\x00\x00\x00__class__cos\nsystem\nsb.",
}


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_hand_written_pickles_do_nothing(name, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "bomb.pth"
    body = HAND_WRITTEN[name].replace(b"MARK", str(marker).encode())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/version", "3\n")
    before = torch.nn.Parameter.__init__, torch._utils._rebuild_tensor.__defaults__
    with pytest.raises(CheckpointError):
        load_state_dict(path)
    assert (torch.nn.Parameter.__init__, torch._utils._rebuild_tensor.__defaults__) == before
    with path.open("rb") as file, contextlib.suppress(Exception):
        torch.load(file, weights_only=False, pickle_module=inert_pickle)
    assert (torch.nn.Parameter.__init__, torch._utils._rebuild_tensor.__defaults__) == before
    assert not marker.exists()


def test_zip_bombs_are_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x00" * 10_000_000)
    with pytest.raises(CheckpointError, match="would unpack to 10 MB"):
        read_checkpoint(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_damaged_bytes_end_in_a_named_error_or_in_tensors(strange_training_dict, zipped, tmp_path):
    body = torch_bytes(strange_training_dict, _use_new_zipfile_serialization=zipped)
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.pth"
    for _ in range(150):
        damaged = bytearray(body)
        for position in rng.integers(0, len(body), 4):
            damaged[position] = rng.integers(0, 256)
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(CheckpointError):
            assert all(isinstance(value, torch.Tensor) for value in load_state_dict(path).values())


def test_torchscript_programs_are_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "m.pt"))
    with pytest.raises(CheckpointError, match="TorchScript program"):
        read_checkpoint(tmp_path / "m.pt")


def test_pickled_modules_are_no_state_dict(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pth")
    with pytest.raises(CheckpointError, match="holds a Placeholder, not a dictionary of weights"):
        load_state_dict(tmp_path / "m.pth")


def test_namespaces_need_no_fallback(tmp_path):
    torch.save({"state_dict": weights(), "args": argparse.Namespace(lr=1)}, tmp_path / "timm.pth.tar")
    assert read_checkpoint(tmp_path / "timm.pth.tar")["args"].lr == 1


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w"])
def test_the_format_is_known_by_content(name, tmp_path):
    safetensors.torch.save_file(weights(), tmp_path / name)
    assert equal(load_state_dict(tmp_path / name), weights())
    torch.save(weights(), tmp_path / name)
    assert equal(load_state_dict(tmp_path / name), weights())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_stripped(prefix):
    wrapped = {prefix + key: value for key, value in weights().items()}
    assert equal(extract_state_dict({"model": wrapped}), weights())


def test_a_submodule_called_module_keeps_its_name():
    named = {"module.weight": torch.ones(1), "head.weight": torch.ones(1)}
    assert equal(extract_state_dict(named), named)


def test_which_weights_are_taken():
    both = {"state_dict": weights(1.0), "state_dict_ema": weights(2.0)}
    assert equal(extract_state_dict(both), weights(2.0))
    assert equal(extract_state_dict(both, use="model"), weights(1.0))
    assert equal(extract_state_dict({"model": weights(), "model_ema": None}), weights())
    with pytest.raises(CheckpointError, match="no averaged weights; its keys are: model"):
        extract_state_dict({"model": weights()}, use="model_ema")
    with pytest.raises(ValueError, match="use must be"):
        extract_state_dict(both, use="ema")


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "network_weights"])
def test_containers_of_official_trainers_are_opened(key):
    assert equal(extract_state_dict({key: weights(), "epoch": 3}), weights())


def test_weights_that_are_not_finite_are_announced(tmp_path):
    torch.save(weights(float("nan")), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=r"NaN or infinity in 1 tensors \(a\.weight\)"):
        load_state_dict(tmp_path / "w.pth")


BAD_FILES = {
    "empty": (b"", "is empty"),
    "web page": (b"<!DOCTYPE html><html>Sign in</html>", "is a web page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "text": (b"hello world, no weights here", "damaged or no checkpoint"),
    "cut zip": (torch_bytes(weights())[:700], "damaged or no checkpoint"),
    "cut safetensors": (safetensors.torch.save(weights())[:-4], "damaged or no checkpoint"),
    "huge header": (b"\xff" * 7 + b"\x00{" + b" " * 80, "damaged or no checkpoint"),
    "number": (pickle.dumps(3), "damaged or no checkpoint"),
    "deep": (b"\x80\x02" + b"(" * 100000 + b"." * 3, "damaged or no checkpoint"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_in_one_sentence(name, tmp_path):
    body, message = BAD_FILES[name]
    path = tmp_path / "bad.pth"
    path.write_bytes(body)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_state_dict(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_files_and_folders(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_state_dict(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="is not a file"):
        load_state_dict(tmp_path)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ([1, 2], "holds a list, not a dictionary of weights"),
        ({"epoch": 3, "note": "x"}, r"entries that are no tensors \(epoch, note\)"),
        ({"model": {}}, "no tensors; its keys are: model"),
    ],
)
def test_files_without_weights(checkpoint, message, tmp_path):
    torch.save(checkpoint, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=message):
        load_state_dict(tmp_path / "w.pth")


def test_key_report():
    model = {f"k{i}": torch.zeros(2) for i in range(8)} | {"head.weight": torch.zeros(3, 2)}
    report = compare_keys({"k0": torch.zeros(2), "new": torch.zeros(1), "head.weight": torch.zeros(5, 2)}, model)
    assert not report.ok
    assert report.summary() == (
        "keys: 7 missing (k1, k2, k3, k4, k5, ...), 1 surplus (new), "
        "1 of another shape (head.weight (5, 2) instead of (3, 2))"
    )
    assert report.without("head").mismatched == ()
    assert compare_keys(model, model).ok
    assert compare_keys(model, model).summary() == "all keys match"
