"""Which image is read when, and with which randomness: all of it follows from (seed, epoch, index).

Nothing here keeps a random state that a checkpoint would have to save. A position in the data is two integers (epoch,
batch), and the augmentation of a sample is the same whichever process reads it, so 0 workers, 4 workers and a resumed
run give identical batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from .errors import DataError

SampleKey = tuple[int, int]  # epoch, index


@contextmanager
def sample_rng(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's generators for one sample, and puts them back afterwards."""
    words = np.random.SeedSequence((seed, epoch, index))
    python_seed, torch_seed = words.generate_state(2).tolist()
    current, swap = np.random.get_bit_generator, np.random.set_bit_generator  # type: ignore[attr-defined]
    saved = random.getstate(), current(), torch.get_rng_state()
    random.seed(python_seed)
    swap(np.random.PCG64(words))  # a twentieth of the time that saving and loading the state takes
    # The default CPU generator only: torch.manual_seed would also touch the accelerator's, which belongs to the model.
    torch.default_generator.manual_seed(torch_seed)
    try:
        yield
    finally:
        random.setstate(saved[0])
        swap(saved[1])
        torch.set_rng_state(saved[2])


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Converts to 8 bit in `mode`; 16-bit greyscale is scaled, where Pillow alone would clip it to white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert(mode)


class SeededDataset(Dataset):
    """An indexable data set of (PIL image, class), read by (epoch, index) with randomness derived from that key."""

    def __init__(self, dataset: Dataset, transform: Callable[[Any], torch.Tensor], image_mode: str, seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.image_mode = image_mode
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: SampleKey) -> tuple[torch.Tensor, int]:
        epoch, index = key
        try:
            image, target = self.dataset[index]
            image = to_mode(image, self.image_mode)  # Pillow decodes here, not when it opens the file
        except (OSError, RuntimeError) as error:
            name = self.dataset.filename(index) if hasattr(self.dataset, "filename") else f"number {index}"
            raise DataError(f"Image {name} was readable before training and is not any more.") from error
        with sample_rng(self.seed, epoch, index):
            return self.transform(image), int(target)


class PositionedBatchSampler(Sampler[list[SampleKey]]):
    """Batches of one rank, from any position on.

    The global batch is cut from the order of the epoch first and shared between ranks afterwards, so one process with
    batch 64 and two with batch 32 see the same 64 images at every step.

    Args:
        length: Number of samples in the data set.
        batch_size: Samples in a batch of one rank.
        shuffle: Permute anew in every epoch, and drop the last incomplete global batch. Without it every sample comes
            exactly once: ranks may then get a batch more or less, never a duplicate.
        seed: Decides the permutations, together with the epoch.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self, length: int, batch_size: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.length, self.batch_size, self.shuffle, self.seed = length, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.start = 0

    def set_position(self, epoch: int, batch: int = 0) -> None:
        """The next iteration yields the batches of `epoch` from number `batch` on."""
        self.epoch, self.start = epoch, batch

    def __len__(self) -> int:
        global_batch = self.batch_size * self.world_size
        return self.length // global_batch if self.shuffle else -(-self.length // global_batch)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, global_batch = self.epoch, self.batch_size * self.world_size
        order: range | np.ndarray = range(self.length)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        for batch in range(self.start, len(self)):
            indices = order[batch * global_batch : (batch + 1) * global_batch][self.rank :: self.world_size]
            if len(indices):
                yield [(epoch, int(index)) for index in indices]
