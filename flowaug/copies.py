"""Augmented copies of a data set: flow mixup that comes before the transforms of single images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from flowaug.generation import CHUNK
from flowaug.images import ImageDataset
from flowaug.transform import FlowMixupTransform

Augmented = tuple[dict[int, Image.Image], dict[int, bool]]  # by position in the data set


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


def augmented(transform: FlowMixupTransform, dataset: ImageDataset, chunk: Chunk, seed: int) -> Augmented:
    """The images of a chunk, and which of them the flow has moved; those of one size go through it together.

    The random choices depend on the seed, the copy and the chunk's place alone.
    """
    images = {i: dataset.image(i) for i in chunk.indices}
    moved = dict.fromkeys(images, False)
    if chunk.copy == 0:
        return images, moved
    transform.reseed(seed, chunk.copy, chunk.start)
    sizes: dict[tuple, list[int]] = {}
    for i, image in images.items():
        sizes.setdefault(image.size, []).append(i)
    device = transform.pca.axes.device
    for members in sizes.values():
        x = torch.stack([_to_tensor(images[i]) for i in members])
        mixed = transform(x.to(device), torch.as_tensor(dataset.targets[members], device=device))[0].cpu()
        images.update(zip(members, map(to_image, mixed), strict=True))
        moved.update(zip(members, (mixed != x).flatten(1).any(1).tolist(), strict=True))
    return images, moved


class AugmentedCopies(ImageDataset):
    """A data set whose images were augmented several times beforehand; each visit to an image takes the next copy.

    Crops, RandAugment and the like then change images that the flow has moved, while the flow meets images as it was
    trained on. The copies, in memory, are those that :func:`flowaug.export.export` writes for the same seed.

    Args:
        dataset: the images; its transform is kept, not applied.
        transform: the augmentation, for uint8 images; its generator is set anew for each chunk.
        copies: of each image; the transform's ``p`` says which share of a copy is moved at all.
        seed: seed of the augmentation.
        for_moved: transform of the images that the flow has moved, in the place of that of the loader; None for no
            difference. Without RandAugment, for example, no image is changed by both.

    Raises:
        ValueError: no copy, or a stream of shards.

    Example:
        >>> from flowaug.data import load_dataset
        >>> digits = load_dataset("digits", images_per_class=2)
        >>> copies = AugmentedCopies(digits, FlowMixupTransform.from_pretrained("digits"), copies=3)
        >>> copies.visit(0, number=0) == copies.visit(0, number=3)
        True
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: FlowMixupTransform,
        copies: int,
        seed: int = 0,
        for_moved: Callable[[Image.Image], Tensor] | None = None,
    ):
        if copies < 1:
            raise ValueError(f"copies is {copies}; expected at least 1")
        if not isinstance(dataset, ImageDataset):
            raise ValueError("shards are a stream and cannot be copied in memory; augment batches instead")
        self.originals = len(dataset)
        self.pixels, self.moved = zip(*_copied(transform, dataset, copies, seed), strict=True)
        self.for_moved = for_moved
        same = {name: getattr(dataset, name) for name in ("name", "channels", "grey_levels", "transform")}
        super().__init__(range(self.originals), dataset.targets, dataset.class_names, **same)

    def visit(self, index: int, number: int):
        """The image on visit ``number``, in its copy ``number mod copies``, and its label."""
        place = self._place(index, number)
        image = Image.fromarray(self.pixels[place])
        if self.for_moved is not None and self.moved[place]:
            return self.for_moved(image), int(self.targets[index])
        return self._labelled(image, index)

    def open(self, index: int) -> Image.Image:
        """The image in its first copy."""
        return Image.fromarray(self.pixels[self._place(index, 0)])

    def _place(self, index: int, number: int) -> int:
        return (number * self.originals + self.images[index]) % len(self.pixels)


def to_image(pixels: Tensor) -> Image.Image:
    """The PIL image of uint8 pixels (C, H, W)."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def _copied(
    transform: FlowMixupTransform, dataset: ImageDataset, copies: int, seed: int
) -> Iterator[tuple[np.ndarray, bool]]:
    """The pixels of every copy, and whether the flow has moved them."""
    total = copies * len(dataset)
    with tqdm(total=total, desc="augmented copies", unit=" images", leave=False, delay=2) as bar:
        for chunk in chunks(len(dataset), range(1, copies + 1)):
            images, moved = augmented(transform, dataset, chunk, seed)
            yield from zip(map(np.asarray, images.values()), moved.values(), strict=True)
            bar.update(len(chunk.indices))


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, -1)).permute(2, 0, 1)
