import random

import numpy as np
import pytest
import torch
from PIL import Image

from ssmvision.data import (
    DataError,
    PositionedBatchSampler,
    create_image_loader,
    find_split,
    open_image_folder,
    open_train_val,
    sample_rng,
    to_mode,
)

CONFIG = {"input_size": (3, 16, 16), "mean": (0.5,), "std": (0.5,), "interpolation": "bilinear", "crop_pct": 1.0}
# All that draws random numbers: from Python (crop), numpy (policy) and torch (flip, jitter, erasing).
AUGMENT = {"color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5, "re_mode": "pixel", "hflip": 0.5}


def batches(source, workers=0, epoch=0, start=0, seed=7, **kwargs):
    loader = create_image_loader(source, CONFIG, 4, AUGMENT, workers=workers, seed=seed, **kwargs)
    loader.batch_sampler.set_position(epoch, start)
    return [(images, targets) for images, targets in loader]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for (images, targets), (other_images, other_targets) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_batches(image_folder, workers):
    train, _ = open_train_val(image_folder)
    assert_same(batches(train), batches(train, workers))


def test_persistent_workers_follow_the_epoch(image_folder):
    train, _ = open_train_val(image_folder)
    loader = create_image_loader(train, CONFIG, 4, AUGMENT, workers=2, seed=7)
    for epoch in range(3):
        loader.batch_sampler.set_position(epoch)
        assert_same(list(loader), batches(train, epoch=epoch))


def test_any_position_continues_the_epoch(image_folder):
    train, _ = open_train_val(image_folder)
    assert_same(batches(train, epoch=3)[5:], batches(train, workers=2, epoch=3, start=5))


def test_epochs_and_seeds_differ(image_folder):
    train, _ = open_train_val(image_folder)
    first = batches(train)[0][0]
    assert not torch.equal(first, batches(train, epoch=1)[0][0])
    assert not torch.equal(first, batches(train, seed=8)[0][0])


def test_reading_leaves_the_random_generators_alone(image_folder):
    train, _ = open_train_val(image_folder)

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    for workers in (0, 2):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        expected = draw()
        random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
        batches(train, workers)
        assert draw() == expected


def test_sample_rng_restores_after_an_error():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with pytest.raises(KeyError), sample_rng(1, 2, 3):
        raise KeyError
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one_process(world_size):
    one = list(PositionedBatchSampler(40, 6, True, seed=5))
    shares = [
        list(PositionedBatchSampler(40, 6 // world_size, True, 5, rank, world_size)) for rank in range(world_size)
    ]
    for number, batch in enumerate(one):
        assert sorted(batch) == sorted(key for share in shares for key in share[number])


@pytest.mark.parametrize(("length", "world_size"), [(10, 3), (1, 2), (7, 1)])
def test_evaluation_reads_every_sample_once(length, world_size):
    keys = [
        key
        for rank in range(world_size)
        for batch in PositionedBatchSampler(length, 2, False, 0, rank, world_size)
        for key in batch
    ]
    assert sorted(index for _, index in keys) == list(range(length))


def test_evaluation_is_in_order_and_complete(image_folder):
    _, val = open_train_val(image_folder)
    targets = torch.cat([targets for _, targets in create_image_loader(val, CONFIG, 5)])
    assert targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert np.array_equal(np.asarray(to_mode(Image.fromarray(ramp), "L")).ravel(), np.arange(256))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_channels(image_folder, channels, mode):
    train, _ = open_train_val(image_folder)
    config = {**CONFIG, "input_size": (channels, 16, 16)}
    images, _ = next(iter(create_image_loader(train, config, 4)))
    assert images.shape == (4, channels, 16, 16)
    with pytest.raises(DataError, match="not 7"):
        create_image_loader(train, {**CONFIG, "input_size": (7, 16, 16)}, 4)


def test_a_file_that_breaks_during_training_is_named(image_folder):
    train, _ = open_train_val(image_folder)
    (image_folder / "train" / "red" / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"red/3\.png"):
        batches(train)


def test_fewer_images_than_one_batch(image_folder):
    train, _ = open_train_val(image_folder)
    with pytest.raises(DataError, match="36 images, fewer than one batch of 40"):
        create_image_loader(train, CONFIG, 20, AUGMENT, world_size=2)


def test_fingerprint_tells_changed_data(image_folder):
    before, same = open_train_val(image_folder)[0].fingerprint, open_train_val(image_folder)[0].fingerprint
    (image_folder / "train" / "red" / "3.png").unlink()
    assert before == same != open_train_val(image_folder)[0].fingerprint


def test_find_split_takes_a_flat_folder_for_validation(image_folder):
    assert find_split(image_folder, "val") == image_folder / "val"
    flat = image_folder / "val"
    assert find_split(flat, "val") == flat
    assert len(open_image_folder(flat)) == 12
