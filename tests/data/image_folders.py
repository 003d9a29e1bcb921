"""Small image folders that a network can learn: every class has a colour of its own under noise."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HOSTILE = Path(__file__).parent / "hostile"
COLORS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 40, 60)}


def make_split(folder: Path, count: int, seed: int = 0, size: int = 20) -> None:
    rng = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(rng.normal(color, 60, (size, size, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    make_split(root / "train", 12, seed=1)
    make_split(root / "val", 4, seed=2)
    return root
