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
def volume(tmp_path):
    """A bright ball off the centre of 20 x 24 x 28 voxels."""
    nibabel = pytest.importorskip("nibabel")
    x, y, z = torch.meshgrid(*(torch.arange(float(side)) for side in (20, 24, 28)), indexing="ij")
    ball = 100.0 * (((x - 8) ** 2 + (y - 12) ** 2 + (z - 14) ** 2) < 36)
    nibabel.save(nibabel.Nifti1Image(ball.numpy(), torch.eye(4).numpy()), tmp_path / "ball.nii.gz")
    return tmp_path / "ball.nii.gz"


@pytest.fixture
def frames(photo, tmp_path):
    """Five images, in one folder."""
    (tmp_path / "frames").mkdir()
    for i in range(5):
        Image.open(photo).rotate(10 * i).save(tmp_path / "frames" / f"{i}.png")
    return tmp_path / "frames"


@pytest.fixture
def complaint(photo, tmp_path, capsys):
    """Runs a tool on `{photo}`, or on `{text}` or `{volume}`, which are none; what it complains of, by those names."""
    names = {"photo": photo, "text": tmp_path / "text.jpg", "volume": tmp_path / "text.nii.gz"}
    for name in ("text", "volume"):
        names[name].write_text("no image")

    def run(tool, arguments):
        arguments = [argument.format(**names) for argument in arguments]
        assert tool.main([*arguments, "--output", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        for name, path in names.items():
            said = said.replace(str(path), f"{{{name}}}")
        return said

    return run
