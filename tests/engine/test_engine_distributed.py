import os
import signal

import pytest
import torch
from runs import argv, assert_same_state, load, run_ranks, start

from tools.train import main

PLAIN = {"drop": "0", "drop-path": "0", "mixup": "0", "opt": "sgd", "lr": "0.05", "epochs": "2"}


def test_two_processes_train_as_one_does_with_the_same_global_batch(image_folder, tmp_path):
    assert main(argv(image_folder, tmp_path / "one", batch_size="8", **PLAIN)) == 0
    assert run_ranks(argv(image_folder, tmp_path / "two", batch_size="4", **PLAIN), 2) == [0, 0]
    one, two = load(tmp_path / "one/run/last.pth"), load(tmp_path / "two/run/last.pth")
    for before, after in zip(one["history"], two["history"], strict=True):
        assert before["train_loss"] == pytest.approx(after["train_loss"], rel=1e-5)
        assert before["val_loss"] == pytest.approx(after["val_loss"], rel=1e-5)
        assert before["val_top1"] == after["val_top1"]
    for name, weight in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_with_noise_of_their_own_resume_exactly(image_folder, tmp_path):
    flags = {"batch_size": "3", "epochs": "2", "grad_accum_steps": "2", "mixup": None, "model": "test_convnext"}
    assert run_ranks(argv(image_folder, tmp_path / "whole", **flags), 2) == [0, 0]
    interrupted = argv(image_folder, tmp_path, "--resume", "auto", checkpoint_interval_steps="2", **flags)
    assert run_ranks(interrupted, 2, stop_after=tmp_path / "run/last.pth") == [143, 143]
    assert run_ranks(interrupted, 2) == [0, 0]
    assert_same_state(tmp_path / "whole/run", tmp_path / "run")


def test_the_number_of_processes_belongs_to_the_run(image_folder, tmp_path, capfd):
    assert run_ranks(argv(image_folder, tmp_path, batch_size="4", epochs="1"), 2) == [0, 0]
    assert main(argv(image_folder, tmp_path, "--resume", "auto", batch_size="4", epochs="1")) == 2
    assert "made by 2 processes, not 1" in capfd.readouterr().err


def test_broken_files_are_listed_once_and_every_process_stops(image_folder, tmp_path, capfd):
    for number in (1, 2, 3):
        (image_folder / f"train/red/{number}.png").write_bytes(b"")
    assert run_ranks(argv(image_folder, tmp_path), 2) == [2, 2]
    message = capfd.readouterr().err
    assert message.count("3 of 36 images cannot be read") == 1
    assert all(message.count(f"red/{number}.png: empty file") == 1 for number in (1, 2, 3))


def test_two_runs_do_not_share_a_folder(image_folder, tmp_path, capfd):
    first = start(argv(image_folder, tmp_path, epochs="500"))
    while not (tmp_path / "run" / "last.pth").exists():
        assert first.is_alive()
    assert main(argv(image_folder, tmp_path, "--resume", "auto", epochs="500")) == 2
    assert "Another process is training into" in capfd.readouterr().err
    os.kill(first.pid, signal.SIGKILL)
    first.join()
