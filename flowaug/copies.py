"""Augmented copies of a data set: flow mixup that comes before the transforms of single images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from flowaug.generation import CHUNK
from flowaug.images import ImageDataset
from flowaug.transform import FlowMixupTransform


@dataclass(frozen=True)
class Chunk:
    """Images ``start`` to ``stop`` of the data set in copy number ``copy``; copy 0 is the originals."""

    copy: int
    start: int
    stop: int

    @property
    def indices(self) -> range:
        """Positions in the data set."""
        return range(self.start, self.stop)


def chunks(count: int, copies: range) -> list[Chunk]:
    """All chunks of ``count`` images, copy by copy."""
    return [Chunk(c, start, min(start + CHUNK, count)) for c in copies for start in range(0, count, CHUNK)]


def augmented(transform: FlowMixupTransform, dataset: ImageDataset, chunk: Chunk, seed: int) -> dict[int, Image.Image]:
    """The images of a chunk by their position; those of one size go through the flow together.

    The random choices depend on the seed, the copy and the chunk's place alone.
    """
    images = {i: dataset.image(i) for i in chunk.indices}
    if chunk.copy == 0:
        return images
    transform.reseed(seed, chunk.copy, chunk.start)
    sizes: dict[tuple, list[int]] = {}
    for i, image in images.items():
        sizes.setdefault(image.size, []).append(i)
    device = transform.pca.axes.device
    for members in sizes.values():
        x = torch.stack([_to_tensor(images[i]) for i in members])
        mixed, _ = transform(x.to(device), torch.as_tensor(dataset.targets[members], device=device))
        images.update(zip(members, map(to_image, mixed.cpu()), strict=True))
    return images


class AugmentedCopies(ImageDataset):
    """A data set whose images were augmented several times beforehand; each visit to an image takes the next copy.

    Crops, RandAugment and the like then change images that the flow has moved, while the flow meets images as it was
    trained on. The copies, in memory, are those that :func:`flowaug.export.export` writes for the same seed.

    Args:
        dataset: the images; its transform is kept, not applied.
        transform: the augmentation, for uint8 images; its generator is set anew for each chunk.
        copies: of each image; the transform's ``p`` says which share of a copy is moved at all.
        seed: seed of the augmentation.

    Raises:
        ValueError: no copy, or a stream of shards.

    Example:
        >>> from flowaug.data import load_dataset
        >>> digits = load_dataset("digits", images_per_class=2)
        >>> copies = AugmentedCopies(digits, FlowMixupTransform.from_pretrained("digits"), copies=3)
        >>> copies.visit(0, number=0) == copies.visit(0, number=3)
        True
    """

    def __init__(self, dataset: ImageDataset, transform: FlowMixupTransform, copies: int, seed: int = 0):
        if copies < 1:
            raise ValueError(f"copies is {copies}; expected at least 1")
        if not isinstance(dataset, ImageDataset):
            raise ValueError("shards are a stream and cannot be copied in memory; augment batches instead")
        self.originals = len(dataset)
        self.pixels = list(_copied(transform, dataset, copies, seed))
        same = {name: getattr(dataset, name) for name in ("name", "channels", "grey_levels", "transform")}
        super().__init__(range(self.originals), dataset.targets, dataset.class_names, **same)

    def visit(self, index: int, number: int):
        """The image on visit ``number``, in its copy ``number mod copies``, and its label."""
        return self._labelled(self._copy(index, number), index)

    def open(self, index: int) -> Image.Image:
        """The image in its first copy."""
        return self._copy(index, 0)

    def _copy(self, index: int, number: int) -> Image.Image:
        return Image.fromarray(self.pixels[(number * self.originals + self.images[index]) % len(self.pixels)])


def to_image(pixels: Tensor) -> Image.Image:
    """The PIL image of uint8 pixels (C, H, W)."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def _copied(transform: FlowMixupTransform, dataset: ImageDataset, copies: int, seed: int) -> Iterator[np.ndarray]:
    total = copies * len(dataset)
    with tqdm(total=total, desc="augmented copies", unit=" images", leave=False, delay=2) as bar:
        for chunk in chunks(len(dataset), range(1, copies + 1)):
            yield from map(np.asarray, augmented(transform, dataset, chunk, seed).values())
            bar.update(len(chunk.indices))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, -1)).permute(2, 0, 1)
