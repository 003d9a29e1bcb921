"""The micro model of every family, by the shape of its features, so that tests find new families by themselves."""

import timm

import ssmvision


def reductions(name: str) -> list[int]:
    return [level["reduction"] for level in timm.create_model(name, device="meta").feature_info]


NAMES = [name for name in ssmvision.list_models("test_*") if timm.is_model(name)]
PYRAMIDS = [name for name in NAMES if reductions(name) == [4, 8, 16, 32]]
PLAIN = [name for name in NAMES if len(set(reductions(name))) == 1]
