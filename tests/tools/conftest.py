import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from image_folders import image_folder  # noqa: F401


@pytest.fixture
def photo(tmp_path):
    columns, rows = torch.meshgrid(torch.linspace(0, 255, 80), torch.linspace(0, 255, 96), indexing="xy")
    pixels = torch.stack([columns, rows, (columns * rows / 255)], dim=2).to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def complaint(photo, tmp_path, capsys):
    """Runs a tool on `{photo}`, or on `{text}`, which is no image; returns what it complains of, under those names."""
    (tmp_path / "text.jpg").write_text("no image")
    names = {"photo": photo, "text": tmp_path / "text.jpg"}

    def run(tool, arguments):
        arguments = [argument.format(**names) for argument in arguments]
        assert tool.main([*arguments, "--output", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        for name, path in names.items():
            said = said.replace(str(path), f"{{{name}}}")
        return said

    return run
