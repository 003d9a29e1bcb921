"""ConvS5: prediction of video, frame by frame from a state of constant size, and the baselines of its paper.

Paper: `Convolutional State Space Models for Long-Range Spatiotemporal Modeling` - https://arxiv.org/abs/2310.19694
Official code (NVIDIA Source Code License, non-commercial; read for facts only): https://github.com/NVlabs/ConvSSM

Letters: b batch, t frame, c channels, h height, w width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ssmvision.layers import ConvLSTM, ConvS5
from ssmvision.layers.causal_transformer import CausalTransformer
from ssmvision.layers.convs5 import per_frame
from ssmvision.layers.frame_codec import GROUPS, FrameDecoder, FrameEncoder
from ssmvision.layers.frame_norm import FrameLayerNorm
from ssmvision.models._networks import NetworkCfg, register_network
from ssmvision.models._official import rename

__all__ = ["ConvLSTMPredictor", "ConvS5Predictor", "TransformerPredictor", "VideoPredictor", "prediction_loss"]

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


class SequenceLayer(nn.Module):
    """A mixer over time beside a residual, with a norm after it or before it.

    Args:
        mixer: `ConvS5`, `ConvLSTM`, or what has their `run`, `stepper` and `initial_state`.
        dim: Channels.
        prenorm: Norm before the mixer instead of after the residual.
        use_norm: Have a norm at all.
        per_layer_skip: Have the residual.
        dropout: Dropout rate of the mixer's output.
    """

    def __init__(
        self,
        mixer: nn.Module,
        dim: int,
        prenorm: bool = False,
        use_norm: bool = True,
        per_layer_skip: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.prenorm, self.per_layer_skip = prenorm, per_layer_skip
        self.mixer = mixer
        self.norm = FrameLayerNorm(dim, eps=1e-6) if use_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, u: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        """All frames (b, t, c, h, w) after a state, and the state after them."""
        y, state = self.mixer.run(per_frame(self.norm, u) if self.prenorm else u, state, reset)
        return per_frame(self._after, y, u), state

    def stepper(self) -> Step:
        """What takes one frame (b, c, h, w) and a state to the output and the next state."""
        mix = self.mixer.stepper()

        def step(u: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, state = mix(self.norm(u) if self.prenorm else u, state)
            return self._after(y, u), state

        return step

    def _after(self, y: Tensor, u: Tensor) -> Tensor:
        y = self.dropout(y) + u if self.per_layer_skip else self.dropout(y)
        return y if self.prenorm else self.norm(y)


class SequenceStack(nn.Module):
    """Sequence layers one after the other; the state is the list of theirs."""

    def __init__(self, layers: Sequence[SequenceLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, u: Tensor, state: list[Any] | None, reset: Tensor | None) -> tuple[Tensor, list[Any]]:
        """All frames (b, t, c, h, w) after a state (None at the start), and the state after them."""
        after = []
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            u, end = layer(u, before, reset)
            after.append(end)
        return u, after

    def stepper(self) -> Step:
        """What takes one frame (b, c, h, w) and a state to the output and the next state."""
        steppers = [layer.stepper() for layer in self.layers]

        def step(u: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
            after = []
            for advance, before in zip(steppers, state, strict=True):
                u, end = advance(u, before)
                after.append(end)
            return u, after

        return step

    def initial_state(self, batch: int, height: int, width: int) -> list[Any]:
        """What precedes a sequence of latents."""
        return [layer.mixer.initial_state(batch, height, width) for layer in self.layers]


class TransformerStack(nn.Module):
    """A causal Transformer over one token a frame, after a learned token that starts the sequence.

    The state is the keys and values of all frames so far or, without `kv_cache`, the tokens themselves, of which every
    step then computes all anew, as the official baseline does. Either grows with the video.

    Args:
        dim: Channels of a token.
        latent_channels: Channels of the latents that are made of it.
        latent_size: Side of these latents.
        kv_cache: Keep keys and values.
        **kwargs: What `CausalTransformer` takes.
    """

    def __init__(self, dim: int, latent_channels: int, latent_size: int, kv_cache: bool = True, **kwargs: Any) -> None:
        super().__init__()
        self.kv_cache = kv_cache
        self.sos = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.sos, std=0.02)
        self.transformer = CausalTransformer(dim, **kwargs)
        self.unproj = nn.ConvTranspose2d(dim, latent_channels, latent_size, stride=latent_size, bias=False)

    def forward(self, u: Tensor, state: Any, reset: Tensor | None) -> tuple[Tensor, Any]:
        """All frames (b, t, dim, 1, 1) after a state (None at the start) → latents, and the state after them."""
        if reset is not None:
            raise ValueError("a Transformer has no state to reset; run the clips one by one")
        if u.shape[-2:] != (1, 1):
            side = self.unproj.kernel_size[0]
            raise ValueError(
                f"latents must be {side} x {side}, one token a frame, not {u.shape[-2]} x {u.shape[-1]} tokens"
            )
        tokens = u.flatten(2)
        if state is None:
            tokens = torch.cat([self.sos.expand(len(u), -1, -1), tokens], dim=1)
        elif not self.kv_cache:
            tokens = torch.cat([state, tokens], dim=1)
        y, cache = self.transformer(tokens, state if self.kv_cache else None)
        latents = per_frame(self.unproj, y[:, -u.shape[1] :, :, None, None])
        return latents, cache if self.kv_cache else tokens

    def stepper(self) -> Step:
        """What takes one frame (b, dim, 1, 1) and a state to its latents (b, c, h, w) and the next state."""

        def step(u: Tensor, state: Any) -> tuple[Tensor, Any]:
            latents, state = self(u.unsqueeze(1), state, None)
            return latents.squeeze(1), state

        return step

    def initial_state(self, batch: int, height: int, width: int) -> Any:
        """What precedes a sequence: the starting token, or its keys and values."""
        tokens = self.sos.expand(batch, -1, -1)
        return self.transformer(tokens)[1] if self.kv_cache else tokens


class VideoPredictor(nn.Module):
    """Encoder, sequence model over the latents, decoder: each frame of a video → a prediction of the next one.

    Args:
        sequence_model: `SequenceStack` or `TransformerStack`.
        embed: From the encoder's channels and the action's to the sequence model: channels, side, has a bias.
        latent_channels: What the sequence model gives.
        in_channels: Channels of the video.
        depths: Channels of the encoder at each size, each half of the one before.
        blocks: Residual blocks of the encoder at each size.
        decoder_depths: The same of the decoder, in the encoder's order; None for the encoder's.
        decoder_blocks: The same of the decoder; None for the encoder's.
        action_dim: Number of actions, beside action 0 that stands for none.
        action_embed_dim: Channels of an action.
    """

    def __init__(
        self,
        sequence_model: nn.Module,
        embed: tuple[int, int, bool],
        latent_channels: int,
        in_channels: int = 1,
        depths: Sequence[int] = (64, 128, 256),
        blocks: int = 1,
        decoder_depths: Sequence[int] | None = None,
        decoder_blocks: int | None = None,
        action_dim: int = 1,
        action_embed_dim: int = 1,
    ) -> None:
        super().__init__()
        decoder_depths = depths if decoder_depths is None else decoder_depths
        if wrong := [depth for depth in (*depths, *decoder_depths) if depth % GROUPS]:
            raise ValueError(f"depths must be multiples of {GROUPS}, not {wrong[0]}")
        self.in_channels, self.side = in_channels, 2 ** (len(depths) - 1)
        width, size, bias = embed
        self.encoder = FrameEncoder(in_channels, depths, blocks)
        self.action_embed = nn.Embedding(action_dim + 1, action_embed_dim)
        self.embed = nn.Conv2d(depths[-1] + action_embed_dim, width, size, stride=size, bias=bias)
        self.sequence_model = sequence_model
        self.decoder = FrameDecoder(
            latent_channels, in_channels, decoder_depths, blocks if decoder_blocks is None else decoder_blocks
        )

    def forward(self, video: Tensor, actions: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
        """Predict, from each frame and those before it, the frame after it.

        Args:
            video: (b, t, in_channels, h, w) in (-1, 1); h and w multiples of 2^(sizes - 1).
            actions: Integers (b, t), or None for no action.
            reset: (b, t), True where a packed clip starts.

        Returns:
            Predictions in (-1, 1) of video's shape: number t is that of frame t + 1.

        Raises:
            ValueError: A video of another shape, or a reset of a Transformer.
        """
        latents, _ = self.forward_latents(video, actions, reset=reset)
        return per_frame(self.decoder, latents)

    def forward_latents(
        self, video: Tensor, actions: Tensor | None = None, state: Any = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """What `forward` decodes, (b, t, latent_channels, h, w), and the state after the last frame."""
        self._check(video)
        actions = video.new_zeros(video.shape[:2], dtype=torch.long) if actions is None else actions
        return self.sequence_model(per_frame(self._encode, video, actions), state, reset)

    def step(self, frame: Tensor, state: Any = None, action: Tensor | None = None) -> tuple[Tensor, Any]:
        """Predict the next frame from one frame (b, in_channels, h, w) and the state after the frames before it.

        Args:
            frame: (b, in_channels, h, w) in (-1, 1).
            state: As a step or `condition` returned it; None at the start.
            action: Integers (b), or None for no action.

        Returns:
            The prediction, of frame's shape, and the next state. That of ConvS5 and ConvLSTM has a constant size.
        """
        return self.stepper()(frame, state, action)

    def stepper(self) -> Callable[..., tuple[Tensor, Any]]:
        """`step` for streams: what depends on the parameters alone is computed once, here, and not for every frame."""
        advance = self.sequence_model.stepper()

        def step(frame: Tensor, state: Any = None, action: Tensor | None = None) -> tuple[Tensor, Any]:
            self._check(frame.unsqueeze(1))
            action = frame.new_zeros(len(frame), dtype=torch.long) if action is None else action
            u = self._encode(frame, action)
            state = self.sequence_model.initial_state(len(u), *u.shape[-2:]) if state is None else state
            latents, state = advance(u, state)
            return self.decoder(latents), state

        return step

    @torch.no_grad()
    def condition(self, video: Tensor, actions: Tensor | None = None) -> Any:
        """The state after a video (b, t, in_channels, h, w), of which all frames are computed at once."""
        return self.forward_latents(video, actions)[1] if video.shape[1] else None

    @torch.no_grad()
    def stream(self, video: Tensor) -> Iterator[Tensor]:
        """Frames (b, in_channels, h, w) that go on after a video (b, t, in_channels, h, w), without an end.

        Raises:
            ValueError: A video of another shape, or without a frame to go on from.
        """
        self._check(video)
        if not video.shape[1]:
            raise ValueError("a video of no frames has none to go on from")
        state, frame, step = self.condition(video[:, :-1]), video[:, -1], self.stepper()
        while True:
            frame, state = step(frame, state)
            yield frame

    def generate(self, video: Tensor, frames: int) -> Tensor:
        """The next frames (b, frames, in_channels, h, w) of a video, each predicted from the ones before it."""
        after = (frame.unsqueeze(1) for frame in islice(self.stream(video), frames))
        return torch.cat([video[:, :0], *after], dim=1)

    def _encode(self, frames: Tensor, actions: Tensor) -> Tensor:
        features = self.encoder(frames)
        embedded = self.action_embed(actions)[:, :, None, None].expand(-1, -1, *features.shape[-2:])
        return self.embed(torch.cat([features, embedded], dim=1))

    def _check(self, video: Tensor) -> None:
        sides = video.shape[-2:]
        if video.dim() != 5 or video.shape[2] != self.in_channels or any(side % self.side for side in sides):
            raise ValueError(
                f"video must be (b, t, {self.in_channels}, h, w), h and w multiples of {self.side}, "
                f"not {tuple(video.shape)}"
            )


class ConvS5Predictor(VideoPredictor):
    """ConvS5 over latents: trained on all frames at once, generating from a state of constant size.

    Args:
        d_model: Channels of the sequence layers.
        n_layers: Sequence layers.
        ssm: What `ConvS5` takes after `dim`.
        layer: What `SequenceLayer` takes after `dim`.
        **codec: What `VideoPredictor` takes from `in_channels` on.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_layers: int = 8,
        ssm: Mapping[str, Any] | None = None,
        layer: Mapping[str, Any] | None = None,
        **codec: Any,
    ) -> None:
        stack = _stack(lambda: ConvS5(d_model, **(ssm or {})), d_model, n_layers, layer)
        super().__init__(stack, (d_model, 1, True), d_model, **codec)


class ConvLSTMPredictor(VideoPredictor):
    """ConvLSTM over latents: each frame waits for the one before it, in training as well.

    Args:
        d_model: Channels of the sequence layers.
        n_layers: Sequence layers.
        kernel_size: Side of the convolutions of the ConvLSTM.
        layer: What `SequenceLayer` takes after `dim`.
        **codec: What `VideoPredictor` takes from `in_channels` on.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_layers: int = 8,
        kernel_size: int = 3,
        layer: Mapping[str, Any] | None = None,
        **codec: Any,
    ) -> None:
        stack = _stack(lambda: ConvLSTM(d_model, kernel_size), d_model, n_layers, layer)
        super().__init__(stack, (d_model, 1, True), d_model, **codec)


class TransformerPredictor(VideoPredictor):
    """A causal Transformer over one token a frame: its state grows with the video, and with it the cost of a frame.

    Args:
        d_model: Channels of a token.
        n_layers: Blocks.
        num_heads: Heads of attention.
        mlp_dim: Inner channels of the MLPs.
        latent_size: Side of the latents that one token stands for.
        latent_channels: Channels that are decoded.
        dropout: Dropout rate of the MLPs.
        attention_dropout: Dropout rate of attention weights.
        kv_cache: Keep keys and values while generating; the official baseline does not.
        **codec: What `VideoPredictor` takes from `in_channels` on.
    """

    def __init__(
        self,
        d_model: int = 1024,
        n_layers: int = 8,
        num_heads: int = 16,
        mlp_dim: int = 4096,
        latent_size: int = 16,
        latent_channels: int = 256,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        kv_cache: bool = True,
        **codec: Any,
    ) -> None:
        stack = TransformerStack(
            d_model, latent_channels, latent_size, kv_cache, depth=n_layers, num_heads=num_heads, mlp_dim=mlp_dim,
            dropout=dropout, attention_dropout=attention_dropout,
        )  # fmt: skip
        super().__init__(stack, (d_model, latent_size, False), latent_channels, **codec)


def _stack(
    make: Callable[[], nn.Module], d_model: int, n_layers: int, layer: Mapping[str, Any] | None
) -> SequenceStack:
    return SequenceStack([SequenceLayer(make(), d_model, **(layer or {})) for _ in range(n_layers)])


def prediction_loss(prediction: Tensor, target: Tensor, weight: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the paper's Moving-MNIST models, `weight` MSE + (1 - `weight`) L1, and both of them.

    Each is summed over channels and the width, and averaged over the rest, so its scale depends on these two alone.

    Args:
        prediction: (b, t, c, h, w).
        target: (b, t, c, h, w): the frame after each of those that the predictions were made from.
        weight: Of the MSE.
    """
    difference = prediction - target
    mse, l1 = (error.sum((2, 4)).mean() for error in (difference.square(), difference.abs()))
    return weight * mse + (1 - weight) * l1, mse, l1


# Official key (flax paths, joined by dots) → ours.
_RENAMES = (
    (r"^params\.", ""),
    (r"^(encoder|decoder)\.Conv_0", r"\1.stem"),
    (r"^decoder\.LayerNorm_0", "decoder.norm"),
    (r"^decoder\.Dense_0", "decoder.head"),
    (r"ResNetBlock_(\d+)", r"blocks.\1"),
    (r"AddBias_0", "conv2"),
    (r"^action_conv\.Conv_0|^z_proj", "embed"),
    (r"^action_embeds", "action_embed"),
    (r"^sequence_model\.layers_(\d+)", r"sequence_model.layers.\1"),
    (r"\.seq\.A$", ".mixer.gates.weight"),
    (r"\.seq\.", ".mixer."),
    (r"C_D_conv\.Dense_0", "feedthrough.gate"),
    (r"C_D_conv", "feedthrough"),
    (r"^(sos|z_unproj)", lambda match: "sequence_model." + match[1].removeprefix("z_")),
    (r"^z_tfm\.Dense_0", "sequence_model.transformer.proj_in"),
    (r"^z_tfm\.Dense_1", "sequence_model.transformer.proj_out"),
    (r"^z_tfm\.LayerNorm_0", "sequence_model.transformer.norm"),
    (r"^z_tfm\.TransformerLayer_(\d+)", r"sequence_model.transformer.layers.\1"),
    (r"MlpBlock_0\.wi", "mlp.fc1"),
    (r"MlpBlock_0\.wo(_bias)?", "mlp.fc2"),
    (r"MultiHeadAttention_0", "attn"),
    (r"attn\.out_bias", "attn.out"),
    (r"(?:Group|Layer)Norm_(\d)", lambda match: f"norm{int(match[1]) + 1}"),
    (r"Conv_(\d)", lambda match: f"conv{int(match[1]) + 1}"),
    (r"\.(kernel|scale|embedding)$", ".weight"),
)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official keys, flax paths joined by "/", → ours, which pass unchanged."""
    if not any("/" in key for key in state_dict):
        return dict(state_dict)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    converted = {}
    for path, value in state_dict.items():
        key = rename(path.replace("/", "."), _RENAMES)
        converted[key] = _rearranged(path, value, shapes.get(key, value.shape))
    return converted


def _rearranged(path: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A flax array as torch lays it out: outputs before inputs before the kernel's sides, heads flattened."""
    leaf = path.rpartition("/")[2]
    if path.endswith("z_unproj/kernel"):  # flax does not mirror the kernels of transposed convolutions
        return value.flip(0, 1).permute(2, 3, 0, 1)
    if leaf == "C":
        return value.permute(3, 2, 0, 1, 4)
    if leaf in ("kernel", "A"):
        heads = "MultiHeadAttention" in path and value.dim() == 3
        value = (value.flatten(0, 1) if "/out/" in path else value.flatten(1)) if heads else value
        value = value.permute(*range(value.dim())[:-3:-1], *range(value.dim() - 2))
    # What is left are dimensions of size 1, heads of biases and the flattened kernel of B.
    return value.reshape(shape) if value.numel() == shape.numel() else value


# What the official configuration says of training, of actions that are not used, and of sizes that videos have.
WITHOUT_EFFECT = (
    "action_dim", "action_embed_dim", "batch_size", "image_size", "latent_height", "latent_width", "loss_weight", "lr",
    "lr_schedule", "total_steps", "warmup_steps", "weight_decay",
)  # fmt: skip


def from_official(official_class: str, kwargs: Mapping[str, Any]) -> VideoPredictor | ConvS5:
    """Build from the configuration of the official models, or the arguments of the official layer.

    Raises:
        ValueError: A class or an option that is not known here.
    """
    if "ConvS5SSM" in official_class:
        return ConvS5(kwargs["U"], **_official_ssm(kwargs, kwargs))
    model, _, codes = official_class.partition("_")
    if model not in _OFFICIAL or codes not in ("", "NOVQ"):
        known = ", ".join((*_OFFICIAL, "ConvS5SSM"))
        raise ValueError(f"there is no official class {official_class!r} here; known: {known}")
    codec = {
        "in_channels": kwargs.get("channels", 1),
        "action_dim": kwargs.get("action_dim", 1) if kwargs.get("use_actions") else 1,
        "action_embed_dim": kwargs.get("action_embed_dim", 1) if kwargs.get("use_actions") else 1,
        **kwargs["encoder"],
        **{f"decoder_{name}": value for name, value in kwargs["decoder"].items()},
    }
    return _OFFICIAL[model](kwargs, codec)


def _official_convs5(kwargs: Mapping[str, Any], codec: Mapping[str, Any]) -> VideoPredictor:
    stack = kwargs["seq_model"]
    return ConvS5Predictor(
        kwargs["d_model"], stack["n_layers"], _official_ssm(kwargs["ssm"], stack), _official_layer(stack), **codec
    )


def _official_convlstm(kwargs: Mapping[str, Any], codec: Mapping[str, Any]) -> VideoPredictor:
    stack, ssm = kwargs["seq_model"], kwargs["ssm"]
    if ssm["ssm_size"] != kwargs["d_model"]:
        raise ValueError(f"ssm_size of a ConvLSTM must be d_model={kwargs['d_model']}, not {ssm['ssm_size']}")
    layer = _official_layer(stack)
    return ConvLSTMPredictor(kwargs["d_model"], stack["n_layers"], ssm["kernel_size"], layer, **codec)


def _official_transformer(kwargs: Mapping[str, Any], codec: Mapping[str, Any]) -> VideoPredictor:
    args = dict(kwargs["z_tfm_kwargs"])
    return TransformerPredictor(
        args.pop("embed_dim"), args.pop("num_layers"), latent_size=kwargs["z_ds"],
        latent_channels=kwargs["embedding_dim"], kv_cache=False, **args, **codec,
    )  # fmt: skip


_OFFICIAL: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], VideoPredictor]] = {
    "CONVS5": _official_convs5,
    "CONVLSTM": _official_convlstm,
    "TRANSFORMER": _official_transformer,
}


def _official_ssm(ssm: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(layer, "squeeze_excite")
    activation = layer.get("activation", layer.get("layer_activation", "gelu"))
    kernels = {f"{name}_kernel_size": ssm.get(f"k_{name}", ssm.get(f"{name}_kernel_size", 3)) for name in "BCD"}
    return kernels | {
        "ssm_size": ssm["ssm_size"],
        "ssm_blocks": ssm.get("blocks", 1),
        "feedthrough": ssm.get("C_D_config", "resnet"),
        "activation": {"swish": "silu"}.get(activation, activation),
        "num_groups": layer.get("num_groups", 32),
        "clip_eigs": ssm.get("clip_eigs", False),
        "dt_min": ssm.get("dt_min", 0.001),
        "dt_max": ssm.get("dt_max", 0.1),
    }


def _official_layer(stack: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(stack, "skip_connections")
    return {name: stack[name] for name in ("prenorm", "use_norm", "per_layer_skip", "dropout") if name in stack}


def _refuse(kwargs: Mapping[str, Any], option: str) -> None:
    if kwargs.get(option):
        raise ValueError(f"{option} is not built here: no published model has it, {option}={kwargs[option]!r}")


_OFFICIAL_MODELS = "https://github.com/NVlabs/ConvSSM"
_UNCHECKED = "No official output of the Transformer was at hand: only its keys, shapes and parameter count are checked."


def _cfg(**fields: Any) -> NetworkCfg:
    common = {
        "paper_name": "Convolutional State Space Models for Long-Range Spatiotemporal Modeling",
        "paper_ids": "arXiv:2310.19694",
        "origin_url": _OFFICIAL_MODELS,
        "license": "NVIDIA Source Code License, non-commercial",
        "input_size": (1, 300, 64, 64),
    }
    return NetworkCfg(**(common | fields))


def _convs5_cfg(frames: int) -> NetworkCfg:
    return _cfg(
        input_size=(1, frames, 64, 64),
        weights_license="NVIDIA Source Code License, non-commercial",
        by_hand=_OFFICIAL_MODELS,
        caveats=(
            "The official checkpoints are flax's msgpack files, which `checkpoint_path=` and "
            "`tools/convert_checkpoint.py` read as they are.",
        ),
    )


@register_network(_convs5_cfg(300))
def convs5_moving_mnist_train300(**kwargs: Any) -> ConvS5Predictor:
    """ConvS5 as trained on 300 frames of Moving-MNIST, 21.7M parameters."""
    return ConvS5Predictor(**kwargs)


@register_network(_convs5_cfg(600))
def convs5_moving_mnist_train600(**kwargs: Any) -> ConvS5Predictor:
    """ConvS5 as trained on 600 frames of Moving-MNIST, 7.4M parameters."""
    return ConvS5Predictor(**{"d_model": 128, "ssm": {"ssm_size": 128}, **kwargs})


@register_network(_cfg())
def convlstm_moving_mnist_train300(**kwargs: Any) -> ConvLSTMPredictor:
    """The paper's ConvLSTM for 300 frames of Moving-MNIST, 40.5M parameters."""
    return ConvLSTMPredictor(**kwargs)


@register_network(_cfg(input_size=(1, 600, 64, 64)))
def convlstm_moving_mnist_train600(**kwargs: Any) -> ConvLSTMPredictor:
    """The paper's ConvLSTM for 600 frames of Moving-MNIST, 12.1M parameters."""
    return ConvLSTMPredictor(**{"d_model": 128, **kwargs})


@register_network(_cfg(caveats=(_UNCHECKED,)))
def transformer_moving_mnist_train300(**kwargs: Any) -> TransformerPredictor:
    """The paper's Transformer for 300 frames of Moving-MNIST, 240.1M parameters."""
    return TransformerPredictor(**kwargs)


@register_network(_cfg(input_size=(1, 600, 64, 64), caveats=(_UNCHECKED,)))
def transformer_moving_mnist_train600(**kwargs: Any) -> TransformerPredictor:
    """The paper's Transformer for 600 frames of Moving-MNIST, 163.5M parameters."""
    return TransformerPredictor(**{"depths": (64, 128, 256, 512), "latent_size": 8, **kwargs})


_TINY: dict[str, Any] = {"d_model": 32, "n_layers": 2, "depths": (32, 32)}


@register_network(_cfg(input_size=(1, 8, 16, 16)))
def test_convs5(**kwargs: Any) -> ConvS5Predictor:
    """A tiny ConvS5 for tests."""
    return ConvS5Predictor(**{**_TINY, "ssm": {"ssm_size": 16}, **kwargs})


@register_network(_cfg(input_size=(1, 8, 16, 16)))
def test_convlstm(**kwargs: Any) -> ConvLSTMPredictor:
    """A tiny ConvLSTM for tests."""
    return ConvLSTMPredictor(**{**_TINY, **kwargs})


@register_network(_cfg(input_size=(1, 8, 16, 16)))
def test_video_transformer(**kwargs: Any) -> TransformerPredictor:
    """A tiny video Transformer for tests."""
    args: dict[str, Any] = {"num_heads": 2, "mlp_dim": 64, "latent_size": 8, "latent_channels": 32}
    return TransformerPredictor(**{**_TINY, **args, **kwargs})
