"""A family of two toys, loaded under the name `ssmvision.models.toy_hub` so that the registry takes it for ours."""

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from ssmvision.models._builder import Published, build_model, weights_cfg

CLASSES = 7


class ToyNet(nn.Module):
    def __init__(self, num_classes=CLASSES, in_chans=3, width=8, global_pool="avg", device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.num_features = num_classes, width
        self.stem = nn.Conv2d(in_chans, width, 4, stride=4, **dd)
        self.body = nn.Conv2d(width, width, 2, stride=2, **dd)
        self.head = nn.Linear(width, num_classes, **dd) if num_classes else nn.Identity()
        self.feature_info = [
            {"num_chs": width, "reduction": 4, "module": "stem"},
            {"num_chs": width, "reduction": 8, "module": "body"},
        ]

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


_NAMES = {"patch": "stem", "trunk": "body", "fc": "head"}


def checkpoint_filter_fn(state_dict, model):
    if "patch.weight" not in state_dict:
        return state_dict
    return {f"{_NAMES[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in state_dict.items()}


def official_checkpoint(classes=CLASSES, seed=0, width=8):
    """Weights under the names that the toy's "official" code gives them."""
    torch.manual_seed(seed)
    ours = {value: key for key, value in _NAMES.items()}
    state = ToyNet(num_classes=classes, width=width).state_dict()
    return {f"{ours[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in state.items()}


def _cfg(**fields):
    return weights_cfg(num_classes=CLASSES, first_conv="stem", classifier="head", input_size=(3, 32, 32), **fields)


_HUB = {"hf_hub_id": "owner/toy", "hf_hub_filename": "toy_76p1acc.pth"}
PAGE = "https://example.org/toy"
default_cfgs = generate_default_cfgs(
    {
        "toyssm_a.orig_in1k": _cfg(**_HUB, license="apache-2.0", origin_url=PAGE, paper_ids="arXiv:0000.00000"),
        "toyssm_a.nc": _cfg(**_HUB, license="mit"),
        "toyssm_a.pinned": _cfg(**_HUB, license="mit"),
        "toyssm_a.shared": _cfg(license="mit"),
        "toyssm_b": _cfg(),
    }
)
PUBLISHED = {
    "toyssm_a.orig_in1k": Published(PAGE, top1=76.1, top5=93.0, flops="1.5 G", caveats=("It is a toy.",)),
    "toyssm_a.nc": Published(PAGE, weights_license="CC BY-NC-SA 4.0"),
    "toyssm_a.pinned": Published(PAGE, sha256="0" * 64),
    "toyssm_a.shared": Published(PAGE, by_hand="https://example.org/d/toy/view"),
}


@register_model
def toyssm_a(pretrained=False, **kwargs):
    return build_model(ToyNet, "toyssm_a", pretrained, checkpoint_filter_fn=checkpoint_filter_fn, **_two(kwargs))


@register_model
def toyssm_b(pretrained=False, **kwargs):
    args = dict({"width": 16}, **kwargs)
    return build_model(ToyNet, "toyssm_b", pretrained, checkpoint_filter_fn=checkpoint_filter_fn, **_two(args))


def _two(kwargs):
    return dict(kwargs, feature_cfg={"out_indices": (0, 1), "flatten_sequential": True})
