"""VideoMamba: bidirectional Mamba blocks over the patches of images and clips, and masked pretraining on clips.

Paper: `VideoMamba: State Space Model for Efficient Video Understanding` - https://arxiv.org/abs/2403.06977
Official code and weights (Apache-2.0): https://github.com/OpenGVLab/VideoMamba
"""

from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Type, Union

import torch
import torch.nn.functional as F
from timm.layers import RmsNorm
from timm.models import (
    checkpoint,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
    resolve_pretrained_cfg,
)
from timm.models._input import update_model_args
from torch import Tensor, nn

from ssmvision.layers import BiMamba
from ssmvision.layers.patch_embed import PatchEmbed, TubeletEmbed, grid_like
from ssmvision.layers.pos_embed import resize_pos_embed, resize_temporal_embed, sinusoid_table
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._official import OfficialModel, block_taps, refuse_unpublished
from ssmvision.models._tokens import TokenModel, fit_pos_embed

__all__ = ["VideoMamba", "VideoMambaDistilled", "VideoMambaImage", "VideoMambaPretrain"]


class VideoMambaImage(TokenModel):
    """VideoMamba of images (b, in_chans, h, w): Vim with the class token in front and both directions summed.

    Args:
        patch_size: Side of a patch.
        in_chans: Input channels.
        embed_dim: Channels.
        d_state: State size of the scans.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: `img_size`, `num_classes`, `global_pool`, `depth`, `rms_norm` and rates of `TokenModel`.
    """

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        d_state: int = 16,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            PatchEmbed(patch_size, patch_size, in_chans, embed_dim, **dd),
            partial(BiMamba, d_state=d_state, merge="sum"),
            patch_size=patch_size, stride=patch_size, in_chans=in_chans, embed_dim=embed_dim,
            cls_position="first", pos_embed=True, **dd, **kwargs,
        )  # fmt: skip
        self.init_weights(needs_reset=False)


class VideoMambaDistilled(VideoMambaImage):
    """The student of self-distillation: also tells what a teacher's features would be, in training as in evaluation.

    Args:
        teacher_dim: Channels of the teacher.
        **kwargs: Of `VideoMambaImage`.
    """

    def __init__(self, teacher_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        dd: Dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.distill_head = nn.Sequential(
            RmsNorm(self.embed_dim, eps=1e-5, **dd), nn.Linear(self.embed_dim, teacher_dim, **dd)
        )

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:  # type: ignore[override]
        """Logits (b, num_classes), and of every token, class token first, a unit vector (b, 1 + h * w, teacher_dim)."""
        x = self.forward_features(x)
        return self.forward_head(x), F.normalize(self.distill_head(x), dim=-1)


class VideoMamba(TokenModel):
    """VideoMamba of clips (b, in_chans, t, h, w) with any number of frames of any size.

    Tokens are those of the first frame in row-major order, then those of the next. Feature maps keep time,
    (b, embed_dim, t / tubelet_size, h / patch_size, w / patch_size), also where timm calls them NCHW. An image
    (b, in_chans, h, w) is a clip of one frame, and its feature maps have no time.

    Args:
        patch_size: Side of a patch.
        tubelet_size: Frames of a patch.
        num_frames: Frames that the temporal embedding is stored for; for others it is interpolated linearly.
        in_chans: Input channels.
        embed_dim: Channels.
        d_state: State size of the scans.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: `img_size`, `num_classes`, `global_pool`, `depth`, `rms_norm` and rates of `TokenModel`.
    """

    def __init__(
        self,
        patch_size: int = 16,
        tubelet_size: int = 1,
        num_frames: int = 8,
        in_chans: int = 3,
        embed_dim: int = 192,
        d_state: int = 16,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(
            TubeletEmbed(patch_size, tubelet_size, in_chans, embed_dim, **dd),
            partial(BiMamba, d_state=d_state, merge="sum"),
            patch_size=patch_size, stride=patch_size, in_chans=in_chans, embed_dim=embed_dim,
            cls_position="first", pos_embed=True, **dd, **kwargs,
        )  # fmt: skip
        self.tubelet_size = tubelet_size
        steps = self._steps(num_frames)
        self.temporal_pos_embedding = nn.Parameter(torch.empty(1, steps, embed_dim, **dd))
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize; with `needs_reset` also what layers initialize themselves (after `to_empty`)."""
        super().init_weights(needs_reset)
        nn.init.zeros_(self.temporal_pos_embedding)

    def _steps(self, num_frames: int) -> int:
        if num_frames < self.tubelet_size:
            raise ValueError(f"VideoMamba: {num_frames} frames are fewer than a tubelet ({self.tubelet_size})")
        return num_frames // self.tubelet_size

    @torch.jit.ignore
    def set_input_size(
        self, img_size: Union[int, Tuple[int, int], None] = None, num_frames: Optional[int] = None
    ) -> None:
        """Store the position embeddings for another image size or number of frames."""
        if img_size is not None:
            super().set_input_size(img_size)
        if num_frames is None:
            return
        resized = resize_temporal_embed(self.temporal_pos_embedding.detach(), self._steps(num_frames))
        self.temporal_pos_embedding = nn.Parameter(resized, self.temporal_pos_embedding.requires_grad)
        update_model_args(self, num_frames=num_frames)  # what an exported model is built with again

    def _embed(self, x: Tensor) -> Tuple[Tensor, List[int]]:
        """Tokens with class token and positions, and the grid they came from: (t, h, w) or, of an image, (h, w)."""
        torch._assert(x.shape[1] == self.in_chans, "the clip does not have the model's number of channels (in_chans)")
        assert self.cls_token is not None
        assert self.pos_embed is not None
        maps = self.patch_embed(x)
        B, _, T, H, W = maps.shape
        space = resize_pos_embed(self.pos_embed, [H, W], [self.grid_size[0], self.grid_size[1]], 0)
        time = resize_temporal_embed(self.temporal_pos_embedding, T)
        patches = maps.flatten(2).transpose(1, 2) + (space[:, 1:].unsqueeze(1) + time.unsqueeze(2)).flatten(1, 2)
        cls = (self.cls_token + space[:, :1]).expand(B, -1, -1)
        return self.pos_drop(torch.cat([cls, patches], dim=1)), grid_like(maps, x)

    # Defined here, since fx takes functions for leaves only where the traced model's forward is defined.
    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, num_classes) of clips (b, in_chans, t, h, w) or images (b, in_chans, h, w)."""
        return self.forward_head(self.forward_features(x))


class FeatureDecoder(nn.Module):
    """Tokens to a teacher's features: (..., dim) → (..., teacher_dim)."""

    def __init__(self, dim: int, teacher_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.head = nn.Linear(dim, teacher_dim, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(teacher_dim, eps=1e-5, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(x))


class VideoMambaPretrain(VideoMamba):
    """Masked pretraining (UMT, arXiv:2303.16058): the visible tokens alone tell a teacher's features of themselves.

    To fine-tune, load what was learned into a `VideoMamba`; `checkpoint_filter_fn` converts it. Features are those of
    a `VideoMamba` without a classifier.

    Args:
        teacher_dim: Channels of the teacher.
        num_decoders: Blocks whose outputs are decoded, each by a decoder of its own.
        decoder_interval: Blocks from one that is decoded to the next, counted from the last.
        normalize: Make the results unit vectors.
        decode_last_input: Decode what the last block gets in place of the normalised sum with what it gives, as the
            official code does; this block and, with one decoder, the final norm then learn nothing.
        **kwargs: Of `VideoMamba`.
    """

    def __init__(
        self,
        teacher_dim: int = 512,
        num_decoders: int = 1,
        decoder_interval: float = 1,
        normalize: bool = True,
        decode_last_input: bool = True,
        num_classes: int = 0,
        **kwargs: Any,
    ) -> None:
        if num_classes:
            raise ValueError("VideoMambaPretrain has no classifier; to fine-tune, load its weights into a VideoMamba")
        super().__init__(num_classes=0, **kwargs)
        dd: Dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        depth = len(self.layers)
        self.decoded = sorted(depth - 1 - int(i * decoder_interval) for i in range(num_decoders))
        if self.decoded[0] < 0 or len(set(self.decoded)) < num_decoders:
            raise ValueError(
                f"VideoMambaPretrain: {depth} blocks do not have {num_decoders} that are {decoder_interval} apart"
            )
        self.normalize = normalize
        self.decode_last_input = decode_last_input
        self.clip_decoder = nn.ModuleList(FeatureDecoder(self.embed_dim, teacher_dim, **dd) for _ in self.decoded)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Features of the visible tokens as the teacher would give them: (decoders, b, 1 + visible, teacher_dim).

        Args:
            x: Clips (b, in_chans, t, h, w).
            mask: True for the tokens to hide, (b, 1 + t * h * w in patches), the same number in every clip. The
                class token comes first and is usually visible. None hides nothing.
        """
        x, grid = self._embed(x)
        positions = sinusoid_table(x.shape[1], self.embed_dim).to(x).expand(x.shape[0], -1, -1)
        if mask is not None:
            visible = _visible(mask, x.shape[1])
            x, positions = (tokens[visible].reshape(x.shape[0], -1, self.embed_dim) for tokens in (x, positions))
        decoded = []
        for i, block in enumerate(self.layers):
            entering = x
            x = (
                checkpoint(block, x, grid)
                if self.grad_checkpointing and not torch.jit.is_scripting()
                else block(x, grid)
            )
            if i in self.decoded:
                last = i == len(self.layers) - 1
                decoded.append(entering if last and self.decode_last_input else self.norm_f(x))
        features = torch.stack([decode(y + positions) for decode, y in zip(self.clip_decoder, decoded, strict=True)])
        return F.normalize(features, dim=-1) if self.normalize else features


def _visible(mask: Tensor, tokens: int) -> Tensor:
    visible = ~mask.bool()
    if mask.dim() != 2 or mask.shape[1] != tokens:
        raise ValueError(f"the mask is {tuple(mask.shape)}, not (b, {tokens}): a class token and {tokens - 1} patches")
    counts = visible.sum(1)
    if (counts != counts[0]).any():
        raise ValueError(f"the mask leaves different numbers of tokens visible in the clips: {counts.tolist()}")
    return visible


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: Any) -> Dict[str, Tensor]:
    """Official keys → ours; position embeddings are resized where the model's grid or number of frames differs.

    A `VideoMamba` also takes the weights of an image model, inflated in time as the official code does, and of a
    pretraining model. It then keeps its own head. What only training needs, the heads that imitate teachers, is
    dropped where the model has no such head.
    """
    if isinstance(model, VideoMamba):
        state_dict = _trunk_of_clips(state_dict, model)
    unused = [name for name in ("distill_head", "clip_decoder") if not hasattr(model, name)]
    state_dict = {key: value for key, value in state_dict.items() if key.partition(".")[0] not in unused}
    return fit_pos_embed(state_dict, model)


def _trunk_of_clips(state_dict: Dict[str, Tensor], model: VideoMamba) -> Dict[str, Tensor]:
    ours = model.state_dict()
    # Our pretraining models call the final norm as all other models do.
    weights = {f"norm_f{key[4:]}" if key.startswith("norm.") else key: value for key, value in state_dict.items()}
    proj, time = weights.get("patch_embed.proj.weight"), weights.get("temporal_pos_embedding")
    from_images = proj is not None and proj.ndim == 4
    if from_images:
        assert proj is not None
        inflated = proj.new_zeros(*proj.shape[:2], model.tubelet_size, *proj.shape[2:])
        inflated[:, :, model.tubelet_size // 2] = proj
        weights["patch_embed.proj.weight"] = inflated
        time = proj.new_zeros(ours["temporal_pos_embedding"].shape)
    if from_images or any(key.startswith("clip_decoder.") for key in weights):
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
        weights |= {key: value for key, value in ours.items() if key.startswith("head.")}
    if time is not None:
        weights["temporal_pos_embedding"] = resize_temporal_embed(time, ours["temporal_pos_embedding"].shape[1])
    return weights


# Official arguments that change training or its memory, but not what a model computes.
_OF_TRAINING = {
    "drop_rate", "drop_path_rate", "fc_drop_rate", "initializer_cfg", "fused_add_norm", "residual_in_fp32",
    "use_checkpoint", "checkpoint_num", "device", "dtype",
}  # fmt: skip


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `VisionMamba` classes of images, clips, distillation or pretraining."""
    understood: Dict[str, Tuple[Any, ...]] = {
        "bimamba": (True,),
        "ssm_cfg": (None, {}),
        "norm_epsilon": (1e-5,),
        "model_type": ("student",),
    }
    refuse_unpublished("VideoMamba", kwargs, understood)
    if "video_mm" in official_class:
        raise ValueError("VideoMamba's models of videos and texts are not built here")
    kwargs = {name: value for name, value in kwargs.items() if name not in {*understood, *_OF_TRAINING}}
    model_cls: Type[nn.Module] = VideoMambaImage
    renames = {"channels": "in_chans"}
    if "video_sm" in official_class:
        model_cls = VideoMamba
        renames |= {"kernel_size": "tubelet_size"}
    if "pretrain" in official_class:
        model_cls = VideoMambaPretrain
        renames |= {
            "clip_output_dim": "teacher_dim", "clip_return_layer": "num_decoders",
            "clip_student_return_interval": "decoder_interval",
        }  # fmt: skip
        kwargs["normalize"] = {"l2": True, "none": False}[kwargs.pop("clip_norm_type", "l2")]
        width, decoder = kwargs.get("embed_dim", 192), kwargs.pop("clip_decoder_embed_dim", 768)
        if width != decoder:
            raise ValueError(f"VideoMamba's decoders read {decoder} channels and its blocks give {width}")
    elif "distill" in official_class:
        model_cls = VideoMambaDistilled
        renames |= {"teacher_embed_dim": "teacher_dim"}
    try:
        model = model_cls(**{renames.get(name, name): value for name, value in kwargs.items()})
    except TypeError as error:
        raise ValueError(f"VideoMamba cannot be built from these arguments: {error}") from error
    return OfficialModel(model, block_taps, inputs=("mask",) if "pretrain" in official_class else ())


_SOURCE = "https://github.com/OpenGVLab/VideoMamba"

# Training data → (name, classes, (frames, image side) of its weights, views that are averaged); images have 0 frames.
_DATA: Dict[str, Tuple[str, int, Tuple[Tuple[int, int], ...], str]] = {
    "in1k": ("ImageNet-1K", 1000, ((0, 224), (0, 448), (0, 576)), ""),
    "k400": ("Kinetics-400", 400, ((8, 224), (16, 224), (32, 224), (64, 224), (64, 384)), "3 crops × 4 clips"),
    "ssv2": ("Something-Something V2", 174, ((8, 224), (16, 224), (16, 288)), "3 crops × 4 clips"),
    "breakfast": ("Breakfast", 10, ((32, 224), (64, 224)), "3 crops × 4 clips"),
    "coin": ("COIN", 180, ((32, 224), (64, 224)), "3 × 10 views"),
}

# Published top-1, in the order of these settings, by (size, training data, how it was trained).
_TOP1 = {
    ("tiny", "in1k", ""): (76.9, 79.3, 79.6),
    ("small", "in1k", ""): (81.2, 83.2, 83.5),
    ("middle", "in1k", ""): (82.8, 83.8, 84.0),
    ("base", "in1k", ""): (82.7,),
    ("tiny", "k400", ""): (76.9, 78.1, 78.8, 79.6, 80.3),
    ("small", "k400", ""): (79.3, 80.8, 81.5, 81.8, 82.7),
    ("middle", "k400", ""): (80.6, 81.9, 82.4, 82.8, 83.3),
    ("middle", "k400", "_mask_ft"): (82.0, 83.4, 83.9, 84.3, 85.0),
    ("tiny", "ssv2", ""): (65.1, 66.0, 66.2),
    ("small", "ssv2", ""): (66.6, 67.7, 68.1),
    ("middle", "ssv2", ""): (67.3, 68.3, 68.4),
    ("middle", "ssv2", "_mask_ft"): (70.2, 71.0, 71.4),
    ("tiny", "breakfast", ""): (94.3, 94.3),
    ("small", "breakfast", ""): (95.3, 97.4),
    ("middle", "breakfast", ""): (94.8, 95.8),
    ("middle", "breakfast", "_mask_ft"): (97.9, 96.9),
    ("tiny", "coin", ""): (86.2, 87.0),
    ("small", "coin", ""): (88.4, 88.7),
    ("middle", "coin", ""): (88.3, 89.5),
    ("middle", "coin", "_mask_ft"): (89.6, 90.4),
}
_FLOPS = {
    "tiny": {224: "1.1G", 448: "4.3G", 576: "7.1G"},
    "small": {224: "4.3G", 448: "16.9G", 576: "28.0G"},
    "middle": {224: "12.7G", 448: "50.4G", 576: "83.1G"},
    "base": {224: "16.9G"},
}

_DISTILLED = (
    "Trained by self-distillation. The head that imitates the teacher, should the file carry it, is dropped.",
)
# Rows of the official tables whose link names the file of another row.
_WRONG_LINKS = (
    "videomamba_t16_in1k_res224to448",
    "videomamba_m16_k400_mask_ft_f16_res224",
    "videomamba_m16_ssv2_mask_ft_f16_res224",
)
_INFERRED = ("The official table links another row's file here; the file name follows the pattern of the others.",)
_PRETRAINING = (
    "Without a classifier: `model(clips, mask)` gives features of the visible tokens that imitate those of CLIP.",
    "The official code decodes what enters the last block, so that this block and the final norm are untrained.",
    'To fine-tune: `create_model("videomamba_middle_patch16_video", num_classes=10, checkpoint_path="FILE")`.',
)


class _Weights(NamedTuple):
    file: str  # without ".pth"; also the official name
    data: str
    frames: int
    side: int
    top1: Optional[float] = None
    flops: Optional[str] = None
    caveats: Tuple[str, ...] = ()


def _weights() -> Dict[str, _Weights]:
    """What the tables above say about each of our names, with the file names' pattern."""
    stages = {224: "224", 288: "224to288", 384: "224to384", 448: "224to448", 576: "224to448to576"}
    weights = {}
    for (size, data, recipe), accuracies in _TOP1.items():
        for (frames, side), top1 in zip(_DATA[data][2], accuracies, strict=False):
            arch, tag = f"videomamba_{size}_patch16", f"{data}{recipe}"
            if frames:
                arch, tag = f"{arch}_video", f"{tag}_f{frames}"
            file = f"videomamba_{size[0]}16_{tag}_res{stages[side]}"
            caveats: Tuple[str, ...] = _DISTILLED if not frames and size in ("middle", "base") else ()
            caveats += _INFERRED if file in _WRONG_LINKS else ()
            flops = None if frames else _FLOPS[size][side]
            weights[f"{arch}.{tag}" + ("" if side == 224 else f"_{side}")] = _Weights(
                file, data, frames, side, top1, flops, caveats
            )
    for data in ("k400", "ssv2"):
        tag = f"{data}_mask_pt_f8"
        weights[f"videomamba_middle_patch16_pretrain.{tag}"] = _Weights(
            f"videomamba_m16_{tag}_res224", data, 8, 224, caveats=_PRETRAINING
        )
    return weights


_WEIGHTS = _weights()

PUBLISHED = {
    name: Published(
        source=_SOURCE, top1=w.top1, dataset=_DATA[w.data][0], resolution=w.side, flops=w.flops, frames=w.frames,
        views=_DATA[w.data][3], caveats=w.caveats,
    )
    for name, w in _WEIGHTS.items()
}  # fmt: skip


def _cfg(**fields: Any) -> Any:
    common = {
        "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
        "paper_name": "VideoMamba: State Space Model for Efficient Video Understanding",
        "paper_ids": "arXiv:2403.06977", "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


def _cfg_of(name: str, weights: _Weights) -> Any:
    fields: Dict[str, Any] = {"num_classes": _DATA[weights.data][1], "input_size": (3, weights.side, weights.side)}
    if weights.frames:  # frames are resized to the input's side and not cropped further
        fields |= {"interpolation": "bilinear", "crop_pct": 1.0}
    if "_pretrain." in name:
        fields |= {"num_classes": 0, "classifier": None}
    return _cfg(hf_hub_id="OpenGVLab/VideoMamba", hf_hub_filename=f"{weights.file}.pth", **fields)


default_cfgs = generate_default_cfgs(
    {name: _cfg_of(name, weights) for name, weights in _WEIGHTS.items()}
    | {
        "test_videomamba.untrained": _cfg(input_size=(3, 160, 160)),
        "test_videomamba_video.untrained": _cfg(input_size=(3, 160, 160)),
    }
)


def _create_videomamba(model_cls: Type[nn.Module], variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """Build for the image size and the frames of a tag, which timm's cfg alone would not do."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if weights := _WEIGHTS.get(f"{variant}.{cfg.tag}"):
        stored = {"img_size": weights.side} | ({"num_frames": weights.frames} if weights.frames else {})
        kwargs = stored | kwargs
    return build_model(
        model_cls, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **kwargs,
    )  # fmt: skip


@register_model
def videomamba_tiny_patch16(pretrained: bool = False, **kwargs: Any) -> VideoMambaImage:
    """VideoMamba-Ti for images, 7.1M parameters."""
    args = dict(embed_dim=192, depth=24)
    return _create_videomamba(VideoMambaImage, "videomamba_tiny_patch16", pretrained, **dict(args, **kwargs))


@register_model
def videomamba_small_patch16(pretrained: bool = False, **kwargs: Any) -> VideoMambaImage:
    """VideoMamba-S for images, 25.8M parameters."""
    args = dict(embed_dim=384, depth=24)
    return _create_videomamba(VideoMambaImage, "videomamba_small_patch16", pretrained, **dict(args, **kwargs))


@register_model
def videomamba_middle_patch16(pretrained: bool = False, **kwargs: Any) -> VideoMambaImage:
    """VideoMamba-M for images, 74.2M parameters."""
    args = dict(embed_dim=576, depth=32)
    return _create_videomamba(VideoMambaImage, "videomamba_middle_patch16", pretrained, **dict(args, **kwargs))


@register_model
def videomamba_base_patch16(pretrained: bool = False, **kwargs: Any) -> VideoMambaImage:
    """VideoMamba-B for images, 97.6M parameters."""
    args = dict(embed_dim=768, depth=24)
    return _create_videomamba(VideoMambaImage, "videomamba_base_patch16", pretrained, **dict(args, **kwargs))


@register_model
def videomamba_tiny_patch16_video(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-Ti for clips, 7.0M parameters."""
    args = dict(embed_dim=192, depth=24)
    return _create_videomamba(VideoMamba, "videomamba_tiny_patch16_video", pretrained, **dict(args, **kwargs))


@register_model
def videomamba_small_patch16_video(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-S for clips, 25.6M parameters."""
    args = dict(embed_dim=384, depth=24)
    return _create_videomamba(VideoMamba, "videomamba_small_patch16_video", pretrained, **dict(args, **kwargs))


@register_model
def videomamba_middle_patch16_video(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """VideoMamba-M for clips, 73.9M parameters."""
    args = dict(embed_dim=576, depth=32)
    return _create_videomamba(VideoMamba, "videomamba_middle_patch16_video", pretrained, **dict(args, **kwargs))


@register_model
def videomamba_middle_patch16_pretrain(pretrained: bool = False, **kwargs: Any) -> VideoMambaPretrain:
    """VideoMamba-M in masked pretraining, 73.9M parameters."""
    args = dict(embed_dim=576, depth=32)
    return _create_videomamba(
        VideoMambaPretrain, "videomamba_middle_patch16_pretrain", pretrained, **dict(args, **kwargs)
    )


@register_model
def test_videomamba(pretrained: bool = False, **kwargs: Any) -> VideoMambaImage:
    """A micro model of images for tests."""
    args = dict(img_size=160, embed_dim=48, depth=4)
    return _create_videomamba(VideoMambaImage, "test_videomamba", pretrained, **dict(args, **kwargs))


@register_model
def test_videomamba_video(pretrained: bool = False, **kwargs: Any) -> VideoMamba:
    """A micro model of clips for tests."""
    args = dict(img_size=160, embed_dim=48, depth=4, num_frames=4)
    return _create_videomamba(VideoMamba, "test_videomamba_video", pretrained, **dict(args, **kwargs))


# timm has no aliases but names of the past: hidden from lists, mapped to the name of today with a warning.
register_model_deprecations(__name__, {weights.file: name for name, weights in _WEIGHTS.items()})
