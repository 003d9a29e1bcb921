import shutil
from pathlib import Path

import pytest
from image_folders import HOSTILE, make_split
from PIL import Image

from ssmvision.data import DataError, check_class_folders, find_bad_images, open_image_folder, open_train_val

REASONS = {
    "bad_crc.png": "broken data stream",
    "bomb.png": "decompression bomb",
    "empty.png": "empty file",
    "text_as_image.jpg": "not an image",
    "truncated.jpg": "truncated",
}


def test_every_broken_file_is_found_with_its_reason():
    bad = find_bad_images(sorted(str(path) for path in HOSTILE.iterdir()))
    assert [Path(path).name for path, _ in bad] == sorted(REASONS)
    for path, reason in bad:
        assert REASONS[Path(path).name] in reason


def test_good_files_of_every_mode_pass(tmp_path):
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (9, 7)).save(tmp_path / f"{mode.replace(';', '')}.{suffix}")
    assert find_bad_images([str(path) for path in tmp_path.iterdir()]) == []


@pytest.mark.parametrize("name", sorted(REASONS))
def test_one_broken_file_stops_or_is_skipped(image_folder, name):
    broken = image_folder / "train" / "red" / f"broken_{name}"
    shutil.copy(HOSTILE / name, broken)
    with pytest.raises(DataError) as error:
        open_train_val(image_folder)
    assert str(broken) in str(error.value)
    assert REASONS[name] in str(error.value)
    train, _ = open_train_val(image_folder, on_bad_sample="skip")
    assert len(train) == 36
    assert [path for path, _ in train.bad] == [str(broken)]


def test_one_percent_of_a_thousand_is_listed_completely(tmp_path):
    make_split(tmp_path / "train", 10)
    for number in range(10):
        shutil.copy(HOSTILE / "empty.png", tmp_path / "train" / "red" / f"bad{number}.png")
    with pytest.raises(DataError, match="10 of 40 images cannot be read") as error:
        open_image_folder(tmp_path / "train")
    assert all(f"bad{number}.png: empty file" in str(error.value) for number in range(10))


def _remove_images(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _only_one_class(root: Path) -> None:
    for name in ("blue", "green"):
        shutil.rmtree(root / "train" / name)
        shutil.rmtree(root / "val" / name)


FAULTS = {
    "empty class": (lambda root: _remove_images(root / "train" / "red"), "class folder .*red holds no images"),
    "empty val class": (lambda root: _remove_images(root / "val" / "red"), "class folder .*red holds no images"),
    "unknown val class": (lambda root: (root / "val" / "red").rename(root / "val" / "pink"), "class 'pink', which"),
    "no val": (lambda root: shutil.rmtree(root / "val"), "no folder val or validation"),
    "no train": (lambda root: shutil.rmtree(root / "train"), "no folder train or training"),
    "no root": (shutil.rmtree, "does not exist"),
    "no classes": (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], "holds no images"),
    "loose image": (lambda root: shutil.copy(root / "train/red/1.png", root / "train/1.png"), "beside its class fold"),
    "one class": (_only_one_class, "only one class, 'red'"),
    "all broken": (
        lambda root: [path.write_bytes(b"") for path in (root / "train" / "red").iterdir()],
        "class 'red' has no readable image",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_folder_end_in_one_clear_sentence(image_folder, fault):
    damage, expected = FAULTS[fault]
    damage(image_folder)
    with pytest.raises(DataError, match=expected) as error:
        open_train_val(image_folder, on_bad_sample="skip")
    assert "\n" not in str(error.value)


def test_hidden_folders_are_no_classes(image_folder):
    hidden = image_folder / "train" / ".cache"
    hidden.mkdir()
    check_class_folders(image_folder / "train")
    shutil.copy(image_folder / "train/red/1.png", hidden / "1.png")
    with pytest.raises(DataError, match="hidden folder"):
        check_class_folders(image_folder / "train")


def test_val_classes_are_numbered_as_in_training(image_folder):
    shutil.rmtree(image_folder / "val" / "blue")
    train, val = open_train_val(image_folder)
    assert train.class_names == val.class_names == ["blue", "green", "red"]
    assert {target for _, target in val.dataset.reader.samples} == {1, 2}


@pytest.mark.parametrize("name", ["validation", "valid"])
def test_other_names_of_the_validation_folder(image_folder, name):
    (image_folder / "val").rename(image_folder / name)
    assert len(open_train_val(image_folder)[1]) == 12


def test_streams_and_unknown_data_sets_are_refused(tmp_path):
    with pytest.raises(DataError, match="torch/nothing"):
        open_train_val(tmp_path, "torch/nothing")
    with pytest.raises(DataError, match="torch/cifar10"):
        open_train_val(tmp_path, "torch/cifar10")
