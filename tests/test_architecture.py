"""The rules of ARCHITECTURE.md, enforced on the source."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("ssmvision/**/*.py"), *ROOT.glob("tools/**/*.py")])

# Room -> rooms of ours that it may import; the table of ARCHITECTURE.md.
MAY_IMPORT = {
    "ops": {"ops"},
    "layers": {"layers", "ops"},
    "hub": {"hub"},
    "data": {"data"},
    "models": {"models", "layers", "ops", "hub"},
    "segmentation": {"segmentation", "models", "layers", "ops", "hub"},
    "registry": {"segmentation", "models", "hub"},
    "engine": {"engine", "registry", "segmentation", "models", "layers", "ops", "data", "hub"},
    "__init__": {"registry", "_version"},
    "_version": set(),
    "tools": {"tools", "registry", "models", "layers", "ops", "hub", "data", "engine", "_version"},
}


def room(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "tools" if parts[0] == "tools" else parts[1]


def imported_rooms(path):
    """Rooms of ours that a file imports, wherever in the file."""
    package = list(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {room_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(base + (node.module or "").split(".")).rstrip(".")
            # `from ssmvision import x` names the room, or one of the package's three functions, only in x.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "ssmvision" else [module]
            found |= {room_of(name) for name in names}
    return found - {None}


def room_of(name):
    parts = name.split(".")
    if parts[0] in ("tools", "ssmvision_tools"):
        return "tools"
    if parts[0] != "ssmvision":
        return None
    known = len(parts) > 1 and parts[1] in MAY_IMPORT
    if not known:
        return "_version" if parts[1:] == ["__version__"] else "registry"
    return parts[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert not imported_rooms(path) - MAY_IMPORT[room(path)]


def test_relative_and_late_imports_are_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "ssmvision" / "ops" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("from ..models import vim\ndef f():\n    import ssmvision.engine.loop\nfrom ssmvision import hub\n")
    assert imported_rooms(path) == {"models", "engine", "hub"}


def test_ops_import_no_framework_but_torch():
    frameworks = re.compile(r"^\s*(?:import|from) (timm|monai|einops|huggingface_hub|torchvision)\b", re.MULTILINE)
    assert not [path for path in SOURCES if room(path) == "ops" and frameworks.search(path.read_text())]


# Measured in one process: what our import adds to a process that already has torch and timm.
def test_every_package_is_installed():
    listed = re.search(r"\npackages = \[(.*?)\n\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.DOTALL)[1]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("ssmvision/**/__init__.py")}
    assert set(re.findall(r'"([\w.]+)"', listed)) == folders | {"ssmvision_tools"}


IMPORT_SCRIPT = """
import json, sys
import torch, timm
before = set(sys.modules)
import ssmvision
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_import_is_light():
    done = subprocess.run([sys.executable, "-c", IMPORT_SCRIPT], check=True, capture_output=True, text=True)
    modules = json.loads(done.stdout)
    heavy = {"triton", "monai", "matplotlib", "albumentations", "nibabel", "torchvision", "tensorboard", "setuptools"}
    assert "ssmvision.registry" in modules
    assert not {name.partition(".")[0] for name in modules} & heavy
    assert not [name for name in modules if name.startswith(("ssmvision.engine", "ssmvision.data"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_of_readable_length(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 800


def test_no_path_of_one_machine():
    # Spelled in two halves, so that this file does not find itself.
    paths = re.compile("/" + r"(work|tmp/w|home/\w+|root|Users/\w+)/")
    texts = [
        p for pattern in ("*.py", "*.md", "*.toml", "*.yaml", "*.yml", "*.cpp", "*.h") for p in ROOT.rglob(pattern)
    ]
    visible = [p for p in texts if not any(part.startswith(".") for part in p.relative_to(ROOT).parts[:-1])]
    assert not [str(p) for p in visible if paths.search(p.read_text(encoding="utf-8", errors="replace"))]
