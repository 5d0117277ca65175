"""Offline copies: flow mixup of a whole data set in advance, before the transforms of single images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

from flowaug.data.images import ImageDataset, to_pixels
from flowaug.data.wds.dataset import StreamDataset
from flowaug.mixup.transform import FlowMixupTransform
from flowaug.pixels import enlarge

CHUNK = 256  # images per chunk; each chunk has its own seed, so that it can be computed alone


@dataclass(frozen=True)
class Chunk:
    """Range of images in one copy of a data set.

    Attributes:
        copy: number of the copy; copy 0 is the original data set.
        start: index of the first image.
        stop: index after the last image.
    """

    copy: int
    start: int
    stop: int

    @property
    def indices(self) -> range:
        """Indices in the data set."""
        return range(self.start, self.stop)


def chunks(count: int, copies: range) -> list[Chunk]:
    """Return all chunks of ``count`` images, copy by copy."""
    return [Chunk(c, start, min(start + CHUNK, count)) for c in copies for start in range(0, count, CHUNK)]


def augmented(transform: FlowMixupTransform, dataset: ImageDataset, chunk: Chunk, seed: int) -> dict[int, Image.Image]:
    """Augment the images of a chunk, each at its own size.

    Args:
        transform: flow mixup for uint8 images.
        dataset: the images.
        chunk: images to augment; those of copy 0 are returned unchanged.
        seed: seed of the augmentation.

    Returns:
        PIL images by index.
    """
    images = {i: dataset.image(i) for i in chunk.indices}
    if chunk.copy == 0:
        return images

    size = transform.flow.image_size
    small = torch.stack([to_pixels(image, size, dataset.channels) for image in images.values()])
    mixed = mix_chunk(transform, small, dataset.targets, chunk, seed)
    return {i: merge(image, *pair) for (i, image), *pair in zip(images.items(), small, mixed, strict=True)}


def mix_chunk(transform: FlowMixupTransform, small: Tensor, targets: np.ndarray, chunk: Chunk, seed: int) -> Tensor:
    """Augment the images of a chunk at the size of the flow.

    The random choices depend only on the seed, the copy and the start of the chunk.

    Args:
        transform: flow mixup for uint8 images.
        small: images of the chunk, uint8 (B, C, H, W), at the size of the flow.
        targets: labels of the whole data set (N,).
        chunk: the images that ``small`` holds.
        seed: seed of the augmentation.

    Returns:
        Augmented images, uint8 (B, C, H, W) on the CPU.
    """
    transform.reseed(seed, chunk.copy, chunk.start)
    device = transform.pca.axes.device
    labels = torch.as_tensor(targets[chunk.start : chunk.stop])
    return transform(small.to(device), labels.to(device))[0].cpu()


def merge(image: Image.Image, small: Tensor, mixed: Tensor) -> Image.Image:
    """Apply the change of a small image to the full-size image.

    The difference between ``mixed`` and ``small`` is resized and added, which preserves fine detail.

    Args:
        image: image at its own size.
        small: the same image at the size of the flow, uint8 (C, h, w).
        mixed: the augmented small image, uint8 (C, h, w).

    Returns:
        The augmented image at its own size; ``image`` itself if nothing changed.
    """
    if torch.equal(small, mixed):
        return image
    if (image.height, image.width) == tuple(small.shape[1:]):
        return to_image(mixed)

    pixels = pil_to_tensor(image).float()
    change = enlarge((mixed.float() - small.float())[None], pixels.shape[1:])[0]
    return to_image((pixels + change).round().clamp(0, 255).to(torch.uint8))


class AugmentedCopies(ImageDataset):
    """Data set of images that were augmented offline, in several copies; each visit to an image returns the next copy.

    Cropping, RandAugment and other transforms then apply to augmented images, while the flow gets images like those it
    was trained on. For the same seed the copies equal the output of :func:`flowaug.evaluation.export.export`. They are
    held in memory at the size of the flow, whatever the size of the images.

    Args:
        dataset: the images. The copies keep its ``transform``, which applies to the augmented images.
        transform: flow mixup for uint8 images; its generator is reset for each chunk. Its ``p`` is the probability
            that an image of a copy is augmented.
        copies: number of copies of each image.
        seed: seed of the augmentation.
        changed_transform: transform of the images that flow mixup changed, used instead of ``self.transform``, for
            example one without RandAugment; None uses the same transform for all images.
        process_index: index of this process. Each process augments its part of the chunks, then all are exchanged.
        num_processes: number of processes.
        reduce: sums a tensor over the processes.

    Attributes:
        small: original images at the size of the flow, uint8 (N, C, h, w).
        mixed: images of all copies, one copy after another, uint8 (copies · N, C, h, w).
        changed: whether flow mixup changed each of them, (copies · N,) bool.

    Raises:
        ValueError: if ``copies`` is less than 1 or the data set is a stream of shards.

    Example:
        >>> from flowaug.data import load_dataset
        >>> digits = load_dataset("digits", images_per_class=2)
        >>> copies = AugmentedCopies(digits, FlowMixupTransform.from_pretrained("digits"), copies=3)
        >>> copies.visit(0, number=0) == copies.visit(0, number=3)
        True
    """

    def __init__(
        self,
        dataset: ImageDataset | StreamDataset,
        transform: FlowMixupTransform,
        copies: int,
        seed: int = 0,
        changed_transform: Callable[[Image.Image], Tensor] | None = None,
        process_index: int = 0,
        num_processes: int = 1,
        reduce: Callable[[Tensor], Tensor] = lambda t: t,
    ):
        if copies < 1:
            raise ValueError(f"copies is {copies}; expected at least 1")
        if not isinstance(dataset, ImageDataset):
            raise ValueError("webdataset shards are a stream and cannot be copied in memory; augment batches instead")
        self.dataset = dataset
        self.changed_transform = changed_transform

        self.small = dataset.read_table(transform.flow.image_size, dataset.channels)[0]
        own = chunks(len(dataset), range(1, copies + 1))[process_index::num_processes]
        self.mixed = _mix_chunks(transform, self.small, dataset.targets, copies, own, seed)
        if num_processes > 1:
            _sum_over_processes(self.mixed, transform, reduce)
        self.changed = torch.cat([(part != self.small).flatten(1).any(1) for part in self.mixed.split(len(dataset))])

        same = {name: getattr(dataset, name) for name in ("name", "channels", "grey_levels", "transform")}
        super().__init__(range(len(dataset)), dataset.targets, dataset.class_names, **same)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width that all images share; None where files may differ."""
        return self.dataset.fixed_size

    def visit(self, index: int, number: int):
        """Return the image of a visit and its label, after the transform.

        Args:
            index: index of the image.
            number: number of the visit; it returns copy ``number mod copies``.
        """
        row = self._row(index, number)
        image = self._image(row)
        if self.changed_transform is not None and self.changed[row]:
            return self.changed_transform(image), int(self.targets[index])
        return self._labelled(image, index)

    def open(self, index: int) -> Image.Image:
        """Return an image of the first copy."""
        return self._image(self._row(index, 0))

    def _image(self, row: int) -> Image.Image:
        original = row % len(self.small)
        return merge(self.dataset.image(original), self.small[original], self.mixed[row])

    def _row(self, index: int, number: int) -> int:
        """Return the row in ``mixed``. A subset keeps all rows; ``images`` are the indices of its originals."""
        return (number * len(self.small) + cast(Sequence[int], self.images)[index]) % len(self.mixed)


def to_image(pixels: Tensor) -> Image.Image:
    """Convert uint8 pixels (C, H, W) to a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def _mix_chunks(
    transform: FlowMixupTransform, small: Tensor, targets: np.ndarray, copies: int, own: list[Chunk], seed: int
) -> Tensor:
    """Return the copies of ``small`` (N, C, h, w), as (copies · N, C, h, w); chunks that are not in ``own`` are 0."""
    count = len(small)
    mixed = small.new_zeros((copies * count, *small.shape[1:]))
    total = sum(len(chunk.indices) for chunk in own)
    with tqdm(total=total, desc="offline copies", unit=" images", leave=False, delay=2) as bar:
        for chunk in own:
            offset = (chunk.copy - 1) * count
            part = mix_chunk(transform, small[chunk.start : chunk.stop], targets, chunk, seed)
            mixed[offset + chunk.start : offset + chunk.stop] = part
            bar.update(len(part))
    return mixed


def _sum_over_processes(mixed: Tensor, transform: FlowMixupTransform, reduce: Callable[[Tensor], Tensor]) -> None:
    """Sum copies (in place) and counts over the processes; each chunk is nonzero in one process only."""
    for part in mixed.split(CHUNK):
        part.copy_(reduce(part.to(transform.pca.axes.device)))
    transform.sum_counts(reduce)
