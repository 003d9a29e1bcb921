import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from image_folders import image_folder  # noqa: F401
