"""Top-1, top-5 and loss of a model on a loader, over one process or many."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from timm.utils import accuracy
from torch import nn
from tqdm import tqdm

from .distributed import Ranks
from .signals import Interrupted, StopRequest


def autocast(device: torch.device, amp: bool, amp_dtype: str = "float16") -> AbstractContextManager:
    """Returns the context of a forward pass: mixed precision in `amp_dtype`, or nothing."""
    return torch.autocast(device.type, dtype=getattr(torch, amp_dtype)) if amp else nullcontext()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    ranks: Ranks,
    amp: bool = False,
    amp_dtype: str = "float16",
    channels_last: bool = False,
    progress: str | None = None,
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """Returns `loss` (cross entropy), `top1`, `top5` (in percent, top-k capped by the classes) and `count`.

    Args:
        model: Any model of images to logits; left in evaluation mode.
        loader: Batches of images and classes; each process brings its own share.
        ranks: This process among all.
        amp: Use mixed precision.
        amp_dtype: `float16` or `bfloat16`.
        channels_last: Give the model batches in channels-last memory order.
        progress: Title of the progress bar; None shows none.
        stop: Looked at between batches; raises `Interrupted` when a signal has come.
    """
    model.eval()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    loss = top1 = top5 = count = 0.0
    hidden = progress is None or not ranks.is_first
    for images, targets in tqdm(loader, progress, leave=False, disable=hidden or None):
        # Processes cannot agree here, as some have a batch less; with many of them the next update sees the signal.
        if stop and stop.signum and not ranks.distributed:
            raise Interrupted(stop.signum)
        images = images.to(ranks.device, non_blocking=True, memory_format=memory_format)
        targets = targets.to(ranks.device, non_blocking=True)
        with autocast(ranks.device, amp, amp_dtype):
            logits = model(images)
        logits = logits.float()
        size = len(targets)
        # Counts, not percentages, are added up: their sum is exact.
        batch_top1, batch_top5 = (round(value.item() * size / 100) for value in accuracy(logits, targets, topk=(1, 5)))
        loss += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        top1 += batch_top1
        top5 += batch_top5
        count += size
    loss, top1, top5, count = ranks.sum([loss, top1, top5, count])
    return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "count": int(count)}
