"""What docs/ say runs: every example, every link, every picture."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FAMILIES = [page for page in PAGES if page.parent.name == "layers" and page.name != "README.md"]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [p for p in PAGES if EXAMPLE.search(p.read_text(encoding="utf-8"))], ids=name)
def test_examples_run(page):
    """All of a page in one namespace, from top to bottom."""
    torch.manual_seed(0)
    namespace = {}
    for example in EXAMPLE.findall(page.read_text(encoding="utf-8")):
        exec(compile(example, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"], ids=name
)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{name(page)} links to {link}"


@pytest.mark.parametrize("page", FAMILIES, ids=name)
def test_each_family_has_an_example_a_picture_and_its_sections(page):
    text = page.read_text(encoding="utf-8")
    assert EXAMPLE.search(text)
    assert text.count(f"]({page.stem}.svg)") == 1
    if page.stem != "hippo":  # which makes matrices, no layers
        for told in (r"^## .*nitialization", r"^## .*raining", r"^## .*treaming", "use it when", "`step`|`.*step`"):
            assert re.search(told, text, re.MULTILINE), told


def test_pages_name_only_layers_that_exist():
    from ssmvision import layers

    first_cell = re.compile(r"^\| `(\w+)", re.MULTILINE)
    for page in FAMILIES:
        if page.stem != "hippo":
            names = {n for n in first_cell.findall(page.read_text(encoding="utf-8")) if n[0].isupper()}
            assert names
            known = {*layers.__all__, "CausalTransformer"}
            assert names <= known, f"{name(page)}: {sorted(names - known)}"


@pytest.mark.parametrize("picture", sorted(p for p in DOCS.rglob("*.svg") if p.name != "routes.svg"), ids=name)
def test_pictures_are_small_and_shown(picture):
    assert picture.stat().st_size < 120_000
    assert any(f"]({picture.name})" in page.read_text(encoding="utf-8") for page in picture.parent.glob("*.md"))
