"""Batches of a stream: shared out over processes and their workers, as many on each, resumable within an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from flowaug.data.loaders import check_batch_size, seeded


class StreamLoader:
    """Batches of a stream, with as many steps on every process and resumable within an epoch.

    The order depends on (seed, epoch, rank, worker), so on the number of workers too, and the random transforms of an
    image on (seed, epoch, rank, step, place in the batch). In training, ranks make ``len(loader)`` steps whatever their
    shards hold; in evaluation each sample is seen once over all ranks, and ranks may differ in steps.

    Args:
        data: the stream.
        transform: applied to each PIL image.
        batch_size: images per batch and rank.
        training: random order and whole batches, or each sample once.
        seed: seed of order and transforms.
        workers: loader processes.
        rank: this process.
        world_size: number of processes.
        copies: visits to each sample per training epoch.

    Raises:
        ValueError: no batch at all.
    """

    def __init__(
        self,
        data,
        transform: Callable,
        batch_size: int,
        training: bool,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        copies: int = 1,
    ):
        check_batch_size(batch_size, len(data) * copies // world_size, training)
        self.data, self.transform, self.batch_size, self.training = data, transform, batch_size, training
        self.seed, self.workers, self.rank, self.world_size = seed, workers, rank, world_size
        self.copies = copies
        self.set_epoch(0)

    @property
    def sampler(self) -> StreamLoader:
        """What ``set_epoch`` is called on."""
        return self

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Make the next pass that of ``epoch`` without its first ``skip`` images, which are read, not transformed."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        if not self.training:
            raise TypeError("an evaluation stream ends when its shards do; iterate to the end instead of taking len()")
        return len(self.data) * self.copies // self.world_size // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = StreamBatches(self, self.epoch, self.skip // self.batch_size)
        self.set_epoch(self.epoch + 1)
        options = {"num_workers": self.workers, "generator": torch.Generator().manual_seed(self.seed)}
        loader = DataLoader(batches, batch_size=None, pin_memory=torch.cuda.is_available(), **options)
        for x, y, skipped in loader:
            self.data.note(skipped)
            if len(y):
                yield x, y


class StreamBatches(IterableDataset):
    """One epoch of a stream, from batch ``start`` on: (images, labels, skipped since the batch before) by worker."""

    def __init__(self, loader: StreamLoader, epoch: int, start: int):
        self.loader, self.epoch, self.start = loader, epoch, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[str, str]]]:
        info, loader = get_worker_info(), self.loader
        workers = info.num_workers if info else 1
        worker = ((info.id if info else 0) + self.start) % workers  # batches come from the workers in turn, from 0 on
        skipped: dict[str, str] = {}
        pairs = self._pairs(worker, workers, skipped)
        for number in range(worker, len(loader), workers) if loader.training else itertools.count(worker, workers):
            part = list(itertools.islice(pairs, loader.batch_size))
            if number >= self.start:
                yield *self._collate(part, number), dict(skipped)
                skipped.clear()
            if len(part) < loader.batch_size:
                return

    def _pairs(self, worker: int, workers: int, skipped: dict[str, str]) -> Iterator[tuple[Image.Image, int]]:
        loader = self.loader
        if loader.training:
            lane, lanes = loader.rank + loader.world_size * worker, loader.world_size * workers
            return loader.data.endless(lane, lanes, loader.copies, f"{loader.seed}/{self.epoch}", skipped)
        own = loader.data.shards.paths[loader.rank :: loader.world_size][worker::workers]
        return loader.data.decoded(own, skipped)

    def _collate(self, part: list[tuple[Image.Image, int]], number: int) -> tuple[Tensor, Tensor]:
        if not part:
            return torch.empty(0), torch.empty(0, dtype=torch.int64)
        images = [self._transform(image, number, place) for place, (image, _) in enumerate(part)]
        return default_collate(images), torch.tensor([label for _, label in part])

    def _transform(self, image: Image.Image, number: int, place: int):
        with seeded(self.loader.seed, self.epoch, self.loader.rank, number, place):
            return self.loader.transform(image)
