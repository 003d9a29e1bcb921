"""Write the table of models into README.md, between its markers, from the registry and one file of measured ratios.

python tools/zoo_table.py              write the table
python tools/zoo_table.py --check      exit 1 if the README differs from what would be written
python tools/zoo_table.py --measure    time the models beside timm's Swin-T first, and store the ratios and the hardware
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs

from ssmvision import list_models
from ssmvision.engine import benchmark
from ssmvision.models._builder import forbids_commercial_use
from ssmvision_tools.model_cards import parameters, published_of_family

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
TIMINGS = ROOT / "docs" / "zoo_timings.json"
BEGIN, END = "<!-- zoo table: python tools/zoo_table.py -->", "<!-- end of zoo table -->"
YARDSTICK = "swin_tiny_patch4_window7_224"
HEAD = "| family | paper | model | parameters | top-1 | licence of the weights | CPU time / Swin-T |"


def architectures() -> list[str]:
    """Architectures with published weights, in the order of the registry."""
    names = [name.partition(".")[0] for name in list_models(include_tags=True) if name in published_of_family(name)]
    return list(dict.fromkeys(names))


def render(timings: dict[str, Any]) -> str:
    """The table as Markdown."""
    rows = [_row(name, timings["ratios"].get(name)) for name in sorted(architectures(), key=_family)]
    note = (
        "Top-1 is what the authors publish for the default weights, on ImageNet-1K unless named. CPU time: one forward "
        f"pass at batch 1, 224 × 224, relative to timm's Swin-T in one run ({timings['hardware']})."
    )
    return "\n".join([HEAD, "| --- | --- | --- | --- | --- | --- | --- |", *rows, "", note])


def _family(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def _row(name: str, ratio: float | None) -> str:
    tags = {tag: cfg for tag, cfg in get_arch_pretrained_cfgs(name).items() if tag in published_of_family(tag)}
    tag, cfg = next(iter(tags.items()))
    published = published_of_family(tag)[tag]
    ids = cfg.paper_ids if isinstance(cfg.paper_ids, str) else (cfg.paper_ids or ("",))[0]
    paper = ids.removeprefix("arXiv:")
    top1 = "–" if published.top1 is None else f"{published.top1}"
    if published.top1 is not None and (published.resolution != 224 or published.dataset != "ImageNet-1K"):
        data = "" if published.dataset == "ImageNet-1K" else f"{published.dataset} "
        top1 += f" ({data}@{published.resolution})"
    licence = published.weights_license or cfg.license or "none stated"
    if forbids_commercial_use(licence):
        licence = f"**{licence}**, non-commercial"
    if published.by_hand:
        licence += ", download by hand"
    cells = [_family(name), f"[{paper}](https://arxiv.org/abs/{paper})", f"`{name}`", f"{parameters(tag) / 1e6:.1f}M",
             top1, licence, "–" if ratio is None else f"{ratio:.2f}"]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _is_for_224(name: str) -> bool:
    """Whether an architecture classifies images of 224 pixels; windows of others would mostly be padding there."""
    cfg = timm.get_pretrained_cfg(name)
    return cfg is not None and cfg.input_size == (3, 224, 224) and not re.search("_video|_pretrain", name)


def measure(names: Sequence[str], repeats: int, timings: dict[str, Any]) -> dict[str, Any]:
    """Time of each model over that of the yardstick, the two taking turns; earlier ratios of other models stay."""
    ratios = dict(timings["ratios"])
    yardstick = benchmark.model_call(*benchmark.build(YARDSTICK, 224, False), False)
    for name in names:
        ours = benchmark.model_call(*benchmark.build(name, 224, False), False)
        times = benchmark.interleaved({"ours": ours, "yardstick": yardstick}, repeats)
        ratios[name] = round(times["ours"] / times["yardstick"], 2)
        print(f"{name}: {ratios[name]:.2f}", flush=True)
    return {"hardware": benchmark.hardware(), "ratios": dict(sorted(ratios.items()))}


def insert(readme: str, table: str) -> str:
    """The README with the table between its markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README needs the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if the README differs")
    parser.add_argument("--measure", nargs="*", metavar="NAME", help="measure first: all models, or those named")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each model (default: 5)")
    args = parser.parse_args(argv)
    timings = json.loads(TIMINGS.read_text(encoding="utf-8"))
    if args.measure is not None:
        names = args.measure or [name for name in architectures() if _is_for_224(name)]
        torch.set_num_threads(1)
        timings = measure(names, args.repeats, timings)
        TIMINGS.write_text(json.dumps(timings, indent=2) + "\n", encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    wanted = insert(readme, render(timings))
    if args.check:
        print("up to date" if wanted == readme else "the table in README.md differs; run tools/zoo_table.py")
        return int(wanted != readme)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
