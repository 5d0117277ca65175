"""Augmented copies of a data set: flow mixup that comes before the transforms of single images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm.auto import tqdm

from flowaug.data.images import ImageDataset, to_pixels
from flowaug.mixup.transform import FlowMixupTransform, enlarge

CHUNK = 256  # images whose random choices belong together


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
    """The images of a chunk by their position, each at its own size; those of copy 0 as they are."""
    images = {i: dataset.image(i) for i in chunk.indices}
    if chunk.copy == 0:
        return images
    size = transform.flow.event_shape[1:]
    small = torch.stack([to_pixels(image, size, dataset.channels) for image in images.values()])
    mixed = mix_chunk(transform, small, dataset.targets, chunk, seed)
    return {i: merge(image, *pair) for (i, image), *pair in zip(images.items(), small, mixed, strict=True)}


def mix_chunk(transform: FlowMixupTransform, small: Tensor, targets: np.ndarray, chunk: Chunk, seed: int) -> Tensor:
    """The images of a chunk, uint8 (B, C, H, W) at the flow's size, as mixed on the transform's device.

    The random choices depend on the seed, the copy and the chunk's place alone.
    """
    transform.reseed(seed, chunk.copy, chunk.start)
    device, labels = transform.pca.axes.device, torch.as_tensor(targets[chunk.start : chunk.stop])
    return transform(small.to(device), labels.to(device))[0].cpu()


def merge(image: Image.Image, small: Tensor, mixed: Tensor) -> Image.Image:
    """The image with the change that the flow has made to its small twin, both uint8 (C, H, W), enlarged and added."""
    if torch.equal(small, mixed):
        return image
    if (image.height, image.width) == tuple(small.shape[1:]):
        return to_image(mixed)
    pixels = pil_to_tensor(image).float()
    change = enlarge((mixed.float() - small.float())[None], pixels.shape[1:])[0]
    return to_image((pixels + change).round().clamp(0, 255).to(torch.uint8))


class AugmentedCopies(ImageDataset):
    """A data set whose images were augmented several times beforehand; each visit to an image takes the next copy.

    Crops, RandAugment and the like then change images that the flow has moved, while the flow meets images as it was
    trained on. The copies are those that :func:`flowaug.export.export` writes for the same seed. They are kept in
    memory at the size of the flow's images, whatever that of the data set's.

    Args:
        dataset: the images; its transform is kept, not applied.
        transform: the augmentation, for uint8 images; its generator is set anew for each chunk.
        copies: of each image; the transform's ``p`` says which share of a copy is moved at all.
        seed: seed of the augmentation.
        for_moved: transform of the images that the flow has moved, in the place of that of the loader; None for no
            difference. Without RandAugment, for example, no image is changed by both.
        rank: number of this process; each makes its share of the copies and gets those of the others.
        world_size: number of processes.
        reduce: sums a tensor over the processes.

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
        rank: int = 0,
        world_size: int = 1,
        reduce: Callable[[Tensor], Tensor] = lambda t: t,
    ):
        if copies < 1:
            raise ValueError(f"copies is {copies}; expected at least 1")
        if not isinstance(dataset, ImageDataset):
            raise ValueError("shards are a stream and cannot be copied in memory; augment batches instead")
        self.dataset, self.for_moved = dataset, for_moved
        self.small = dataset.read_table(transform.flow.event_shape[1:], dataset.channels)[0]
        own = chunks(len(dataset), range(1, copies + 1))[rank::world_size]
        self.mixed = _mixed(transform, self.small, dataset.targets, copies, own, seed)
        if world_size > 1:
            _exchange(self.mixed, transform, reduce)
        self.moved = torch.cat([(part != self.small).flatten(1).any(1) for part in self.mixed.split(len(dataset))])
        same = {name: getattr(dataset, name) for name in ("name", "channels", "grey_levels", "transform")}
        super().__init__(range(len(dataset)), dataset.targets, dataset.class_names, **same)

    def visit(self, index: int, number: int):
        """The image on visit ``number``, in its copy ``number mod copies``, and its label."""
        place = self._place(index, number)
        image = self._copy(place)
        if self.for_moved is not None and self.moved[place]:
            return self.for_moved(image), int(self.targets[index])
        return self._labelled(image, index)

    def open(self, index: int) -> Image.Image:
        """The image in its first copy."""
        return self._copy(self._place(index, 0))

    def _copy(self, place: int) -> Image.Image:
        row = place % len(self.small)
        return merge(self.dataset.image(row), self.small[row], self.mixed[place])

    def _place(self, index: int, number: int) -> int:
        return (number * len(self.small) + self.images[index]) % len(self.mixed)


def to_image(pixels: Tensor) -> Image.Image:
    """The PIL image of uint8 pixels (C, H, W)."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())


def _mixed(
    transform: FlowMixupTransform, small: Tensor, targets: np.ndarray, copies: int, own: list[Chunk], seed: int
) -> Tensor:
    """Copies of the images ``small`` (N, C, H, W), one after another, (copies · N, C, H, W); 0 outside ``own``."""
    count = len(small)
    mixed = small.new_zeros((copies * count, *small.shape[1:]))
    total = sum(len(chunk.indices) for chunk in own)
    with tqdm(total=total, desc="augmented copies", unit=" images", leave=False, delay=2) as bar:
        for chunk in own:
            begin = (chunk.copy - 1) * count
            part = mix_chunk(transform, small[chunk.start : chunk.stop], targets, chunk, seed)
            mixed[begin + chunk.start : begin + chunk.stop] = part
            bar.update(len(part))
    return mixed


def _exchange(mixed: Tensor, transform: FlowMixupTransform, reduce: Callable[[Tensor], Tensor]) -> None:
    """Add up the copies of all processes in place, each of which is zero but in one, and what was counted."""
    for part in mixed.split(CHUNK):
        part.copy_(reduce(part.to(transform.pca.axes.device)))
    transform.sum_counts(reduce)
