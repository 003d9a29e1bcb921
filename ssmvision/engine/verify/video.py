"""Predictors of video, and their layers, against the official ones.

Cases of a predictor hold video, recon (predictions of all frames but the first), deter (what is decoded), loss and its
parts, last (the states after all frames but the last) and imagined (the frames that go on after the video); videos are
(b, t, h, w, c). Cases of the layer hold input, x0, output, ssm_output (before the feedthrough), last_state and the
discretized matrices; sequences are (t, b, h, w, c).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ssmvision.engine.verify.case import Case
from ssmvision.engine.verify.modules import Check
from ssmvision.engine.verify.networks import expected_gradients
from ssmvision.hub import CheckpointError, compare_keys
from ssmvision.layers import ConvS5
from ssmvision.models import convs5

__all__ = ["CHECKS"]

_GIVEN = r"input|video|x0|actions|init\.(B|C|D|log_step)"
Tensors = dict[str, Tensor]


def _video(case: Case) -> tuple[Tensors, Tensors]:
    model = convs5.from_official(case.official_class, case.kwargs).eval()
    case.kwargs.ignore(convs5.WITHOUT_EFFECT)
    weights = convs5.checkpoint_filter_fn(case.weights, model)
    report = compare_keys(weights, model.state_dict())
    if not report.ok:
        raise CheckpointError(f"the weights do not fit: {report.summary()}")
    initial = {f"output.init.{name}": p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(weights)
    found = initial | (_layer(model, case) if isinstance(model, ConvS5) else _predictor(model, case))
    found |= {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, _wanted(case, model)


def _layer(layer: ConvS5, case: Case) -> Tensors:
    tensors = case.tensors
    sequence = tensors["input"].requires_grad_()
    start = _complex(tensors["x0"]).permute(0, 3, 1, 2) if "x0" in tensors else None
    observed: list[Tensor] = []
    layer.feedthrough.register_forward_pre_hook(lambda _, inputs: observed.append(inputs[0].detach()))
    output, last = layer.run(sequence.permute(1, 0, 4, 2, 3), start)
    output.square().mean().backward()
    A, B, C = layer.discretized()
    return {
        "output.output": _time_first(output),
        "output.ssm_output": _time_first(observed[0].view_as(output)),
        "output.last_state": _pairs(last.permute(0, 2, 3, 1)),
        "output.A_bar": _pairs(A.flatten()),
        "output.B_bar_HWIO": _pairs(B.permute(2, 3, 1, 0)),
        "output.C_tilde_HWIO": _pairs(C.permute(2, 3, 1, 0)),
        "grad_input": _gradient(sequence),
    }


def _predictor(model: convs5.VideoPredictor, case: Case) -> Tensors:
    video = case.tensors["video"].requires_grad_()
    frames = video.permute(0, 1, 4, 2, 3)
    latents, last = model.forward_latents(frames[:, :-1])
    recon = convs5.per_frame(model.decoder, latents)
    losses = convs5.prediction_loss(recon, frames[:, 1:], case.kwargs.get("loss_weight", 0.5))
    losses[0].backward()
    found = {name: loss.reshape(1) for name, loss in zip(("loss", "mse_loss", "l1_loss"), losses, strict=True)}
    found |= {"recon": _channels_last(recon), "deter": _channels_last(latents)} | _states(last)
    if "imagined" in case.tensors:
        found["imagined"] = _channels_last(model.generate(frames.detach(), case.tensors["imagined"].shape[1]))
    return {f"output.{name}": tensor for name, tensor in found.items()} | {"grad_video": _gradient(video)}


def _states(states: object) -> Tensors:
    """Those of the layers under the names of the cases; none of a Transformer, which has no state of its own."""
    found: Tensors = {}
    for index, state in enumerate(states if isinstance(states, list) else []):
        if isinstance(state, Tensor):
            found[f"last.{index}"] = _pairs(state.permute(0, 2, 3, 1))
        elif state[0].dim() == 4:
            found |= {f"last.{index}.{name}": x.permute(0, 2, 3, 1) for name, x in zip("ch", state, strict=True)}
    return found


def _wanted(case: Case, model: torch.nn.Module) -> Tensors:
    weights = {path.removeprefix("params/"): value for path, value in case.weights.items()}
    outputs = {
        f"output.{key}": x for key, x in case.tensors.items()
        if not key.startswith("grad") and not re.fullmatch(_GIVEN, key)
    }  # fmt: skip
    gradients = expected_gradients(convs5, model, weights, case.tensors)
    return outputs | gradients | {key: x for key, x in case.tensors.items() if key == "grad_video"}


def _channels_last(video: Tensor) -> Tensor:
    return video.permute(0, 1, 3, 4, 2)


def _time_first(video: Tensor) -> Tensor:
    return video.permute(1, 0, 3, 4, 2)


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj())


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.contiguous())


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


# By the families' names, as `Case.family` gives them.
CHECKS: dict[str, Check] = dict.fromkeys(
    ("convs5", "convlstm", "videotransformer", "transformer"), Check(_video, _GIVEN)
)
