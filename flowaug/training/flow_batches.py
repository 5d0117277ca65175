"""Training batches of a flow: which images, in which order, and how they are augmented."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from flowaug.data import create_loader
from flowaug.data.loaders import endless_batches, endless_table
from flowaug.data.transforms import random_hflip, random_shift, train_transform
from flowaug.flows.passes import ImageTable
from flowaug.training.options import FlowTransformOptions
from flowaug.training.options.commands import uses_timm_transforms


class FlowBatches:
    """Shuffled batches for the training of a flow, from memory or, with timm's transforms, from files.

    Args:
        dataset: the training data set, for timm's transforms.
        table: the same images in memory.
        transforms: how to augment them.
        batch_size: images per step and process.
        seed: seed of the order.
        workers: data loader processes, for timm's transforms.
    """

    def __init__(
        self, dataset, table: ImageTable, transforms: FlowTransformOptions, batch_size: int, seed: int, workers: int
    ):
        self.dataset, self.table, self.transforms = dataset, table, transforms
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.by_timm = uses_timm_transforms(transforms)

    def phases(self, phases: list[tuple[Tensor | None, int]], start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of every phase (images, steps) in turn, from step ``start`` on."""
        for rows, steps in phases:
            yield from itertools.islice(self._endless(rows, start), max(0, steps - start))
            start = max(0, start - steps)

    def _endless(self, rows: Tensor | None, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of some images (None: all), epoch after epoch, from step ``start`` on."""
        table = self.table if rows is None else self.table.subset(rows)
        process = table.process_index, table.num_processes
        if not self.by_timm:
            return endless_table(table.images, table.targets, self.batch_size, self.seed, start, *process)
        channels, *size = table.images.shape[1:]
        batch_size = min(self.batch_size, len(table) // table.num_processes)
        loader = create_loader(
            self.dataset if rows is None else self.dataset.subset(rows),
            train_transform((size[0], size[1]), channels, self.transforms),
            batch_size,
            True,
            self.seed,
            self.workers,
            *process,
            drop_last=True,
        )
        return endless_batches(loader, start)


def augment(x: Tensor, transforms: FlowTransformOptions, generator: torch.Generator) -> Tensor:
    """Shift and flip images at random; timm has flipped those that went through its transform.

    Args:
        x: images (B, C, H, W), uint8 or in [0, 1].
        transforms: how to augment them.
        generator: source of the randomness, on the device of ``x``.

    Returns:
        Images (B, C, H, W) in [0, 1].
    """
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    x = random_shift(x, transforms.shift, generator)
    return x if uses_timm_transforms(transforms) else random_hflip(x, transforms.hflip, generator)
