"""Batches of x in [0, 1] from memory, and the classifiers' loader: order and seeds by (seed, epoch)."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from flowaug.data.images import ImageDataset


def batches(
    images: torch.Tensor,
    targets: torch.Tensor | np.ndarray,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``x (B, C, H, W)`` float32 in [0, 1] and ``y (B,)`` int64 from tensors in memory.

    The order depends on ``(seed, epoch)`` alone. With ``shuffle`` or ``drop_last`` every rank gets
    equally many images (fewer than ``world_size`` are left out); otherwise each image goes to one rank.

    Args:
        images: uint8 ``(N, C, H, W)``.
        targets: ``(N,)`` labels.
        batch_size: images per batch and rank.
        shuffle: visit the images in random order.
        seed: seed of the order.
        epoch: a new epoch is a new order.
        drop_last: leave out the last batch if it is not full.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: lengths that differ, pixels that are not uint8, or no batch at all.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; expected torch.uint8, as stack_images() returns them")
    if len(images) != len(targets):
        raise ValueError(f"{len(images)} images but {len(targets)} targets; batches needs one label per image")
    order = _share(len(images), shuffle, seed, epoch, shuffle or drop_last, rank, world_size)
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
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless full, shuffled `batches`, epoch by epoch, from step ``start`` on; all images where there are fewer."""
    share = len(images) // world_size
    size = min(batch_size, share)
    epoch, done = divmod(start, share // size)
    epochs = (
        batches(images, targets, size, True, seed, number, True, rank, world_size) for number in itertools.count(epoch)
    )
    return itertools.islice(itertools.chain.from_iterable(epochs), done, None)


def create_loader(
    dataset: ImageDataset,
    transform: Callable,
    batch_size: int,
    shuffle: bool,
    seed: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    copies: int = 1,
) -> DataLoader:
    """A loader of ``(transform(image), label)`` batches for a classifier; ``dataset`` stays as it is.

    The order depends on ``(seed, epoch)`` and the random transforms of an image on ``(seed, epoch, image)``, whatever
    the number of workers. The epoch advances with each pass, and ``loader.sampler.set_epoch(e, skip)`` resumes within
    epoch e. Ranks share the images as in :func:`batches`. The caller's global generators stay as they are. A stream of
    shards makes its own loader, `flowaug.streams.StreamLoader`.

    Raises:
        ValueError: no transform, or no batch at all.
    """
    if not callable(transform):
        raise ValueError(f"transform is {transform!r}; expected a callable from a PIL image to a tensor")
    if hasattr(dataset, "stream_loader"):
        return dataset.stream_loader(transform, batch_size, shuffle, seed, workers, rank, world_size, copies)
    view = copy.copy(dataset)
    view.transform = transform
    visits = SeededVisits(view, seed, copies)
    sampler = EpochSampler(len(visits), shuffle, seed, shuffle or drop_last, rank, world_size)
    check_batch_size(batch_size, len(sampler), drop_last)
    return DataLoader(
        visits,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        generator=torch.Generator().manual_seed(seed),
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
    )


def endless_batches(loader: DataLoader, start: int) -> Iterator:
    """Endless batches, epoch by epoch, from step ``start`` on; those before are skipped unread."""
    epoch, done = divmod(start, len(loader))
    loader.sampler.set_epoch(epoch, skip=done * loader.batch_size)
    yield from itertools.islice(loader, len(loader) - done)
    while True:
        yield from loader


class SeededVisits(Dataset):
    """Visits to the images of a data set, ``copies`` to each per epoch; the keys (epoch, index) are of `EpochSampler`.

    The random transforms depend on (seed, epoch, index) alone.
    """

    def __init__(self, dataset: ImageDataset, seed: int, copies: int = 1):
        self.dataset, self.seed, self.copies = dataset, seed, copies

    def __len__(self) -> int:
        """Visits of an epoch."""
        return self.copies * len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple:
        """The image and label of ``key = (epoch, index)``."""
        epoch, (copy, image) = key[0], divmod(key[1], len(self.dataset))
        with seeded(self.seed, *key):
            return self.dataset.visit(image, epoch * self.copies + copy)


def seed_everything(*numbers: int) -> None:
    """Seed the global CPU generators, which transforms and layers of other libraries draw from, by several numbers."""
    seed = mix_seed(*numbers)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """``seed_everything`` for the length of a block; the generators then go on as if nothing had been."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    seed_everything(*numbers)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


class EpochSampler(Sampler):
    """This rank's share of the images as keys (epoch, index), in the order of ``(seed, epoch)``; a pass is an epoch."""

    def __init__(self, count, shuffle, seed, even, rank, world_size):
        self.share = (count, shuffle, seed), (even, rank, world_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Make the next pass that of ``epoch``, without its first ``skip`` images."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order, epoch = _share(*self.share[0], self.epoch, *self.share[1])[self.skip :], self.epoch
        self.set_epoch(epoch + 1)
        return iter([(epoch, index) for index in order.tolist()])

    def __len__(self) -> int:
        return len(_share(self.share[0][0], False, 0, 0, *self.share[1]))


def _share(count, shuffle, seed, epoch, even, rank, world_size) -> torch.Tensor:
    """The indices that ``rank`` visits in ``epoch``: a strided share of an order that all ranks agree on."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank} and world_size {world_size}; expected 0 <= rank < world_size")
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    order = torch.randperm(count, generator=generator) if shuffle else torch.arange(count)
    return order[: count // world_size * world_size if even else count][rank::world_size]


def check_batch_size(batch_size: int, share: int, drop_last: bool) -> None:
    """Raise a ValueError unless a process with ``share`` images gets a batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    if drop_last and share < batch_size:
        raise ValueError(
            f"batch_size {batch_size} with drop_last=True leaves no batch of the {share} images of this "
            f"process; set batch_size to at most {share} or drop_last=False"
        )


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers; unlike a sum, (0, 1) and (1, 0) give different ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
