"""Model cards: what was published about a weight, rendered with the front matter that the Hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

__all__ = ["Published", "render_card"]

# Data sets under the ids that the Hub knows them by.
_HUB_DATASETS = {
    "ImageNet-1K": "imagenet-1k", "ImageNet-21K": "imagenet-21k", "Kinetics-400": "kinetics-400",
    "Something-Something V2": "something-something-v2", "Breakfast": "breakfast", "COIN": "coin",
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """What the authors published about one weight file; nothing of it was measured here.

    Args:
        source: address of the page that states the numbers.
        top1: top-1 accuracy in percent.
        top5: top-5 accuracy in percent.
        dataset: evaluation data, named as the source names it.
        resolution: side of the evaluation images.
        frames: frames of the evaluation clips; 0 for images.
        views: crops and clips of a video that were averaged.
        flops: operations of one forward pass, as the source writes them.
        weights_license: licence of the weights, where it is not that of the code.
        sha256: digest of the official file, checked at download.
        by_hand: address of the page where a person gets the file, if no program can; the cfg then names no source.
        caveats: what a user should know before relying on the weights.
    """

    source: str
    top1: float | None = None
    top5: float | None = None
    dataset: str = "ImageNet-1K"
    resolution: int = 224
    frames: int = 0
    views: str = ""
    flops: str | None = None
    weights_license: str | None = None
    sha256: str | None = None
    by_hand: str | None = None
    caveats: tuple[str, ...] = ()

    @property
    def accuracies(self) -> dict[str, float]:
        """The accuracies that were published, by name."""
        return {name: value for name, value in (("Top-1", self.top1), ("Top-5", self.top5)) if value is not None}


def render_card(name: str, cfg: Mapping[str, Any], published: Published, parameters: int) -> str:
    """Render the model card of one weight as Markdown with YAML front matter.

    Args:
        name: `arch.tag`.
        cfg: timm pretrained cfg of the weight, as a dict.
        published: what its authors say about it.
        parameters: number of parameters, measured on the built model.
    """
    sections = [
        f"# {name}",
        cfg.get("description"),
        _facts(cfg, published, parameters),
        _usage(name, cfg, published),
        _caveats(published),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{_front_matter(name, cfg, published).to_yaml()}\n---\n\n{body}\n"


def _front_matter(name: str, cfg: Mapping[str, Any], published: Published) -> ModelCardData:
    licence = published.weights_license or cfg.get("license")
    known = licence is None or re.fullmatch(r"[a-z0-9.-]+", licence)
    dataset = _HUB_DATASETS.get(published.dataset, published.dataset)
    task = _task(cfg, published)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=published.dataset,
            metric_type="accuracy",
            metric_name=metric,
            metric_value=value,
            source_name="published by the authors",
            source_url=published.source,
        )
        for metric, value in published.accuracies.items()
    ]
    return ModelCardData(
        license=licence if known else "other",
        license_name=None if known else licence,
        library_name="ssmvision",
        pipeline_tag=task,
        tags=[task, "timm", "state-space-model"],
        datasets=[dataset],
        model_name=name,
        eval_results=results or None,
    )


def _task(cfg: Mapping[str, Any], published: Published) -> str:
    if cfg.get("num_classes") == 0:
        return "feature-extraction"
    return "video-classification" if published.frames else "image-classification"


def _facts(cfg: Mapping[str, Any], published: Published, parameters: int) -> str:
    channels, height, width = cfg["input_size"]
    sides = (channels, published.frames, height, width) if published.frames else (channels, height, width)
    evaluation = f"{published.dataset} @{published.resolution}"
    if published.frames:
        evaluation += f", {published.views} of {published.frames} frames"
    rows = {
        "Parameters": f"{parameters / 1e6:.2f} M (measured on the built model)",
        "FLOPs": published.flops and f"{published.flops} (published)",
        "Input": f"{' × '.join(map(str, sides))}, {cfg['interpolation']}, {_crop(cfg)}",
        "Mean, std": f"{tuple(cfg['mean'])}, {tuple(cfg['std'])}",
        **{f"{metric}, {evaluation}": f"{value} % (published)" for metric, value in published.accuracies.items()},
        "Who measured": published.accuracies and f"the authors: <{published.source}>",
        "Weights": _location(cfg, published),
        "sha256": published.sha256 and f"`{published.sha256}`",
        "Licence of the code": cfg.get("license"),
        "Licence of the weights": published.weights_license or cfg.get("license"),
        "Origin": cfg.get("origin_url") and f"<{cfg['origin_url']}>",
        "Paper": _paper(cfg),
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def _crop(cfg: Mapping[str, Any]) -> str:
    mode = cfg.get("crop_mode", "center")
    return f"crop {cfg['crop_pct']}" + (f" ({mode})" if mode != "center" else "")


def _location(cfg: Mapping[str, Any], published: Published) -> str:
    if published.by_hand:
        return f"<{published.by_hand}>, to be downloaded by hand"
    if cfg.get("hf_hub_id"):
        return (
            f"`{cfg['hf_hub_id']}`, file `{cfg.get('hf_hub_filename') or 'model.safetensors'}` on the Hugging Face Hub"
        )
    return f"<{cfg['url']}>"


def _paper(cfg: Mapping[str, Any]) -> str | None:
    ids = cfg.get("paper_ids") or ()
    links = [f"<https://arxiv.org/abs/{i.removeprefix('arXiv:')}>" for i in ([ids] if isinstance(ids, str) else ids)]
    return " ".join(filter(None, [cfg.get("paper_name"), *links])) or None


def _usage(name: str, cfg: Mapping[str, Any], published: Published) -> str:
    pretrained = "pretrained=True"
    if published.by_hand:
        pretrained += ', pretrained_cfg_overlay=dict(file="FILE")'
    new_head = f'\nmodel = ssmvision.create_model("{name}", {pretrained}, num_classes=10)  # a new head'
    return f"""## How to load

```python
import ssmvision

model = ssmvision.create_model("{name}", {pretrained}).eval(){new_head if cfg.get("num_classes") != 0 else ""}
model = ssmvision.create_model("{name}", {pretrained}, features_only=True)  # feature maps
model = ssmvision.create_model("{name}", checkpoint_path="FILE")  # the official file, already here
```

After `import ssmvision`, `timm.create_model` takes the same names."""


def _caveats(published: Published) -> str:
    first = ("The accuracy above is what the authors report; it was not measured with this package.",)
    caveats = (first if published.accuracies else ()) + published.caveats
    return "\n".join(["## Caveats", "", *(f"- {caveat}" for caveat in caveats)])
