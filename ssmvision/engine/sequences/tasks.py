"""Sequences and their answers.

Letters: n sequences, l steps, c channels, o outputs, k chunks of a sequence.
"""

from __future__ import annotations

import math
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmvision.data import DataError, ImageSource, UserError, open_train_val

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is read and what is to be answered.

    Attributes:
        train: Sequences (n, l, c) and their answers.
        val: Others, which networks are scored on.
        outputs: Channels that a network gives at each step.
        metric: Name of the score; the higher the better if it is "accuracy".
        best: Score on `val` of the best estimate there is, where that is known.
    """

    train: Split
    val: Split
    outputs: int
    best: float | None = None
    metric: ClassVar[str]

    def answer(self, output: Tensor, target: Tensor) -> Tensor:
        """What of a network's outputs (n, l, o) is held against `target`."""
        raise NotImplementedError

    def loss(self, answer: Tensor, target: Tensor) -> Tensor:
        """What is minimized."""
        raise NotImplementedError

    def score(self, answer: Tensor, target: Tensor) -> float:
        """What networks are compared by."""
        raise NotImplementedError


@dataclass(frozen=True)
class Classification(Task):
    """A class (n) for a sequence: the mean of all outputs decides. The score is the accuracy in percent."""

    metric: ClassVar[str] = "accuracy"

    def answer(self, output: Tensor, target: Tensor) -> Tensor:
        """(n, l, o) → (n, o)."""
        return output.mean(1)

    def loss(self, answer: Tensor, target: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(answer, target)

    def score(self, answer: Tensor, target: Tensor) -> float:
        """Accuracy, percent."""
        return 100 * (answer.argmax(1) == target).double().mean().item()


@dataclass(frozen=True)
class Regression(Task):
    """Values (n, k, o) at the ends of chunks of steps. The score is the mean squared error."""

    metric: ClassVar[str] = "mse"

    def answer(self, output: Tensor, target: Tensor) -> Tensor:
        """The last output in each of k chunks, from a network that gives one per step or one per chunk already."""
        chunk = output.shape[1] // target.shape[1]
        return output[:, chunk - 1 :: chunk]

    def loss(self, answer: Tensor, target: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(answer, target)

    def score(self, answer: Tensor, target: Tensor) -> float:
        """Mean squared error."""
        return F.mse_loss(answer, target).item()


def pixels(data: str, train: int = 4000, val: int = 1500, seed: int = 0) -> Classification:
    """Grey images as sequences of their pixels, row by row: what sequential CIFAR is to CIFAR.

    Args:
        data: Folder with train/ and val/, one folder per class in each, or a .tar.gz of one; images of one size.
        train: Images to learn from, drawn by `seed`.
        val: Images to score on, drawn by `seed`.
        seed: Of the draw.
    """
    with tempfile.TemporaryDirectory() as unpacked:
        source, other = open_train_val(_unpack(data, unpacked) if Path(data).is_file() else data)
        x, y = _read(source, train, seed)
        x_val, y_val = _read(other, val, seed)
    mean, std = x.mean(), x.std()
    assert source.class_names is not None
    return Classification(((x - mean) / std, y), ((x_val - mean) / std, y_val), len(source.class_names))


def _unpack(archive: str, folder: str) -> str:
    """The image folder that is in an archive."""
    try:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    except tarfile.TarError as error:
        raise DataError(f"{archive} is neither a folder nor a .tar archive: {error}") from error
    found = sorted(Path(folder).rglob("train"))
    if not found:
        raise DataError(f"{archive} holds no folder train.")
    return str(found[0].parent)


def _read(source: ImageSource, count: int, seed: int) -> Split:
    """`count` images as (n, l, 1) in [0, 1], and their classes."""
    if count > len(source):
        raise DataError(f"{count} images are asked for, but there are {len(source)}.")
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    images, classes = zip(*(source.dataset[index] for index in chosen), strict=True)
    rows = np.stack([np.asarray(image.convert("L"), dtype=np.float32).ravel() for image in images])
    return torch.from_numpy(rows)[..., None] / 255, torch.tensor(classes)


def drift(
    train: int = 2000,
    val: int = 500,
    steps: int = 600,
    chunk: int = 10,
    still: int = 100,
    bias: float = 1.0,
    walk: float = 0.001,
    noise: float = 0.2,
    push: float = 10.0,
    slow: float = 100.0,
    differences: bool = False,
    seed: int = 0,
) -> Regression:
    """Velocity from an accelerometer that drifts: to integrate what it reads is wrong ever more.

    A body rests, then it is pushed at random and slowed by friction. The reading is its acceleration plus a bias, which
    walks at random, plus noise: the bias shows at rest and must be remembered. The velocity is asked for at the end of
    each chunk.

    Args:
        train: Sequences to learn from.
        val: Sequences to score on.
        steps: Their length l.
        chunk: Steps between two answers.
        still: Steps at rest.
        bias: Standard deviation of the bias at the beginning; these three in standard deviations of the acceleration.
        walk: Of what it changes by in one step.
        noise: Of the noise.
        push: Steps after which the force is another.
        slow: Steps in which friction stops the body.
        differences: Read the change since the step before, too, as HiSS was trained (arXiv:2402.10211).
        seed: Of the sequences.
    """
    for name, value in (("train", train), ("val", val), ("chunk", chunk), ("push", push), ("slow", slow)):
        if value <= 0:
            raise UserError(f"{name} is {value:g}, but must be positive.")
    if steps % chunk:
        raise UserError(f"{steps} steps are not a multiple of the chunk of {chunk}.")
    if not 0 <= still < steps:
        raise UserError(f"A body that rests for {still} of {steps} steps does not move.")
    generator = torch.Generator().manual_seed(seed)
    velocity, acceleration = _motion(train + val, steps, still, generator, push, slow)

    def normal(*shape: int) -> Tensor:
        return torch.randn(train + val, *shape, generator=generator)

    error = bias * normal(1) + walk * normal(steps).cumsum(1) + noise * normal(steps)
    unit, unit_of_velocity = acceleration[:, still:].std(), velocity[:, still:].std()
    x = (acceleration / unit + error)[..., None]
    estimate = _filtered(unit * x[train:, :, 0], still, push, slow, *(unit.item() * e for e in (bias, walk, noise)))
    miss = ((estimate - velocity[train:]) / unit_of_velocity)[:, chunk - 1 :: chunk]
    if differences:
        x = torch.cat([x, F.pad(x.diff(dim=1), (0, 0, 1, 0))], -1)
    y = (velocity / unit_of_velocity)[:, chunk - 1 :: chunk, None]
    return Regression((x[:train], y[:train]), (x[train:], y[train:]), 1, miss.square().mean().item())


def _motion(count: int, steps: int, still: int, generator: torch.Generator, push: float, slow: float) -> Split:
    """Velocity and acceleration (n, l)."""
    force, velocity = torch.zeros(count), [torch.zeros(count)]
    for step in range(steps):
        if step >= still:
            force = math.exp(-1 / push) * force + torch.randn(count, generator=generator)
        velocity.append(math.exp(-1 / slow) * velocity[-1] + force)
    path = torch.stack(velocity, 1)
    return path[:, 1:], path.diff(dim=1)


def _filtered(reading: Tensor, still: int, push: float, slow: float, bias: float, walk: float, noise: float) -> Tensor:
    """The velocity (n, l) that is expected after each reading (n, l) of a drifting sensor: its Kalman filter.

    All that is random is normal, so that no other estimate from these readings has a smaller mean squared error.
    """
    reading, force, velocity = reading.double(), math.exp(-1 / push), math.exp(-1 / slow)
    # The state: force, velocity, the velocity before, and bias.
    move = reading.new_tensor([[force, 0, 0, 0], [force, velocity, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    drive, seen, drift_of = reading.new_tensor([[1, 1, 0, 0], [0, 1, -1, 1], [0, 0, 0, 1]])
    state, spread = reading.new_zeros(len(reading), 4), bias**2 * drift_of.diag()
    found = []
    for step, read in enumerate(reading.unbind(1)):
        state = state @ move.mT
        spread = move @ spread @ move.mT + walk**2 * drift_of.diag() + (step >= still) * drive.outer(drive)
        gain = spread @ seen / (seen @ spread @ seen + noise**2).clamp(min=1e-30)
        state = state + (read - state @ seen)[:, None] * gain
        spread = spread - gain.outer(seen @ spread)
        found.append(state[:, 1])
    return torch.stack(found, 1)


TASKS: dict[str, Any] = {"pixels": pixels, "drift": drift}
