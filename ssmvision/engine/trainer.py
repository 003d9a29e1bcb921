"""The training loop: one optimizer update, one epoch, and the state that continues exactly where it was saved."""

from __future__ import annotations

import math
import time
from argparse import Namespace
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import Mixup
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from ssmvision.data import UserError

from .checkpoint import ResumeError, rng_state, set_rng_state
from .distributed import Ranks
from .evaluate import autocast, evaluate
from .parameter_groups import separate_own_groups
from .run_folder import RunFolder
from .signals import Interrupted, StopRequest

Batch = tuple[torch.Tensor, torch.Tensor]

# What may differ between a run and its continuation. Anything else would make it another run.
FREE_ARGS = {"checkpoint_interval_steps", "config", "data_dir", "dataset_download", "device", "experiment"}
FREE_ARGS |= {"on_bad_sample", "output", "resume", "workers"}


class Trainer:
    """Trains `model` and knows where in the data it is.

    Args:
        args: The arguments of `tools/train.py`.
        model: A model on the device of this process.
        train_loader: Batches of this process, with a positioned batch sampler.
        val_loader: Validation batches of this process.
        ranks: This process among all.
        folder: Where states and results go; None in all processes but the first.
        identity: What the checkpoint says about the data: class names and fingerprint.
    """

    def __init__(
        self,
        args: Namespace,
        model: nn.Module,
        train_loader: DataLoader,
        val_loader: DataLoader,
        ranks: Ranks,
        folder: RunFolder | None,
        identity: dict[str, Any],
    ) -> None:
        self.args, self.ranks, self.folder, self.identity = args, ranks, folder, identity
        self.train_loader, self.val_loader = train_loader, val_loader
        self.epoch, self.batch, self.updates = 0, 0, 0
        self.loss_sum, self.history = 0.0, []  # type: float, list[dict[str, Any]]
        self.model = model
        self.ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=True) if args.model_ema else None
        self.mixup, self.criterion = _mixup_and_loss(args)
        self.optimizer, self.scheduler = _optimizer_and_schedule(args, model, len(train_loader))
        needs_scaling = args.amp and args.amp_dtype == "float16" and ranks.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=needs_scaling)
        self.forward: Any = _wrap(model, args, ranks)

    @property
    def eval_model(self) -> nn.Module:
        """The weights that are validated and exported: the moving average when there is one."""
        return self.ema.module if self.ema else self.model

    def run(self) -> None:
        """Trains from the present position to the last epoch.

        Raises:
            Interrupted: After SIGTERM or SIGINT, with the state saved.
            UserError: When the loss is not finite.
        """
        with StopRequest() as stop:
            while self.epoch < self.args.epochs:
                started = time.perf_counter()
                self._train_epoch(stop)
                try:
                    metrics = self._validate(stop)
                except Interrupted:
                    self.save()
                    raise
                self._finish_epoch(metrics, time.perf_counter() - started)

    def _train_epoch(self, stop: StopRequest) -> None:
        self.train_loader.batch_sampler.set_position(self.epoch, self.batch)  # type: ignore[union-attr]
        batches, total = iter(self.train_loader), len(self.train_loader)
        self.forward.train()
        with tqdm(
            total=total,
            initial=self.batch,
            desc=f"epoch {self.epoch + 1}/{self.args.epochs}",
            leave=False,
            disable=None if self.ranks.is_first else True,
        ) as bar:
            while self.batch < total:
                started = time.perf_counter()
                group = [next(batches) for _ in range(min(self.args.grad_accum_steps, total - self.batch))]
                loss, signum = self._agree(self._update(group), stop)
                self.batch += len(group)
                self.loss_sum += loss * len(group)
                images = len(group) * len(group[0][0]) * self.ranks.world_size
                speed = images / (time.perf_counter() - started)
                bar.update(len(group))
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{self.lr:.2e}", img_s=f"{speed:.0f}", refresh=False)
                if signum:
                    self.save()
                    raise Interrupted(signum)
                if self.args.checkpoint_interval_steps and self.updates % self.args.checkpoint_interval_steps == 0:
                    self.save()

    def _update(self, group: list[Batch]) -> torch.Tensor:
        """One optimizer update from one or more batches; returns the mean loss."""
        args, total = self.args, torch.zeros((), device=self.ranks.device)
        for number, batch in enumerate(group, 1):
            images, targets = self._to_device(batch)
            # Gradients are exchanged between processes once for each update, not for each batch of it.
            more = self.ranks.distributed and number < len(group)
            with self.forward.no_sync() if more else nullcontext():
                with autocast(self.ranks.device, args.amp, args.amp_dtype):
                    loss = self.criterion(self.forward(images), targets) / len(group)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if args.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), args.clip_grad, args.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.updates += 1
        if self.ema:
            self.ema.update(self.model, step=self.updates)
        if self.scheduler:
            self.scheduler.step_update(self.updates)
        return total

    def _to_device(self, batch: Batch) -> Batch:
        memory_format = torch.channels_last if self.args.channels_last else torch.contiguous_format
        images = batch[0].to(self.ranks.device, non_blocking=True, memory_format=memory_format)
        targets = batch[1].to(self.ranks.device, non_blocking=True)
        return self.mixup(images, targets) if self.mixup else (images, targets)

    def _agree(self, loss: torch.Tensor, stop: StopRequest) -> tuple[float, int]:
        """Returns the mean loss over processes, and the signal that any of them received."""
        loss_sum, stopping = self.ranks.sum([loss.item(), float(stop.signum > 0)])
        if not math.isfinite(loss_sum):
            raise self._diverged("loss is not finite")
        return loss_sum / self.ranks.world_size, max(stop.signum, 15) if stopping and not stop.signum else stop.signum

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"The {what} in epoch {self.epoch + 1} after {self.updates} updates. Lower --lr, lengthen --warmup-epochs, "
            f"or set --clip-grad; nothing was saved since the last good state."
        )

    def _validate(self, stop: StopRequest) -> dict[str, float]:
        if self.ranks.distributed:
            distribute_bn(self.eval_model, self.ranks.world_size)
        return evaluate(
            self.eval_model,
            self.val_loader,
            self.ranks,
            self.args.amp,
            self.args.amp_dtype,
            self.args.channels_last,
            stop=stop,
        )

    def _finish_epoch(self, metrics: dict[str, float], seconds: float) -> None:
        row = {
            "epoch": self.epoch,
            "train_loss": self.loss_sum / len(self.train_loader),
            **{f"val_{name}": metrics[name] for name in ("loss", "top1", "top5")},
            "lr": self.lr,
            "seconds": round(seconds, 2),
        }
        is_best = not self.history or self._score(row) > max(map(self._score, self.history))
        self.history.append(row)
        self.epoch, self.batch, self.loss_sum = self.epoch + 1, 0, 0.0
        self.save(is_best)
        if self.folder:
            self.folder.write_results(self.history)
            self.folder.log(row)
            tqdm.write(
                f"epoch {self.epoch}/{self.args.epochs}  train loss {row['train_loss']:.4f}  "
                f"val loss {row['val_loss']:.4f}  top-1 {row['val_top1']:.2f}  top-5 {row['val_top5']:.2f}  "
                f"lr {row['lr']:.2e}  {seconds:.1f} s{'  best' if is_best else ''}"
            )

    def _score(self, row: dict[str, Any]) -> float:
        value = row[f"val_{self.args.eval_metric}"]
        return -value if self.args.eval_metric == "loss" else value

    @property
    def best(self) -> dict[str, Any]:
        """The finished epoch with the best value of `--eval-metric`."""
        return max(self.history, key=self._score)

    @property
    def lr(self) -> float:
        """The largest learning rate of all parameter groups."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def save(self, is_best: bool = False) -> None:
        """Saves the state; every process takes part, the first one writes."""
        rng = self.ranks.gather(rng_state(self.ranks.device))
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise self._diverged("weights are not finite")
        if not self.folder:
            return
        state = {
            "arch": self.args.model,
            "args": vars(self.args),
            "position": {"epoch": self.epoch, "batch": self.batch, "updates": self.updates, "loss_sum": self.loss_sum},
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "amp_scaler": self.scaler.state_dict(),
            "rng": rng,
            "history": self.history,
            **self.identity,
        }
        if self.ema:
            state["state_dict_ema"] = self.ema.module.state_dict()
        self.folder.save(state, is_best)

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a saved state; raises `ResumeError` when it belongs to another run."""
        self._check_same_run(state)
        self.model.load_state_dict(state["state_dict"])
        if self.ema:
            self.ema.module.load_state_dict(state["state_dict_ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["amp_scaler"])
        for name, value in state["position"].items():
            setattr(self, name, value)
        self.history = state["history"]
        set_rng_state(state["rng"][self.ranks.rank], self.ranks.device)

    def _check_same_run(self, state: dict[str, Any]) -> None:
        before, now = state["args"], vars(self.args)
        changed = [k for k in sorted(set(before) | set(now)) if k not in FREE_ARGS and before.get(k) != now.get(k)]
        if changed:
            differences = ", ".join(f"--{k.replace('_', '-')} {before.get(k)} -> {now.get(k)}" for k in changed)
            raise ResumeError(f"The checkpoint was made by a run with other arguments: {differences}.")
        if len(state["rng"]) != self.ranks.world_size:
            raise ResumeError(f"The checkpoint was made by {len(state['rng'])} processes, not {self.ranks.world_size}.")
        if state["fingerprint"] != self.identity["fingerprint"]:
            raise ResumeError("The training images are not those that the checkpoint was made with.")


def _optimizer_and_schedule(args: Namespace, model: nn.Module, batches: int) -> tuple[Optimizer, Scheduler | None]:
    if args.sched == "plateau":
        raise UserError("--sched plateau keeps no state, so a run could not be resumed exactly; use cosine or wsd.")
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
        separate_own_groups(optimizer, model)
        scheduler, _ = create_scheduler_v2(
            optimizer,
            **{**scheduler_kwargs(args), "step_on_epochs": False},
            updates_per_epoch=math.ceil(batches / args.grad_accum_steps),
        )
    except ValueError as error:
        raise UserError(f"Cannot set up --opt {args.opt} with --sched {args.sched}: {error}") from error
    return optimizer, scheduler


def _mixup_and_loss(args: Namespace) -> tuple[Mixup | None, nn.Module]:
    """Mixup mixes targets and smooths them itself, so the loss depends on whether it is there."""
    if not (args.mixup or args.cutmix):
        return None, create_classification_loss(smoothing=args.smoothing)
    mixup = Mixup(
        mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, label_smoothing=args.smoothing, num_classes=args.num_classes
    )
    return mixup, create_classification_loss(soft_targets=True)


def _wrap(model: nn.Module, args: Namespace, ranks: Ranks) -> Any:
    forward: Any = torch.compile(model) if args.torchcompile else model
    if not ranks.distributed:
        return forward
    return DistributedDataParallel(forward, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)
