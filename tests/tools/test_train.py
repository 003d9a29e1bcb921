"""The command lines as a user types them, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--model",
    "test_vit",
    "--img-size",
    "32",
    "-b",
    "8",
    "--epochs",
    "1",
    "--workers",
    "0",
    "--device",
    "cpu",
    "--experiment",
    "run",
]


def call(module, *arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *module, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_train_from_another_folder_and_print_what_happened(image_folder, tmp_path):
    done = call([ROOT / "tools/train.py"], "--data-dir", image_folder, *FLAGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("epoch 1/1  train loss") for line in lines)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "output/train/run/export/model.safetensors").is_file()


def test_errors_have_no_traceback(image_folder, tmp_path):
    (image_folder / "val/red/0.png").write_bytes(b"")
    done = call([ROOT / "tools/train.py"], "--data-dir", image_folder, *FLAGS, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 1 of 12 images cannot be read:\n")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_processes_under_torchrun(image_folder, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = call(launcher, ROOT / "tools/train.py", "--data-dir", image_folder, *FLAGS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == 1
