"""Write `model_cards/<arch>.<tag>.md` for every registered weight, and a card for every network that has none.

python tools/model_cards.py            write the cards
python tools/model_cards.py --check    exit 1 if a card differs from what would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import timm
from timm.models import model_entrypoint

from ssmvision import create_model, list_models
from ssmvision.hub import Published, render_card, render_network_card
from ssmvision.models._networks import TWIN, is_network, network_cfg

CARDS = Path(__file__).resolve().parents[1] / "model_cards"


def render_all() -> dict[str, str]:
    """The card of every registered weight, and of every network with its twin, by file name."""
    # Also those that must be downloaded by hand, which timm does not count as pretrained.
    published = (name for name in list_models(include_tags=True) if name in published_of_family(name))
    weights = {f"{name}.md": _render(name) for name in sorted({*list_models(pretrained=True), *published})}
    networks = [name for name in list_models(exclude_filters=["test_*", f"*{TWIN}"]) if is_network(name)]
    return weights | {f"{name}.md": _render_network(name) for name in networks}


def _render(name: str) -> str:
    cfg = timm.models.get_arch_pretrained_cfgs(name)[name].to_dict()
    return render_card(name, cfg, _published(name), parameters(name))


def _render_network(name: str) -> str:
    cfg = network_cfg(name)
    return render_network_card(name, cfg, parameters(name), parameters(cfg.twin) if cfg.twin else 0)


def published_of_family(name: str) -> dict[str, Published]:
    """What the family of a model says about its weights; nothing for networks beside timm's registry."""
    return getattr(sys.modules[model_entrypoint(name).__module__], "PUBLISHED", {}) if timm.is_model(name) else {}


def _published(name: str) -> Published:
    published = published_of_family(name).get(name)
    if published is None:
        raise LookupError(f"{model_entrypoint(name).__module__}.PUBLISHED says nothing about {name}.")
    return published


@cache
def parameters(name: str) -> int:
    """Number of parameters of a model, built on the meta device."""
    return sum(parameter.numel() for parameter in create_model(name, device="meta").parameters())


def differences(wanted: dict[str, str], folder: Path) -> list[str]:
    """Names of the cards in a folder that are absent, outdated or of no registered weight."""
    found = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the cards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if any card differs")
    parser.add_argument("--folder", type=Path, default=CARDS, help="where the cards are")
    args = parser.parse_args(argv)
    wanted = render_all()
    changed = differences(wanted, args.folder)
    if args.check:
        print("\n".join(f"{name} differs; run tools/model_cards.py" for name in changed) or "all cards are up to date")
        return 1 if changed else 0
    args.folder.mkdir(exist_ok=True)
    for name in changed:
        if name in wanted:
            (args.folder / name).write_text(wanted[name], encoding="utf-8")
        else:
            (args.folder / name).unlink()
    print(f"{len(wanted)} cards, {len(changed)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
