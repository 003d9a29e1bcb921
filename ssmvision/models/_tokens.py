"""What plain, ViT-like stacks of equal blocks share: patches, class token and positions in, timm's API around them."""

import math
from collections.abc import Callable
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from timm.layers import (
    DropPath,
    RmsNorm,
    calculate_drop_path_rates,
    get_device_dtype,
    lecun_normal_,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, named_apply
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed_names
from ssmvision.layers.pos_embed import resize_pos_embed
from ssmvision.models._init import init_linear, reset_parameters


class TokenBlock(nn.Module):
    """Pre-norm residual block around a mixer: (b, l, dim) → the same. It also gets the grid of the tokens."""

    def __init__(self, dim: int, mixer: nn.Module, norm: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: List[int]) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class TokenModel(nn.Module):
    """A plain stack of token blocks. Images of any size go in: the position embedding is resampled where grids differ.

    Args:
        patch_embed: Images to maps of patches; its convolution is called `proj`.
        mixer: Makes the mixer of a block, called as mixer(dim, device=, dtype=); or one such call for each block.
        img_size: Image size that the position embedding is stored for.
        patch_size: Side of a patch.
        stride: Step between patches; None for patch_size.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: "token" (the class token), "avg" or "max" over patches, "" for all tokens.
        embed_dim: Channels.
        depth: Blocks.
        cls_position: Where the class token stands: "middle", "first" or "none".
        pos_embed: Add a position embedding.
        rms_norm: RMSNorm; otherwise LayerNorm.
        drop_rate: Dropout before the classifier.
        pos_drop_rate: Dropout after the position embedding.
        drop_path_rate: Largest stochastic depth rate, reached in the last block.
        block: Makes a block, called as `TokenBlock`.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        mixer: Union[Callable[..., nn.Module], Sequence[Callable[..., nn.Module]]],
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: int = 16,
        stride: Optional[int] = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        cls_position: str = "first",
        pos_embed: bool = True,
        rms_norm: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        block: Callable[..., nn.Module] = TokenBlock,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_size, self.stride = patch_size, stride or patch_size
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.cls_position = cls_position
        self.num_prefix_tokens = 0 if cls_position == "none" else 1
        self.global_pool = self._checked_pool(global_pool)
        self.grad_checkpointing = False
        self.antialias = True  # of the position embedding where it is resampled
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": self.stride, "module": f"layers.{i}"} for i in range(depth)
        ]

        self.grid_size = self._grid(to_2tuple(img_size))
        tokens = self.grid_size[0] * self.grid_size[1] + self.num_prefix_tokens
        self.patch_embed = patch_embed
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if self.num_prefix_tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd)) if pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)

        def norm() -> nn.Module:
            return RmsNorm(embed_dim, eps=1e-5, **dd) if rms_norm else nn.LayerNorm(embed_dim, eps=1e-5, **dd)

        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        mixers = [mixer] * depth if callable(mixer) else mixer
        self.layers = nn.ModuleList(
            block(embed_dim, make(embed_dim, **dd), norm(), rate) for make, rate in zip(mixers, rates, strict=True)
        )
        self.norm_f = norm()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize; with `needs_reset` also what layers initialize themselves (after `to_empty`)."""
        if needs_reset:
            named_apply(reset_parameters, self)
        proj: Any = self.patch_embed.proj
        lecun_normal_(proj.weight)
        nn.init.zeros_(proj.bias)
        for token in (self.cls_token, self.pos_embed):
            if token is not None:
                trunc_normal_(token, std=0.02)
        with torch.no_grad():
            mixers: Any = [module for module in self.layers.modules() if hasattr(module, "out_proj")]
            for mixer in mixers:
                nn.init.kaiming_uniform_(mixer.out_proj.weight, a=math.sqrt(5))
                mixer.out_proj.weight /= math.sqrt(len(mixers))
        init_linear(self.head)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        positions = ("pos_embed", "pos_embedding", "pos_embed_cls", "cls_token")
        return undecayed_names(self) | {name for name, _ in self.named_parameters() if name.endswith(positions)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return {
            "stem": r"^cls_token|\w*pos_embed|patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)
        init_linear(self.head)

    @torch.jit.ignore
    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Store the position embedding for another image size."""
        old, self.grid_size = self.grid_size, self._grid(to_2tuple(img_size))
        update_model_input_size(self, img_size)  # what an exported model is built with again
        if self.pos_embed is None:
            return
        frozen = not self.pos_embed.requires_grad
        resized = resize_pos_embed(
            self.pos_embed.detach(), list(self.grid_size), list(old), self._cls_index(old), self.antialias
        )
        self.pos_embed = nn.Parameter(resized, requires_grad=not frozen)

    def _grid(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        if min(img_size) < self.patch_size:
            name = type(self).__name__
            raise ValueError(f"{name}: image size {tuple(img_size)} is smaller than a patch ({self.patch_size})")
        h, w = ((side - self.patch_size) // self.stride + 1 for side in img_size)
        return h, w

    def _checked_pool(self, global_pool: str) -> str:
        # timm's models assert their pooling, and code written for them catches that.
        name = type(self).__name__
        assert global_pool in ("token", "avg", "max", ""), (
            f"{name}: global_pool must be token, avg or max, not {global_pool!r}"
        )
        if global_pool == "token" and self.cls_position == "none":
            raise ValueError(f"{name}: global_pool='token' needs a class token")
        return global_pool

    def _cls_index(self, grid: Tuple[int, int]) -> Optional[int]:
        if self.cls_position == "none":
            return None
        return 0 if self.cls_position == "first" else grid[0] * grid[1] // 2

    def _embed(self, x: Tensor) -> Tuple[Tensor, List[int]]:
        """Tokens with class token and positions, and the grid they came from."""
        torch._assert(x.shape[1] == self.in_chans, "the image does not have the model's number of channels (in_chans)")
        x = self.patch_embed(x)
        B, _, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            at = 0 if self.cls_position == "first" else H * W // 2
            x = torch.cat([x[:, :at], self.cls_token.expand(B, -1, -1), x[:, at:]], dim=1)
        if self.pos_embed is not None:
            grid = self.grid_size
            x = x + resize_pos_embed(self.pos_embed, [H, W], [grid[0], grid[1]], self._cls_index(grid), self.antialias)
        return self.pos_drop(x), [H, W]

    def _split(self, x: Tensor) -> Tuple[Optional[Tensor], Tensor]:
        """The class token (b, 1, c), if there is one, and the patches (b, grid, c)."""
        if self.cls_position == "none":
            return None, x
        at = 0 if self.cls_position == "first" else (x.shape[1] - 1) // 2
        return x[:, at : at + 1], torch.cat([x[:, :at], x[:, at + 1 :]], dim=1)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Outputs of blocks as maps (NCHW) or patch tokens (NLC); see timm's API."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"features are NCHW or NLC, not {output_fmt}")
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        x, grid = self._embed(x)
        intermediates: List[Tensor] = []
        prefixes: List[Optional[Tensor]] = []
        for i, block in enumerate(self.layers):
            if not (stop_early and i > max_index):
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, grid)
                else:
                    x = block(x, grid)
            if i in take_indices:
                cls, patches = self._split(self.norm_f(x) if norm else x)
                as_map = patches.transpose(1, 2).unflatten(2, grid)
                intermediates.append(as_map if output_fmt == "NCHW" else patches)
                prefixes.append(cls)
        if return_prefix_tokens and not torch.jit.is_scripting():
            intermediates = list(zip(intermediates, prefixes, strict=True))  # type: ignore[arg-type]
        if intermediates_only:
            return intermediates
        return self.norm_f(x), intermediates

    @torch.jit.ignore
    def get_intermediate_layers(
        self,
        x: Tensor,
        n: Union[int, List[int]] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """The DINO-style form of `forward_intermediates`."""
        fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, output_fmt=fmt, intermediates_only=True)

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        take_indices, max_index = feature_take_indices(len(self.layers), indices)
        shorter = max_index < len(self.layers) - 1
        self.layers = self.layers[: max_index + 1]
        if prune_norm or shorter:
            self.norm_f = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        x, grid = self._embed(x)
        for block in self.layers:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid)
            else:
                x = block(x, grid)
        return self.norm_f(x)

    def _class_features(self, cls: Tensor) -> Tensor:
        """Class tokens (b, tokens, c) → what the classifier reads."""
        return cls.flatten(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.global_pool:
            cls, patches = self._split(x)
            if self.global_pool == "token":
                assert cls is not None
                x = self._class_features(cls)
            else:
                x = patches.mean(1) if self.global_pool == "avg" else patches.amax(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def fit_pos_embed(state_dict: Dict[str, Tensor], model: Any) -> Dict[str, Tensor]:
    """Weights of a square image under the model's own keys, the position embedding resized to the model's grid."""
    pos_embed, target = state_dict.get("pos_embed"), getattr(model, "pos_embed", None)
    if pos_embed is None or target is None or pos_embed.shape[1] == target.shape[1]:
        return state_dict
    patches = pos_embed.shape[1] - model.num_prefix_tokens
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"the checkpoint's position embedding has {patches} patches, not a square to resize from")
    at = model._cls_index((side, side))
    resized = resize_pos_embed(pos_embed, list(model.grid_size), [side, side], at, model.antialias)
    return {**state_dict, "pos_embed": resized}
