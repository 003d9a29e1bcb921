"""Train every row of a config, for every learning rate and seed, and write down what came out as it comes out.

results.csv has one line per epoch of each run, noise.csv one per frequency of it: a crash loses no finished line.
"""

from __future__ import annotations

import csv
import inspect
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ssmvision.data import UserError
from ssmvision.engine.parameter_groups import separate_own_groups
from ssmvision.engine.run_folder import RunFolder

from .networks import build_network
from .noise import fourier_noise, spike
from .report import draw, table
from .tasks import TASKS, Task

Line = dict[str, Any]

_WARMUP = 0.1  # part of the training in which the learning rates rise


def compare(args: Namespace) -> list[Line]:
    """Does what `tools/sequences.py --help` says and returns the lines of results.csv.

    Raises:
        UserError: A task or a row that cannot be built, or a folder that already holds results.
    """
    for flag in ("epochs", "batch_size", "noise_every", "noise_count"):
        if getattr(args, flag) < 1:
            raise UserError(f"{flag} is {getattr(args, flag)}, but must be at least 1.")
    task = _make_task(args.task, args.task_args)
    builders = _builders(args, task)
    if task.best is not None:
        print(f"the best estimate there is: {task.metric} {task.best:.4g}", flush=True)
    folder = RunFolder(args.output)
    try:
        if (folder.path / "results.csv").exists():
            raise UserError(f"{folder.path} already holds results; choose another --output.")
        folder.write_args(args)
        lines, noise_lines = _run_all(args, task, builders, folder.path)
    finally:
        folder.close()
    text = table(lines, noise_lines, task.metric)
    (folder.path / "table.md").write_text(text + "\n", encoding="utf-8")
    draw(lines, noise_lines, task.metric, folder.path / "curves.png")
    print(f"{text}\n\nresults, table and curves: {folder.path}", flush=True)
    return lines


def _run_all(
    args: Namespace, task: Task, builders: dict[str, Callable[[], nn.Module]], path: Path
) -> tuple[list[Line], list[Line]]:
    lines: list[Line] = []
    noise_lines: list[Line] = []
    for seed in args.seeds:
        for lr in args.lr:
            nets: dict[str, nn.Module] = {}
            for row, build in builders.items():
                random_seed(seed)
                nets[row] = net = build()
                run = {"row": row, "lr": lr, "seed": seed, "parameters": sum(p.numel() for p in net.parameters())}
                for epoch in _train(net, task, args, lr, seed):
                    _keep({**run, **epoch}, lines, path / "results.csv")
                print(f"{row}, lr {lr:g}, seed {seed}: {task.metric} {lines[-1]['score']:.4g}", flush=True)
            for line in _under_noise(nets, task, args) if args.noise else ():
                _keep({"lr": lr, "seed": seed, **line}, noise_lines, path / "noise.csv")
    return lines, noise_lines


def _make_task(name: str, task_args: dict[str, Any]) -> Task:
    try:
        return TASKS[name](**task_args)
    except TypeError as error:
        known = ", ".join(inspect.signature(TASKS[name]).parameters)
        raise UserError(f"Task {name!r}: {error}; it takes {known}.") from error


def _builders(args: Namespace, task: Task) -> dict[str, Callable[[], nn.Module]]:
    """What builds each row."""
    if not args.rows:
        raise UserError("There is nothing to compare: give --rows.")
    for row, own in args.rows.items():
        if not isinstance(own, dict):
            raise UserError(f"Row {row!r} is {own!r}, but must hold `key: value` lines.")
    x, outputs = task.train[0][:1], task.outputs
    builders: dict[str, Callable[[], nn.Module]] = {
        row: partial(build_network, x.shape[-1], outputs, **{**args.net_args, **own}) for row, own in args.rows.items()
    }
    for row, build in builders.items():  # all are tried: a mistake in the last one should not be found after hours
        try:
            build()(x)
        except (TypeError, ValueError) as error:
            raise UserError(f"Row {row!r}: {error}") from error
    return builders


def _train(net: nn.Module, task: Task, args: Namespace, lr: float, seed: int) -> Iterator[Line]:
    """Trains `net`; yields what each epoch brought."""
    x, y = task.train
    optimizer = create_optimizer_v2(net, opt="adamw", lr=lr, weight_decay=args.weight_decay)
    separate_own_groups(optimizer, net)
    steps = args.epochs * math.ceil(len(x) / args.batch_size)
    scheduler = LambdaLR(optimizer, lambda step: _schedule(step / steps))
    order = torch.Generator().manual_seed(seed)
    started = time.process_time()
    for epoch in range(args.epochs):
        net.train()
        losses = []
        for chosen in torch.randperm(len(x), generator=order).split(args.batch_size):
            loss = task.loss(task.answer(net(x[chosen]), y[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), args.clip_grad)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        score = _score(net, task, *task.val, args.batch_size)
        seconds = time.process_time() - started
        yield {
            "epoch": epoch + 1, "train_loss": sum(losses) / len(losses), "score": score, "seconds": round(seconds, 1)
        }  # fmt: skip


def _schedule(done: float) -> float:
    """Factor of all learning rates after a part of the training: a linear rise, then half a cosine."""
    if done < _WARMUP:
        return max(done, 1e-3) / _WARMUP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARMUP) / (1 - _WARMUP)))


@torch.inference_mode()
def _score(net: nn.Module, task: Task, x: Tensor, y: Tensor, batch_size: int) -> float:
    net.eval()
    answers = [task.answer(net(a), b) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)]
    return task.score(torch.cat(answers), y)


def _under_noise(nets: dict[str, nn.Module], task: Task, args: Namespace) -> Iterator[Line]:
    """The score of each on the first sequences of `task.val`: at omega 0 as they are, at others with an oscillation."""
    x, y = (part[: args.noise_count] for part in task.val)
    length = x.shape[1]
    modes = [2 * math.pi * mode / length for mode in range(1, length // 2 + 1, args.noise_every)]
    spikes = [omega for net in nets.values() if (omega := spike(net, length))]
    omegas = sorted({round(omega, 5) for omega in [*modes, *spikes]})
    for row, net in nets.items():
        for omega in [0.0, *omegas]:
            noisy = fourier_noise(x, omega, args.noise) if omega else x
            yield {"row": row, "omega": omega, "score": _score(net, task, noisy, y, args.batch_size)}


def _keep(line: Line, lines: list[Line], path: Path) -> None:
    """Adds a line to `lines` and to the file."""
    lines.append(line)
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(line), lineterminator="\n")
        if len(lines) == 1:
            writer.writeheader()
        writer.writerow(line)
