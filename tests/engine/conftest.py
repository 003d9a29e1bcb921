import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from image_folders import image_folder  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[2]))  # tools/, as in a checkout

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # children are forked, and equality to the bit is tested
    yield
    torch.set_num_threads(threads)
