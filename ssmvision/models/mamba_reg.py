"""Mamba-Reg (Mamba®): Vim with registers, spread evenly over the sequence, that together tell the class.

Paper: `Mamba-Reg: Vision Mamba Also Needs Registers` - https://arxiv.org/abs/2405.14858
Official code and weights (no licence stated): https://github.com/wangf3014/Mamba-Reg
"""

from functools import partial
from typing import Any, Dict, List, Optional, Tuple, cast

import torch
from timm.layers import get_device_dtype, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ssmvision.layers import BiMamba
from ssmvision.layers.patch_embed import PatchEmbed
from ssmvision.layers.pos_embed import resize_pos_embed
from ssmvision.models._builder import Published, build_model, weights_cfg
from ssmvision.models._init import init_linear
from ssmvision.models._official import OfficialModel, block_taps, refuse_unpublished
from ssmvision.models._tokens import TokenModel, fit_pos_embed

__all__ = ["MambaReg"]


class MambaReg(TokenModel):
    """Mamba-Reg. Images of any size go in: the position embedding is resampled where the grid differs.

    Of n patches, a register follows each of the first `num_registers` groups of n // (num_registers + 1).

    Args:
        patch_size: Side of a patch.
        stride: Step between patches; None for patch_size.
        in_chans: Input channels.
        num_classes: Classes; 0 for none.
        global_pool: "token" (all registers), "avg" or "max" over patches, "" for all tokens.
        embed_dim: Channels.
        num_registers: Registers.
        register_reduction: Channels / channels of a register that the classifier reads; 1 reads registers as they are.
        d_state: State size of the scans.
        device: Device of the parameters.
        dtype: Type of the parameters.
        **kwargs: `img_size`, `depth`, `rms_norm` and rates of `TokenModel`.
    """

    def __init__(
        self,
        patch_size: int = 16,
        stride: Optional[int] = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 384,
        num_registers: int = 12,
        register_reduction: int = 2,
        d_state: int = 16,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        if num_registers < 1:
            raise ValueError(f"MambaReg: num_registers must be at least 1, not {num_registers}")
        super().__init__(
            PatchEmbed(patch_size, stride or patch_size, in_chans, embed_dim, **dd),
            partial(BiMamba, d_state=d_state, merge="mean"),
            patch_size=patch_size, stride=stride, in_chans=in_chans, num_classes=0, global_pool=global_pool,
            embed_dim=embed_dim, cls_position="none", **dd, **kwargs,
        )  # fmt: skip
        self.num_registers = num_registers
        self.register_reduction = register_reduction
        self.cls_token = nn.Parameter(torch.empty(1, num_registers, embed_dim, **dd))
        self.pos_embed_cls = nn.Parameter(torch.empty(1, num_registers, embed_dim, **dd))
        self._make_neck()
        self.reset_classifier(num_classes)
        self.init_weights(needs_reset=False)

    def _make_neck(self) -> None:
        """What registers pass on their way to the classifier. Other pooling has none, so that all parameters learn."""
        width = self.embed_dim // self.register_reduction
        self.head_hidden_size = self.num_registers * width if self.global_pool == "token" else self.embed_dim
        self.neck: nn.Module = nn.Identity()
        self.norm_neck: nn.Module = nn.Identity()
        if self.global_pool == "token" and self.register_reduction > 1:
            dd, norm = get_device_dtype(self), cast(Any, type(self.layers[0].norm))
            self.neck = nn.Linear(self.embed_dim, width, bias=False, **dd).train(self.training)
            self.norm_neck = norm(self.head_hidden_size, eps=1e-5, **dd).train(self.training)
            init_linear(self.neck)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize; with `needs_reset` also what layers initialize themselves (after `to_empty`)."""
        super().init_weights(needs_reset)
        trunc_normal_(self.pos_embed_cls, std=0.02)
        init_linear(self.neck)

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new classifier; and a new neck, where pooling begins to read registers."""
        before = self.global_pool
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        if (self.global_pool == "token") != (before == "token"):
            self._make_neck()
        super().reset_classifier(num_classes)
        # timm's users take it for the width of a model without a classifier.
        self.num_features = self.embed_dim if num_classes else self.head_hidden_size

    def _checked_pool(self, global_pool: str) -> str:
        return global_pool if global_pool == "token" else super()._checked_pool(global_pool)

    def _embed(self, x: Tensor) -> Tuple[Tensor, List[int]]:
        """Tokens with registers and positions, and the grid they came from."""
        torch._assert(x.shape[1] == self.in_chans, "the image does not have the model's number of channels (in_chans)")
        assert self.cls_token is not None
        assert self.pos_embed is not None
        x = self.patch_embed(x)
        B, _, H, W = x.shape
        pos_embed = resize_pos_embed(self.pos_embed, [H, W], [self.grid_size[0], self.grid_size[1]], None)
        x = x.flatten(2).transpose(1, 2) + pos_embed
        registers = (self.cls_token + self.pos_embed_cls).expand(B, -1, -1)
        gap = H * W // (self.num_registers + 1)
        groups = x[:, : self.num_registers * gap].unflatten(1, [self.num_registers, gap])
        groups = torch.cat([groups, registers.unsqueeze(2)], dim=2).flatten(1, 2)
        return self.pos_drop(torch.cat([groups, x[:, self.num_registers * gap :]], dim=1)), [H, W]

    def _split(self, x: Tensor) -> Tuple[Optional[Tensor], Tensor]:
        """The registers (b, num_registers, c) and the patches (b, grid, c)."""
        gap = (x.shape[1] - self.num_registers) // (self.num_registers + 1)
        end = self.num_registers * (gap + 1)
        groups = x[:, :end].unflatten(1, [self.num_registers, gap + 1])
        return groups[:, :, gap], torch.cat([groups[:, :, :gap].flatten(1, 2), x[:, end:]], dim=1)

    def _class_features(self, cls: Tensor) -> Tensor:
        return self.norm_neck(self.neck(cls).flatten(1))

    # Defined here, since fx takes functions for leaves only where the traced model's forward is defined.
    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, num_classes) of images (b, in_chans, h, w)."""
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: Any) -> Dict[str, Tensor]:
    """Keys are the official ones; the position embedding may need another grid, and no registers read no neck."""
    if model.global_pool != "token":
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith(("neck.", "norm_neck."))}
    return fit_pos_embed(state_dict, model)


# Official argument: (ours, official default).
_ARGUMENTS: Dict[str, Tuple[str, Any]] = {
    "img_size": ("img_size", 224), "patch_size": ("patch_size", 16), "stride": ("stride", None),
    "channels": ("in_chans", 3), "num_classes": ("num_classes", 1000), "embed_dim": ("embed_dim", 192),
    "depth": ("depth", 24), "d_state": ("d_state", 16), "num_cls_tokens": ("num_registers", 1),
    "cls_reduce": ("register_reduction", 1), "rms_norm": ("rms_norm", False),
}  # fmt: skip


def from_official(official_class: str, kwargs: Dict[str, Any]) -> OfficialModel:
    """Build from the arguments of the official `VisionMamba` of Mamba-Reg."""
    refuse_unpublished("MambaReg", kwargs, {"ssm_cfg": (None, {}), "norm_epsilon": (1e-5,)})
    args = {ours: kwargs.get(official, default) for official, (ours, default) in _ARGUMENTS.items()}
    return OfficialModel(MambaReg(**args), block_taps)


_SOURCE = "https://github.com/wangf3014/Mamba-Reg"
_CAVEATS = ("The repository states no licence, neither for the code nor for the weights.",)

# The published weights: architecture → top-1.
_WEIGHTS = {"mambar_small_patch16_224": 81.4, "mambar_base_patch16_224": 83.0, "mambar_large_patch16_224": 83.6}

PUBLISHED = {f"{name}.in1k": Published(source=_SOURCE, top1=top1, caveats=_CAVEATS) for name, top1 in _WEIGHTS.items()}


def _cfg(**fields: Any) -> Any:
    common = {
        "first_conv": "patch_embed.proj", "classifier": "head", "license": "none stated",
        "paper_name": "Mamba-Reg: Vision Mamba Also Needs Registers", "paper_ids": "arXiv:2405.14858",
        "origin_url": _SOURCE,
    }  # fmt: skip
    return weights_cfg(**(common | fields))


default_cfgs = generate_default_cfgs(
    {f"{name}.in1k": _cfg(hf_hub_id="Wangf3014/Mamba-Reg", hf_hub_filename=f"{name}.pth") for name in _WEIGHTS}
    | {"test_mamba_reg.untrained": _cfg(input_size=(3, 160, 160))}
)


def _create_mambar(variant: str, pretrained: bool = False, **kwargs: Any) -> MambaReg:
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model(
        MambaReg, variant, pretrained, checkpoint_filter_fn=checkpoint_filter_fn, feature_cfg=feature_cfg, **kwargs
    )


@register_model
def mambar_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """Mamba-Reg-S, 27.8M parameters."""
    args = dict(embed_dim=384, depth=24, num_registers=12, register_reduction=2)
    return _create_mambar("mambar_small_patch16_224", pretrained, **dict(args, **kwargs))


@register_model
def mambar_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """Mamba-Reg-B, 99.3M parameters."""
    args = dict(embed_dim=768, depth=24, num_registers=12, register_reduction=4)
    return _create_mambar("mambar_base_patch16_224", pretrained, **dict(args, **kwargs))


@register_model
def mambar_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """Mamba-Reg-L, 341.2M parameters."""
    args = dict(embed_dim=1024, depth=48, num_registers=16, register_reduction=8)
    return _create_mambar("mambar_large_patch16_224", pretrained, **dict(args, **kwargs))


@register_model
def test_mamba_reg(pretrained: bool = False, **kwargs: Any) -> MambaReg:
    """A micro model for tests."""
    args = dict(img_size=160, embed_dim=48, depth=4, num_registers=4, register_reduction=2)
    return _create_mambar("test_mamba_reg", pretrained, **dict(args, **kwargs))
