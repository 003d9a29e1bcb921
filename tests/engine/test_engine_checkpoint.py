import pickle

import numpy as np
import pytest
import torch

from ssmvision.engine import ResumeError, load_checkpoint, save_checkpoint
from ssmvision.engine.checkpoint import atomic_write, rng_state, set_rng_state

STATE = {"position": {"epoch": 1}, "state_dict": {"weight": torch.arange(2000.0)}}


class Cut(Exception):
    pass


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 8000])
def test_a_cut_while_writing_leaves_the_old_checkpoint(tmp_path, size):
    path = tmp_path / "last.pth"
    save_checkpoint(path, STATE)

    def cut(file):
        file.write(b"x" * size)
        raise Cut

    with pytest.raises(Cut):
        atomic_write(path, cut)
    assert torch.equal(load_checkpoint(path)["state_dict"]["weight"], STATE["state_dict"]["weight"])


def test_a_full_disk_is_one_sentence_and_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    save_checkpoint(path, STATE)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResumeError, match="No space left on device"):
        save_checkpoint(path, {**STATE, "position": {"epoch": 2}})
    assert load_checkpoint(path)["position"]["epoch"] == 1


def test_the_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(__import__("os"), name)
        monkeypatch.setattr(f"os.{name}", lambda *args, real=real, name=name: (calls.append(name), real(*args)))
    save_checkpoint(tmp_path / "last.pth", STATE)
    assert calls == ["fsync", "replace", "fsync"]


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "PWNED"), "w"))

    for protocol, name in ((2, "legacy.pth"), (None, "zip.pth")):
        path = tmp_path / name
        if protocol:
            path.write_bytes(pickle.dumps(Attack(), protocol))
        else:
            torch.save({"version": 1, "position": Attack()}, path)
        with pytest.raises(ResumeError, match="Cannot read checkpoint"):
            load_checkpoint(path)
    assert not (tmp_path / "PWNED").exists()


def test_weights_alone_are_no_training_state(tmp_path):
    torch.save(STATE["state_dict"], tmp_path / "weights.pth")
    with pytest.raises(ResumeError, match="--checkpoint"):
        load_checkpoint(tmp_path / "weights.pth")
    torch.save({**STATE, "version": 99}, tmp_path / "future.pth")
    with pytest.raises(ResumeError, match="version 99"):
        load_checkpoint(tmp_path / "future.pth")


def test_random_states_survive_a_file(tmp_path):
    import random

    def draw():
        return random.gauss(0, 1), np.random.normal(), torch.randn(3).tolist()  # noqa: NPY002

    draw()
    torch.save(rng_state(torch.device("cpu")), tmp_path / "rng.pth")
    expected = draw()
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True), torch.device("cpu"))
    assert draw() == expected
