"""Cards of networks that come without downloadable weights: what is known of them, beside their twins."""

from __future__ import annotations

import re
from dataclasses import dataclass

from huggingface_hub import ModelCardData

__all__ = ["NetworkCfg", "render_network_card"]


@dataclass(frozen=True)
class NetworkCfg:
    """What is known of a network by name; nothing of it was measured here.

    Args:
        paper_name: Title of the paper.
        paper_ids: Its identifier, such as `arXiv:2401.04722`.
        origin_url: The official repository.
        license: Of the official code.
        weights_license: Of the official weights, where it is not that of the code.
        by_hand: Where a person gets the official weights; empty if none were published.
        input_size: One sample in the shape that the paper trained on, channels first.
        results: What the authors report: data and metric → value as they write it, with a `*` behind what was recalled
            from the paper and not re-read.
        results_source: Address that states these.
        caveats: What a user should know before relying on the network.
        twin: Name of the same network without its SSM, or of the one with it; empty if there is none.
        instead: What the one without its SSM has in its place.
    """

    paper_name: str
    paper_ids: str
    origin_url: str
    license: str
    weights_license: str = ""
    by_hand: str = ""
    input_size: tuple[int, ...] = ()
    results: tuple[tuple[str, str], ...] = ()
    results_source: str = ""
    caveats: tuple[str, ...] = ()
    twin: str = ""
    instead: str = "gated convolutions of as many parameters in the place of every SSM"


def render_network_card(name: str, cfg: NetworkCfg, parameters: int, twin_parameters: int = 0) -> str:
    """Render the card of one network, and of its twin, as Markdown with YAML front matter.

    Args:
        name: The network's name.
        cfg: What is known of it.
        parameters: Number of its parameters, measured on the built network.
        twin_parameters: The same of its twin, if it has one.
    """
    sections = [
        f"# {name}",
        _facts(cfg, parameters, twin_parameters),
        _usage(name, cfg),
        "\n".join(["## Caveats", "", *(f"- {caveat}" for caveat in _caveats(cfg))]),
    ]
    return f"---\n{_front_matter(name, cfg).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(name: str, cfg: NetworkCfg) -> ModelCardData:
    licence = cfg.weights_license or cfg.license
    known = re.fullmatch(r"[a-z0-9.-]+", licence.lower())
    return ModelCardData(
        license=licence.lower() if known else "other",
        license_name=None if known else licence,
        library_name="ssmvision",
        tags=["state-space-model"],
        model_name=name,
    )


def _facts(cfg: NetworkCfg, parameters: int, twin_parameters: int) -> str:
    twin = cfg.twin and f"`{cfg.twin}`: {cfg.instead}, {twin_parameters / 1e6:.2f} M parameters (measured likewise)"
    rows = {
        "Parameters": f"{parameters / 1e6:.2f} M (measured on the built network)",
        "Twin without the SSM": twin,
        "Input in the paper": " × ".join(map(str, cfg.input_size)),
        **{data: _published(value) for data, value in cfg.results},
        "Who measured": cfg.results and f"the authors: <{cfg.results_source or cfg.origin_url}>",
        "Weights": f"<{cfg.by_hand}>, to be downloaded by hand" if cfg.by_hand else "none published",
        "Licence of the code": cfg.license,
        "Licence of the weights": cfg.by_hand and (cfg.weights_license or cfg.license),
        "Origin": f"<{cfg.origin_url}>",
        "Paper": f"{cfg.paper_name} <https://arxiv.org/abs/{cfg.paper_ids.removeprefix('arXiv:')}>",
    }
    return "\n".join(["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items() if value)])


def _published(value: str) -> str:
    recalled = "; recalled from the paper, not re-read" if "*" in value else ""
    return f"{value.replace('*', '')} (published{recalled})"


def _usage(name: str, cfg: NetworkCfg) -> str:
    twin = f'\ntwin = ssmvision.create_model("{cfg.twin}")  # without the SSM' if cfg.twin else ""
    return f"""## How to load

```python
import ssmvision

model = ssmvision.create_model("{name}"){twin}
model = ssmvision.create_model("{name}", checkpoint_path="FILE")  # an official file, every key accounted for
```"""


def _caveats(cfg: NetworkCfg) -> tuple[str, ...]:
    first = ("The figures above are what the authors report; none was measured with this package.",)
    twin = (
        "Whether the SSM helps is for your data to say: train the twin with the same seed and budget, and compare case "
        "by case. The best-controlled public benchmark finds that such layers often bring nothing.",
    )
    return (first if cfg.results else ()) + (twin if cfg.twin else ()) + cfg.caveats
