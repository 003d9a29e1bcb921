import collections
import io
import tarfile
from pathlib import Path

from PIL import Image

ARCHIVE = Path(__file__).parents[2] / "examples" / "fashion_mnist.tar.gz"


def test_the_example_archive_is_what_its_readme_says():
    rows, counts = collections.Counter(), collections.Counter()
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            root, split, name, file = member.name.split("/")
            assert root == "fashion_mnist"
            assert member.isfile()
            rows[file] += 1
            counts[split, name] += 1
            if counts[split, name] == 1:
                image = Image.open(io.BytesIO(archive.extractfile(member).read()))
                assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
    assert set(rows.values()) == {1}, "a row is in both splits"
    assert {split: number for (split, _), number in counts.items()} == {"train": 800, "val": 150}
    assert len(counts) == 20
