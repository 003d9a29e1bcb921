"""What hierarchical backbones share: stem → stages → norm → head, with timm's whole model API around them."""

from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from timm.layers import ClassifierHead, get_device_dtype
from timm.models import checkpoint_seq, named_apply
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ssmvision.layers._optimizer_options import undecayed_names
from ssmvision.models._init import init_linear, reset_parameters


class Stage(nn.Module):
    """Downsampling, then blocks: (b, c, h, w) → (b, dim, h', w').

    Args:
        downsample: (b, c, h, w) → (b, dim, h', w').
        blocks: Each keeps its input's shape.
        channels_last: Blocks see (b, h, w, dim); both permutations are views.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], channels_last: bool = True) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.channels_last = channels_last
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.channels_last:
            x = x.permute(0, 2, 3, 1)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2) if self.channels_last else x


class Pyramid(nn.Module):
    """A backbone whose stages give maps of falling resolution. Families subclass it and hand over their parts.

    Args:
        patch_embed: Stem, (b, in_chans, h, w) → (b, dims[0], h / stride, w / stride).
        stages: Each (b, dims[i - 1], ...) → (b, dims[i], ...), downsampling first; see `Stage`.
        dims: Channels of each stage.
        norm: Final norm on the last map.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: Pooling of the head.
        drop_rate: Dropout before the classifier.
        out_norms: A norm for every stage's output (the form that detectors and segmenters use), or none.
        head: In place of the usual one, with its `reset`, `fc` and `num_features`.
        stride: Of the stem; every later stage halves the resolution.
        device: Device of the classifier.
        dtype: Type of the classifier.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        stages: Sequence[nn.Module],
        dims: Sequence[int],
        norm: nn.Module,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        out_norms: Sequence[nn.Module] = (),
        head: Optional[nn.Module] = None,
        stride: int = 4,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.patch_embed = patch_embed
        self.stages = nn.Sequential(*stages)
        self.out_norms = nn.ModuleList(out_norms)
        self.norm = norm
        self.head: Any = head or ClassifierHead(
            dims[-1], num_classes, global_pool, drop_rate, device=device, dtype=dtype
        )

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize; with `needs_reset` also what layers initialize themselves (after `to_empty`)."""
        if needs_reset:
            named_apply(reset_parameters, self)
        named_apply(init_linear, self)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return undecayed_names(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        blocks = r"^stages\.(\d+)" if coarse else [
            (r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,)),
        ]  # fmt: skip
        return {"stem": r"^patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        self.num_classes = num_classes
        # A removed head has no parameters left that would tell where a new one belongs.
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """Stage outputs before downsampling; see timm's API. `norm` applies to the last, `out_norms` to all."""
        if output_fmt != "NCHW":
            raise ValueError(f"features of a pyramid are NCHW, not {output_fmt}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        intermediates: List[Tensor] = []
        x = self._embed(x)
        for i, stage in enumerate(self.stages):
            if not (stop_early and i > max_index):
                x = stage(x)
            if i in take_indices:
                tap = self._out_norm(x, i)
                intermediates.append(self.norm(tap) if norm and i == last else tap)
        if intermediates_only:
            return intermediates
        if not (stop_early and max_index < last):
            x = self.norm(self._out_norm(x, last))
        return x, intermediates

    def _out_norm(self, x: Tensor, stage: int) -> Tensor:
        for i, norm in enumerate(self.out_norms):
            if i == stage:
                x = norm(x)
        return x

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shorter = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        self.out_norms = self.out_norms[: max_index + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take_indices

    def _embed(self, x: Tensor) -> Tensor:
        torch._assert(x.shape[1] == self.in_chans, "the image does not have the model's number of channels (in_chans)")
        return self.patch_embed(x)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self._out_norm(self.stages(self._embed(x)), len(self.stages) - 1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
