"""The folder of one run: what it was asked to do (args.yaml), what came out (results.csv, curves.png), its states."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from ssmvision.data import UserError

from .checkpoint import atomic_write, save_checkpoint
from .pictures import draw_curves

LAST = "last.pth"
BEST = "model_best.pth"


class RunFolder:
    """One run's files. Everything is written atomically, so the folder can be read at any moment.

    Args:
        path: The folder; made when missing.
        resume: Whether a run that is already there goes on. Otherwise that is an error.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self.path = Path(path)
        self.last, self.best, self.export = self.path / LAST, self.path / BEST, self.path / "export"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            # Permission bits say yes to root and on read-only mounts; only a write tells.
            atomic_write(self.path / ".writable", lambda file: None)
            (self.path / ".writable").unlink()
        except OSError as error:
            raise UserError(f"The output folder {self.path} cannot be written: {error.strerror or error}.") from error
        self._lock = self._take_lock()
        if self.last.exists() and not resume:
            raise UserError(
                f"{self.path} already holds a run. Continue it with --resume auto, or choose another --experiment."
            )
        self._tensorboard: Any = None

    def _take_lock(self) -> int:
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            import fcntl

            # lockf and not flock: loader workers that outlive a killed run for a moment must not keep its lock.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(lock)
            raise UserError(f"Another process is training into {self.path}.") from None
        except (ImportError, OSError):
            pass  # Windows and some network file systems have no such lock: go without it
        return lock

    def write_args(self, args: Namespace) -> None:
        """Writes the resolved arguments; `--config args.yaml` repeats the run."""
        text = yaml.safe_dump(vars(args), sort_keys=True)
        atomic_write(self.path / "args.yaml", lambda file: file.write(text.encode()))

    def write_results(self, history: list[dict[str, Any]]) -> None:
        """Writes one line for each finished epoch, and draws them."""
        if not history:
            return
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(history[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        atomic_write(self.path / "results.csv", lambda file: file.write(table.getvalue().encode()))
        draw_curves(history, self.path / "curves.png")

    def log(self, row: dict[str, Any]) -> None:
        """Adds a finished epoch to TensorBoard's log where TensorBoard is installed."""
        if self._tensorboard is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._tensorboard = SummaryWriter(self.path / "tensorboard", purge_step=row["epoch"])
        for name, value in row.items():
            if name != "epoch":
                self._tensorboard.add_scalar(name, value, row["epoch"])
        self._tensorboard.flush()

    def save(self, state: dict[str, Any], is_best: bool = False) -> None:
        """Saves the last state, and keeps it as the best one too when it is."""
        if is_best:
            save_checkpoint(self.best, state)
        save_checkpoint(self.last, state)

    def close(self) -> None:
        """Gives the folder back."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        os.close(self._lock)
