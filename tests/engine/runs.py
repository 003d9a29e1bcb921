"""Runs of the real training tool, in this process, in a child that can be killed, or in several that work together."""

import csv
import multiprocessing
import os
import socket
import time
from pathlib import Path

import torch

from tools.train import main

# Python (crop), numpy (Mixup) and torch (dropout, stochastic depth) all draw random numbers in such a run.
FLAGS = {
    "model": "test_vit",
    "img-size": "32",
    "batch-size": "8",
    "epochs": "3",
    "lr": "2e-3",
    "warmup-epochs": "1",
    "drop": "0.1",
    "drop-path": "0.1",
    "mixup": "0.2",
    "workers": "0",
    "device": "cpu",
    "experiment": "run",
}
SWITCHES = ["--model-ema"]


def argv(data: Path, output: Path, *switches: str, **flags: str | None) -> list[str]:
    merged = {**FLAGS, **{name.replace("_", "-"): value for name, value in flags.items()}}
    pairs = [word for name, value in merged.items() if value is not None for word in (f"--{name}", value)]
    return ["--data-dir", str(data), "--output", str(output), *pairs, *SWITCHES, *switches]


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_state(first: Path, second: Path) -> None:
    """Everything but the clock is equal to the bit, and so are the results."""
    states = [load(path / "last.pth") for path in (first, second)]
    for state in states:
        for name in ("checkpoint_interval_steps", "output", "resume", "workers"):
            state["args"].pop(name)
        for row in state["history"]:
            row.pop("seconds")
    assert_equal(*states)
    rows = [list(csv.DictReader((path / "results.csv").open())) for path in (first, second)]
    assert [{**row, "seconds": ""} for row in rows[0]] == [{**row, "seconds": ""} for row in rows[1]]


def assert_equal(first: object, second: object, where: str = "state") -> None:
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_equal(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{where}[{number}]")
    else:
        assert first == second, where


def start(arguments: list[str], **environment: str) -> multiprocessing.Process:
    """Starts the tool in a forked child: importing torch again would take longer than the run."""

    def work() -> None:
        os.environ.update(environment)
        os.setpgrp()
        os._exit(main(arguments))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def run_ranks(arguments: list[str], world_size: int, stop_after: Path | None = None) -> list[int]:
    """Runs the tool in processes that find each other as under torchrun; returns exit codes.

    As soon as the file `stop_after` exists, one of them gets SIGTERM.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    ranks = [start(arguments, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(world_size)]
    if stop_after:
        while not stop_after.exists():
            assert ranks[0].is_alive()
            time.sleep(0.002)
        ranks[-1].terminate()
    for process in ranks:
        process.join(120)
    return [process.exitcode for process in ranks]
