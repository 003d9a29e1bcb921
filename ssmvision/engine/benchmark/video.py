"""ConvS5 beside ConvLSTM and a Transformer of the same encoder and decoder: training steps, generation, packed clips.

All calls that are compared take turns in one process; read their ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssmvision.engine.benchmark.timing import interleaved
from ssmvision.layers import ConvS5
from ssmvision.models.convs5 import (
    ConvLSTMPredictor,
    ConvS5Predictor,
    TransformerPredictor,
    VideoPredictor,
    prediction_loss,
)

__all__ = ["generation", "packed_clips", "predictors", "state_bytes", "training"]

SIDE, LATENT, WIDTH = 32, 8, 32
CONSECUTIVE = 8  # frames that are generated and timed at once


def predictors() -> dict[str, VideoPredictor]:
    """Two layers of width 32 each over 8 x 8 latents of 32 x 32 frames; the Transformer's tokens have 128 channels."""
    torch.manual_seed(0)
    codec: dict[str, Any] = {"depths": (WIDTH,) * 3}
    tokens: dict[str, Any] = {"latent_size": LATENT, "latent_channels": WIDTH, "num_heads": 4, "mlp_dim": 512}
    transformer = TransformerPredictor(128, 2, **tokens, **codec)
    uncached = TransformerPredictor(128, 2, kv_cache=False, **tokens, **codec)
    uncached.load_state_dict(transformer.state_dict())
    return {
        "ConvS5": ConvS5Predictor(WIDTH, 2, {"ssm_size": WIDTH}, **codec),
        "ConvLSTM": ConvLSTMPredictor(WIDTH, 2, **codec),
        "Transformer": transformer,
        "Transformer, no cache": uncached,
    }


def training(frames: int, repeats: int, names: Sequence[str] = ("ConvS5", "ConvLSTM", "Transformer")) -> dict[str, Any]:
    """Milliseconds, FLOP and parameters of one step of the optimizer on two clips.

    Args:
        frames: Length of the clips.
        repeats: Timed steps.
        names: Which predictors.

    Returns:
        By name, "ms" of the whole model, "sequence ms" of its sequence model alone, "flop" of forward and backward,
        and "parameters".
    """
    models = {name: model for name, model in predictors().items() if name in names}
    video = torch.rand(2, frames + 1, 1, SIDE, SIDE) * 2 - 1
    whole = {name: _training_step(model, partial(_loss, model, video)) for name, model in models.items()}
    alone = {
        name: _training_step(model.sequence_model, _sequence_loss(model, frames)) for name, model in models.items()
    }
    ms, sequence_ms = interleaved(whole, repeats), interleaved(alone, repeats)
    return {
        name: {
            "ms": ms[name],
            "sequence ms": sequence_ms[name],
            "flop": _flop(partial(_backward, model, video)),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        for name, model in models.items()
    }


def generation(lengths: Sequence[int], repeats: int) -> dict[str, dict[int, float]]:
    """Milliseconds to generate one frame after videos of some lengths, at batch 1, by name and length.

    Those of "sequence model" leave encoder and decoder, which all predictors share, out. What takes turns is to
    generate `CONSECUTIVE` frames, one after the other, as a stream does.
    """
    calls: dict[str, dict[int, Callable[[], object]]] = {}
    for name, model in predictors().items():
        model.eval()
        u = _latents(model, 1, 1)[:, 0]
        for length in lengths:
            state, frame = _conditioned(model, length)
            calls.setdefault(name, {})[length] = _frames(model, frame, state)
            calls.setdefault(f"{name}, sequence model", {})[length] = _frames(model.sequence_model, u, state)
    times = interleaved({f"{name}@{at}": call for name, by in calls.items() for at, call in by.items()}, repeats)
    return {name: {length: times[f"{name}@{length}"] / CONSECUTIVE for length in lengths} for name in calls}


def state_bytes(lengths: Sequence[int]) -> dict[str, dict[int, int]]:
    """Bytes of what generation carries from frame to frame after videos of some lengths, by name and length."""
    return {
        name: {length: _bytes(_conditioned(model.eval(), length)[0]) for length in lengths}
        for name, model in predictors().items()
    }


def packed_clips(repeats: int) -> dict[str, float]:
    """What resets cost, and what they save on clips of 120 and of 30 frames, with a ConvS5 layer forward and backward.

    Returns:
        "resets", the time of a packed batch by that of the same batch as one clip each; and "clips/s", those of packed
        clips by those of clips padded to the longest.
    """
    torch.manual_seed(0)
    layer = ConvS5(WIDTH, ssm_size=WIDTH)
    packed, padded = torch.randn(4, 150, WIDTH, LATENT, LATENT), torch.randn(8, 120, WIDTH, LATENT, LATENT)
    reset = torch.zeros(4, 150, dtype=torch.bool)
    reset[:, 120] = True

    def run(u: Tensor, reset: Tensor | None = None) -> Callable[[], object]:
        return lambda: layer(u, reset).square().mean().backward()

    ms = interleaved({"packed": run(packed, reset), "one clip": run(packed), "padded": run(padded)}, repeats)
    return {"resets": ms["packed"] / ms["one clip"], "clips/s": ms["padded"] / ms["packed"]}


def _loss(model: nn.Module, video: Tensor) -> Tensor:
    return prediction_loss(model(video[:, :-1]), video[:, 1:])[0]


def _backward(model: nn.Module, video: Tensor) -> None:
    _loss(model, video).backward()


def _sequence_loss(model: VideoPredictor, frames: int) -> Callable[[], Tensor]:
    u = _latents(model, 2, frames)
    return lambda: model.sequence_model(u, None, None)[0].square().mean()


def _latents(model: VideoPredictor, batch: int, frames: int) -> Tensor:
    width, _, *size = model.embed.weight.shape
    return torch.randn(batch, frames, width, *(LATENT // side for side in size))


def _training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=1e-5)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def _flop(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def _conditioned(model: VideoPredictor, length: int) -> tuple[Any, Tensor]:
    video = torch.rand(1, length, 1, SIDE, SIDE) * 2 - 1
    return model.condition(video), video[:, -1]


def _frames(model: nn.Module, frame: Tensor, state: Any) -> Callable[[], None]:
    """Generates `CONSECUTIVE` frames after a state; a sequence model alone always gets the same one."""
    with torch.no_grad():
        step = model.stepper()
    feed_back = isinstance(model, VideoPredictor)

    @torch.inference_mode()
    def run() -> None:
        u, after = frame, state
        for _ in range(CONSECUTIVE):
            y, after = step(u, after)
            u = y if feed_back else u

    return run


def _bytes(state: Any) -> int:
    return state.nbytes if isinstance(state, Tensor) else sum(map(_bytes, state))
