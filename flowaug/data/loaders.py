"""Batches of tensors in memory, and data loaders whose order and random transforms depend on (seed, epoch) only."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from flowaug.data.images import ImageDataset, StreamSource


def batches(
    images: torch.Tensor,
    targets: torch.Tensor | np.ndarray,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    drop_last: bool = False,
    process_index: int = 0,
    num_processes: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return an iterator over batches of one epoch from tensors in memory.

    The order depends on ``seed`` and ``epoch`` only. With ``shuffle`` or ``drop_last``, every process gets the same
    number of images, and up to ``num_processes - 1`` images are left out. Otherwise each image goes to exactly one
    process.

    Args:
        images: uint8 (N, C, H, W).
        targets: labels (N,).
        batch_size: images per batch and process.
        shuffle: visit the images in random order.
        seed: seed of the order.
        epoch: number of the epoch; each epoch has another order.
        drop_last: leave out the last batch if it is not full.
        process_index: index of this process.
        num_processes: number of processes.

    Returns:
        An iterator over pairs of images (B, C, H, W), float32 in [0, 1], and labels (B,), int64.

    Raises:
        ValueError: ``images`` is not uint8, ``images`` and ``targets`` differ in length, or there is no batch.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; expected torch.uint8, as stack_images() returns them")
    if len(images) != len(targets):
        raise ValueError(f"{len(images)} images but {len(targets)} targets; expected one label per image")

    order = _process_indices(len(images), shuffle, seed, epoch, shuffle or drop_last, process_index, num_processes)
    check_batch_size(batch_size, len(order), drop_last)
    labels = torch.as_tensor(targets, dtype=torch.int64)
    chunks = [c for c in order.split(batch_size) if len(c) == batch_size or not drop_last]
    return ((images[c.to(images.device)].float() / 255, labels[c.to(labels.device)]) for c in chunks)


def endless_table(
    images: torch.Tensor,
    targets: torch.Tensor | np.ndarray,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return an endless iterator over full, shuffled batches of tensors in memory, epoch after epoch.

    A process with fewer than ``batch_size`` images gets all of them in each batch.

    Args:
        images: uint8 (N, C, H, W).
        targets: labels (N,).
        batch_size: images per batch and process.
        seed: seed of the order.
        start: number of batches to skip, to resume a training run.
        process_index: index of this process.
        num_processes: number of processes.

    Returns:
        An iterator over pairs of images (B, C, H, W), float32 in [0, 1], and labels (B,), int64.
    """
    images_per_process = len(images) // num_processes
    size = min(batch_size, images_per_process)
    first_epoch, skip = divmod(start, images_per_process // size)

    epochs = (
        batches(images, targets, size, True, seed, epoch, True, process_index, num_processes)
        for epoch in itertools.count(first_epoch)
    )
    return itertools.islice(itertools.chain.from_iterable(epochs), skip, None)


def create_loader(
    dataset: ImageDataset | StreamSource,
    transform: Callable,
    batch_size: int,
    shuffle: bool,
    seed: int,
    workers: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    drop_last: bool = False,
    repeats: int = 1,
) -> DataLoader:
    """Create a data loader that yields batches of ``(transform(image), label)``.

    The order depends on ``(seed, epoch)`` and the random transform of an image on ``(seed, epoch, image)``, for any
    number of workers. Each pass is the next epoch; ``loader.sampler.set_epoch(epoch, skip)`` resumes within an epoch.
    Images are divided over processes as in ``batches``. Neither ``dataset`` nor the caller's global random generators
    are changed. For a stream of webdataset shards, the result is a ``flowaug.data.wds.loader.StreamLoader``.

    Args:
        dataset: the images; an ``ImageDataset`` or a ``StreamDataset``.
        transform: callable from a PIL image to a tensor.
        batch_size: images per batch and process.
        shuffle: visit the images in random order.
        seed: seed of the order and the transforms.
        workers: number of worker processes; 0 loads in this process.
        process_index: index of this process.
        num_processes: number of processes.
        drop_last: leave out the last batch if it is not full.
        repeats: visits to each image per epoch.

    Raises:
        ValueError: ``transform`` is not callable, or there is no batch.
    """
    if not callable(transform):
        raise ValueError(f"transform is {transform!r}; expected a callable from a PIL image to a tensor")
    if isinstance(dataset, StreamSource):
        return dataset.stream_loader(
            transform, batch_size, shuffle, seed, workers, process_index, num_processes, repeats
        )

    view = copy.copy(dataset)
    view.transform = transform
    visits = SeededVisits(view, seed, repeats)
    sampler = EpochSampler(len(visits), shuffle, seed, shuffle or drop_last, process_index, num_processes)
    check_batch_size(batch_size, len(sampler), drop_last)
    return DataLoader(
        visits,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(seed),
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
    )


def endless_batches(loader: DataLoader, start: int) -> Iterator:
    """Yield batches without end, epoch after epoch.

    Args:
        loader: a loader of ``create_loader``.
        start: number of batches to skip, to resume a training run; their images are not transformed.
    """
    epoch, skip = divmod(start, len(loader))
    sampler, batch_size = cast(EpochSampler, loader.sampler), cast(int, loader.batch_size)
    sampler.set_epoch(epoch, skip=skip * batch_size)
    yield from itertools.islice(loader, len(loader) - skip)
    while True:
        yield from loader


class SeededVisits(Dataset):
    """A data set in which each image occurs ``repeats`` times per epoch, each time with its own random seed.

    The keys are the pairs (epoch, index) of an ``EpochSampler``. A random transform depends on (seed, epoch, index)
    only.

    Args:
        dataset: the images.
        seed: seed of the random transforms.
        repeats: number of visits to each image per epoch.
    """

    def __init__(self, dataset: ImageDataset, seed: int, repeats: int = 1):
        self.dataset = dataset
        self.seed = seed
        self.repeats = repeats

    def __len__(self) -> int:
        """Return the number of visits per epoch."""
        return self.repeats * len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        """Return the image and label of ``key = (epoch, index)``."""
        epoch, index = key
        repeat, image = divmod(index, len(self.dataset))
        with seeded(self.seed, epoch, index):
            return self.dataset.visit(image, epoch * self.repeats + repeat)


def seed_everything(*numbers: int) -> None:
    """Seed the global CPU generators of PyTorch, Python and NumPy from several numbers.

    Transforms and layers of other libraries draw from these generators.
    """
    seed = mix_seed(*numbers)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Call ``seed_everything`` for the length of a ``with`` block, and restore the generators' states afterwards."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    seed_everything(*numbers)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


class EpochSampler(Sampler):
    """A sampler of the keys (epoch, index) of one process, in an order that depends on (seed, epoch).

    Each pass is the next epoch.

    Args:
        count: number of indices over all processes.
        shuffle: random order.
        seed: seed of the order.
        even: leave out the last indices so that every process gets the same number.
        process_index: index of this process.
        num_processes: number of processes.
    """

    def __init__(self, count, shuffle, seed, even, process_index, num_processes):
        # The arguments of _process_indices before and after the epoch.
        self.share = (count, shuffle, seed), (even, process_index, num_processes)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch of the next pass, and the number of images to skip at its beginning."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        (count, shuffle, seed), processes = self.share
        order = _process_indices(count, shuffle, seed, self.epoch, *processes)
        keys = [(self.epoch, index) for index in order[self.skip :].tolist()]
        self.set_epoch(self.epoch + 1)
        return iter(keys)

    def __len__(self) -> int:
        (count, _, _), processes = self.share
        return len(_process_indices(count, False, 0, 0, *processes))


def _process_indices(
    count: int, shuffle: bool, seed: int, epoch: int, even: bool, process_index: int, num_processes: int
) -> torch.Tensor:
    """Return the indices of one process in an epoch: every ``num_processes``-th one of an order common to all."""
    if not 0 <= process_index < num_processes:
        raise ValueError(
            f"process_index is {process_index} and num_processes is {num_processes}; expected 0 <= process_index < "
            "num_processes"
        )
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    used = count // num_processes * num_processes if even else count
    return order[:used][process_index::num_processes]


def check_batch_size(batch_size: int, share: int, drop_last: bool) -> None:
    """Check that a process gets at least one batch.

    Args:
        batch_size: images per batch and process.
        share: number of images of this process.
        drop_last: leave out the last batch if it is not full.

    Raises:
        ValueError: the batch size is less than 1, or there is no full batch with ``drop_last``.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    if drop_last and share < batch_size:
        raise ValueError(
            f"batch_size is {batch_size} with drop_last=True, but this process has only {share} images and gets no "
            f"batch; set batch_size to at most {share} or drop_last=False"
        )


def mix_seed(*numbers: int) -> int:
    """Return a 63-bit seed that depends on all numbers and their order, so (0, 1) and (1, 0) differ."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1  # NumPy 1 cannot shift a uint64
