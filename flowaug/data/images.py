"""Labelled images, held in memory or read from files: 8-bit, untransformed, with int64 labels."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from flowaug.data.image_files import check_readable, grey_or_rgb, parallel_map, to_mode


class ImageDataset(Dataset):
    """Images with one label each, held in memory or read from files.

    Args:
        images: uint8 array ``(N, H, W)`` or ``(N, H, W, 3)``, or the paths of N image files.
        targets: ``(N,)`` labels in ``0 .. len(class_names) - 1``.
        class_names: the name of each class.
        name: what messages and file names call this data set.
        channels: 1 or 3; None reads it off the array or the files' headers.
        grey_levels: how many different values a channel takes.
        transform: applied to each image on access; None gives the PIL image.
        root: folder that the paths are taken relative to in :meth:`fingerprint`.

    Attributes:
        targets: int64 array ``(N,)``.
        image_size: ``(H, W)``, of the first file where files differ.

    Raises:
        ValueError: images, targets and class names do not fit together.
    """

    def __init__(
        self,
        images: np.ndarray | Sequence[str | Path],
        targets: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        *,
        name: str = "images",
        channels: int | None = None,
        grey_levels: int = 256,
        transform: Callable | None = None,
        root: str | Path | None = None,
    ):
        self.images = images if isinstance(images, np.ndarray | range) else [Path(path) for path in images]
        self.targets = np.asarray(targets, dtype=np.int64)
        self.class_names, self.name = tuple(class_names), name
        self.grey_levels, self.transform, self.root = grey_levels, transform, root
        _check_source(self.images, self.targets, self.class_names)
        self.channels = channels or self._own_channels()
        self.image_size = self._own_size()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return self._labelled(self.image(index), index)

    def visit(self, index: int, number: int):
        """The image and label on visit ``number`` of a training; here they are those of every visit."""
        return self[index]

    @property
    def in_memory(self) -> bool:
        """Whether the pixels are held as an array (else: as files)."""
        return isinstance(self.images, np.ndarray)

    def image(self, index: int) -> Image.Image:
        """The untransformed image, in mode "L" (1 channel) or "RGB" (3 channels)."""
        mode = "L" if self.channels == 1 else "RGB"
        if self.in_memory:
            return Image.fromarray(self.images[index]).convert(mode)
        with self.open(index) as image:
            return to_mode(image, mode)

    def open(self, index: int) -> Image.Image:
        """The image file, not decoded yet."""
        return Image.open(self.images[index])

    def check(self) -> None:
        """Decode every image file to its end.

        Raises:
            ValueError: some do not; names the first and counts the rest.
        """
        if not self.in_memory:
            check_readable(self.images)

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageDataset:
        """The images at ``indices``, in that order, under the same name, classes and transform."""
        indices, part = np.asarray(indices, dtype=np.int64), copy.copy(self)
        part.images = self.images[indices] if self.in_memory else [self.images[i] for i in indices]
        part.targets = self.targets[indices]
        return part

    def examples(self, limit: int = 10) -> list[tuple[Image.Image, int]]:
        """The first image of each of the first ``limit`` classes that have one."""
        labels, first = np.unique(self.targets, return_index=True)
        return [(self.image(i), label) for i, label in zip(first[:limit], labels[:limit].tolist(), strict=True)]

    def read_table(self, size: tuple[int, int], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All images as `stack_images` gives them, and their labels (N,)."""
        return stack_images(self, size, channels), torch.as_tensor(self.targets)

    def fingerprint(self) -> str:
        """16 hex digits that change with the class names, the labels and the images.

        Files count by their path relative to the root and their size in bytes, not by their pixels.
        """
        digest = hashlib.sha256(repr((self.class_names, self.channels, self.grey_levels)).encode())
        digest.update(self.targets.tobytes())
        if self.in_memory:
            digest.update(repr(self.images.shape).encode() + self.images.tobytes())
        else:
            root = self.root or "."
            sizes = [(Path(os.path.relpath(p, root)).as_posix(), p.stat().st_size) for p in self.images]
            digest.update(repr(sizes).encode())
        return digest.hexdigest()[:16]

    def _labelled(self, image: Image.Image, index: int):
        return image if self.transform is None else self.transform(image), int(self.targets[index])

    def _own_channels(self) -> int:
        if self.in_memory:
            return 1 if self.images.ndim == 3 else 3
        return grey_or_rgb(check_readable(self.images, decode=False))

    def _own_size(self) -> tuple[int, int]:
        if self.in_memory:
            return self.images.shape[1:3]
        with self.open(0) as image:
            return image.size[::-1]


def stack_images(dataset: ImageDataset, size: tuple[int, int], channels: int) -> torch.Tensor:
    """All images in one uint8 tensor ``(N, channels, H, W)``, in order; the transform is not applied.

    Args:
        dataset: the images.
        size: ``(H, W)``; other sizes are resized (antialiased bicubic, aspect ratio not kept).
        channels: 1 (grey) or 3 (RGB).
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels!r}; expected 1 (grey) or 3 (RGB)")
    stack = torch.empty(len(dataset), channels, *size, dtype=torch.uint8)
    pixels = parallel_map(lambda i: to_pixels(dataset.image(i), size, channels), range(len(dataset)), "reading images")
    for row, image in zip(stack, pixels, strict=True):
        row.copy_(image)
    return stack


def _check_source(images, targets: np.ndarray, class_names: tuple[str, ...]) -> None:
    if isinstance(images, np.ndarray):
        good = images.dtype == np.uint8 and (images.ndim == 3 or images.shape[3:] == (3,))
        if not good:
            raise ValueError(
                f"images are {images.dtype} of shape {images.shape}; "
                "expected uint8 (N, H, W) or (N, H, W, 3): scale to 0..255, round and move the channels last"
            )
    if targets.shape != (len(images),) or len(images) == 0:
        raise ValueError(f"{len(images)} images but targets of shape {targets.shape}; expected one label per image")
    if targets.min() < 0 or targets.max() >= len(class_names):
        raise ValueError(
            f"targets run from {targets.min()} to {targets.max()} but there are {len(class_names)} class "
            f"names; expected labels in 0..{len(class_names) - 1}"
        )


def to_pixels(image: Image.Image, size: tuple[int, int], channels: int) -> torch.Tensor:
    """The image as uint8 ``(channels, H, W)``."""
    height, width = size
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)  # antialiased when it shrinks
    return pil_to_tensor(image)
