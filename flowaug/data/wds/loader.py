"""Batches of a stream of shards, divided over processes and their workers, and resumable within an epoch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from flowaug.data.loaders import check_batch_size, seeded


class StreamLoader:
    """A data loader of a stream of shards, resumable within an epoch.

    In training, every process gets ``len(loader)`` full batches per epoch, whatever the number of samples in its
    shards. In evaluation, each sample is read exactly once over all processes, so their numbers of batches may differ.

    The order depends on (seed, epoch, process_index, worker), so also on the number of workers. The random transform
    of an image depends on (seed, epoch, process_index, batch number, position in the batch).

    Args:
        data: the ``StreamDataset``.
        transform: applied to each PIL image.
        batch_size: images per batch and process.
        training: random order and full batches; otherwise each sample once, in order.
        seed: seed of the order and the transforms.
        workers: number of worker processes; 0 loads in this process.
        process_index: index of this process.
        num_processes: number of processes.
        repeats: visits to each sample per training epoch.

    Raises:
        ValueError: there is no batch.
    """

    def __init__(
        self,
        data,
        transform: Callable,
        batch_size: int,
        training: bool,
        seed: int,
        workers: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        repeats: int = 1,
    ):
        check_batch_size(batch_size, len(data) * repeats // num_processes, training)
        self.data = data
        self.transform = transform
        self.batch_size = batch_size
        self.training = training
        self.seed = seed
        self.workers = workers
        self.process_index = process_index
        self.num_processes = num_processes
        self.repeats = repeats
        self.set_epoch(0)

    @property
    def sampler(self) -> StreamLoader:
        """The object with ``set_epoch``, as in a ``DataLoader`` of ``create_loader``."""
        return self

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Set the epoch of the next pass, and the number of images to skip at its beginning.

        Skipped images are read, but not transformed.
        """
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        if not self.training:
            raise TypeError(
                "the number of batches of an evaluation stream is unknown before its shards are read; iterate to the "
                "end instead of calling len()"
            )
        return len(self.data) * self.repeats // self.num_processes // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = StreamBatches(self, self.epoch, self.skip // self.batch_size)
        self.set_epoch(self.epoch + 1)
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=self.workers,
            generator=torch.Generator().manual_seed(self.seed),
            pin_memory=torch.cuda.is_available(),
        )
        for x, y, skipped in loader:
            self.data.note(skipped)
            if len(y):
                yield x, y


class StreamBatches(IterableDataset):
    """The batches of one epoch of a stream.

    Each item is a batch of images, their labels, and the samples that this worker skipped since its previous batch. A
    worker makes every ``num_workers``-th batch.

    Args:
        loader: the loader with the data and the settings.
        epoch: number of the epoch.
        start: number of the first batch.
    """

    def __init__(self, loader: StreamLoader, epoch: int, start: int):
        self.loader = loader
        self.epoch = epoch
        self.start = start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[str, str]]]:
        loader = self.loader
        info = get_worker_info()
        num_workers = info.num_workers if info else 1
        worker_id = info.id if info else 0
        # The DataLoader takes batches from the workers in turn, starting with worker 0, which therefore makes batch
        # number ``start``.
        worker_index = (worker_id + self.start) % num_workers

        skipped: dict[str, str] = {}
        samples = self._samples(worker_index, num_workers, skipped)
        numbers = (
            range(worker_index, len(loader), num_workers)
            if loader.training
            else itertools.count(worker_index, num_workers)
        )
        for number in numbers:
            batch = list(itertools.islice(samples, loader.batch_size))
            if number >= self.start:
                yield *self._collate(batch, number), dict(skipped)
                skipped.clear()
            if len(batch) < loader.batch_size:
                return

    def _samples(
        self, worker_index: int, num_workers: int, skipped: dict[str, str]
    ) -> Iterator[tuple[Image.Image, int]]:
        """Return the images and labels of one worker of this process."""
        loader = self.loader
        if loader.training:
            return loader.data.endless(
                loader.process_index + loader.num_processes * worker_index,
                loader.num_processes * num_workers,
                loader.repeats,
                f"{loader.seed}/{self.epoch}",
                skipped,
            )
        process_shards = loader.data.shards.paths[loader.process_index :: loader.num_processes]
        return loader.data.decoded(process_shards[worker_index::num_workers], skipped)

    def _collate(self, batch: list[tuple[Image.Image, int]], number: int) -> tuple[Tensor, Tensor]:
        if not batch:
            return torch.empty(0), torch.empty(0, dtype=torch.int64)
        images = [self._transform(image, number, position) for position, (image, _) in enumerate(batch)]
        return default_collate(images), torch.tensor([label for _, label in batch])

    def _transform(self, image: Image.Image, number: int, position: int):
        with seeded(self.loader.seed, self.epoch, self.loader.process_index, number, position):
            return self.loader.transform(image)
