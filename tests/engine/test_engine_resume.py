import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import argv, assert_same_state, load, start

from tools.train import main


def wait_for(path: Path, process, after: float = 0.0) -> None:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_mtime_ns > after):
        assert process.is_alive(), "the run ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def whole(image_folder, tmp_path) -> Path:
    assert main(argv(image_folder, tmp_path / "whole")) == 0
    return tmp_path / "whole" / "run"


def test_the_same_seed_gives_the_same_run_with_other_workers(image_folder, tmp_path, whole):
    assert main(argv(image_folder, tmp_path / "again", workers="2")) == 0
    assert_same_state(whole, tmp_path / "again" / "run")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_continues_exactly(image_folder, tmp_path, whole, signum, code):
    arguments = argv(image_folder, tmp_path, checkpoint_interval_steps="1", workers="1")
    process = start(arguments)
    wait_for(tmp_path / "run" / "last.pth", process)
    os.killpg(process.pid, signum)  # as Ctrl-C and batch systems do: loader workers get it too
    process.join(30)
    assert process.exitcode == code
    assert load(tmp_path / "run" / "last.pth")["position"]["updates"] < 12
    assert main([*arguments, "--resume", "auto"]) == 0
    assert_same_state(whole, tmp_path / "run")


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_weights(image_folder, tmp_path, whole):
    arguments = argv(image_folder, tmp_path, "--resume", "auto", checkpoint_interval_steps="2", workers="2")
    moments = random.Random(3)
    last, kills = tmp_path / "run" / "last.pth", 0
    for _ in range(6):
        seen = last.stat().st_mtime_ns if last.exists() else 0
        process = start(arguments)
        try:
            wait_for(last, process, seen)
        except AssertionError:
            break
        time.sleep(moments.uniform(0, 0.1))  # also in the middle of a step, of a save or of the validation
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        load(last)
    assert kills >= 3
    assert main(arguments) == 0
    assert_same_state(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_state_space_model_with_gradient_accumulation_resumes_between_updates(image_folder, tmp_path):
    flags = {"model": "test_vmamba", "grad_accum_steps": "3", "epochs": "2", "batch_size": "4", "clip_grad": "1.0"}
    assert main(argv(image_folder, tmp_path / "whole", **flags)) == 0
    arguments = argv(image_folder, tmp_path, checkpoint_interval_steps="1", **flags)
    process = start(arguments)
    wait_for(tmp_path / "run" / "last.pth", process)
    process.terminate()
    process.join(30)
    assert load(tmp_path / "run" / "last.pth")["position"]["batch"] % 3 == 0
    assert main([*arguments, "--resume", "auto"]) == 0
    assert_same_state(tmp_path / "whole" / "run", tmp_path / "run")


def test_a_finished_run_stays_as_it_is(image_folder, tmp_path, whole):
    before = load(whole / "last.pth")["state_dict"]
    assert main(argv(image_folder, tmp_path / "whole", "--resume", "auto")) == 0
    assert all(torch.equal(value, before[name]) for name, value in load(whole / "last.pth")["state_dict"].items())


def test_resuming_another_run_is_refused(image_folder, tmp_path, whole, capsys):
    assert main(argv(image_folder, tmp_path / "whole")) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(argv(image_folder, tmp_path / "whole", "--resume", "auto", lr="1e-3", seed="1")) == 2
    message = capsys.readouterr().err
    assert "--lr 0.002 -> 0.001" in message
    assert "--seed 42 -> 1" in message
    (image_folder / "train" / "red" / "3.png").unlink()
    assert main(argv(image_folder, tmp_path / "whole", "--resume", "auto")) == 2
    assert "training images are not those" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(image_folder, tmp_path, whole, capsys):
    content = (whole / "last.pth").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"text"):
        (whole / "last.pth").write_bytes(damaged)
        assert main(argv(image_folder, tmp_path / "whole", "--resume", "auto")) == 2
        assert "Cannot read checkpoint" in capsys.readouterr().err
    assert main(argv(image_folder, tmp_path / "new", "--resume", str(tmp_path / "missing.pth"))) == 2
    assert "There is no checkpoint" in capsys.readouterr().err
