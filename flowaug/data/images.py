"""``ImageDataset``: 8-bit images with int64 labels, held in memory or read from files."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from flowaug.data.image_files import check_readable, grey_or_rgb, parallel_map, to_mode
from flowaug.data.survey import FolderSurvey


class ImageDataset(Dataset):
    """Images with one label each, held in memory or read from files.

    ``dataset[i]`` is the transformed image (a PIL image without ``transform``) and its label, an int.

    Args:
        images: uint8 array (N, H, W) or (N, H, W, 3), or the paths of N image files.
        targets: labels (N,) in ``0 .. len(class_names) - 1``.
        class_names: names of the classes in label order.
        name: name of the data set in messages and file names.
        channels: 1 or 3; None takes it from the shape of the array or the headers of the files.
        grey_levels: number of different pixel values.
        transform: applied to each PIL image on access; None returns the PIL image.
        root: folder to which the paths are relative in ``fingerprint``.
        image_size: (H, W) of the first image; None takes it from the array or the header of the first file.
        survey: what is known of the files from an earlier look, so that ``check`` does not open them again.

    Attributes:
        targets: int64 array (N,).
        image_size: (H, W); of the first image if sizes differ.

    Raises:
        ValueError: images, targets and class names have inconsistent shapes or ranges.
    """

    images: np.ndarray | Sequence[Path | int]

    def __init__(
        self,
        images: np.ndarray | Sequence[str | Path] | range,
        targets: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        *,
        name: str = "images",
        channels: int | None = None,
        grey_levels: int = 256,
        transform: Callable | None = None,
        root: str | Path | None = None,
        image_size: tuple[int, int] | None = None,
        survey: FolderSurvey | None = None,
    ):
        self.images = images if isinstance(images, np.ndarray | range) else _as_paths(images)
        self.targets = np.asarray(targets, dtype=np.int64)
        self.class_names = tuple(class_names)
        self.name = name
        self.grey_levels = grey_levels
        self.transform = transform
        self.root = root
        self.survey = survey

        _check_arrays(self.images, self.targets, self.class_names)
        self.channels = channels or self._find_channels()
        self.image_size = image_size or self._find_size()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        return self._labelled(self.image(index), index)

    def visit(self, index: int, number: int):
        """Return the image and label of a visit of a training run; here they are the same for every visit.

        Args:
            index: index of the image.
            number: number of earlier visits to this image. Subclasses may return another version of the image for it.
        """
        return self[index]

    @property
    def in_memory(self) -> bool:
        """Whether the images are an array in memory instead of files."""
        return isinstance(self.images, np.ndarray)

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width that all images share; None where files may differ."""
        return self.image_size if self.in_memory else None

    def image(self, index: int) -> Image.Image:
        """Return an image without the transform, in mode "L" (1 channel) or "RGB" (3 channels)."""
        mode = "L" if self.channels == 1 else "RGB"
        if isinstance(self.images, np.ndarray):
            return Image.fromarray(self.images[index]).convert(mode)
        with self.open(index) as image:
            return to_mode(image, mode)

    def open(self, index: int) -> Image.Image:
        """Open an image file without decoding it."""
        return Image.open(self._paths[index])

    def check(self) -> None:
        """Check that every image file decodes completely.

        Raises:
            ValueError: some files are bad; the message names the first and counts them.
        """
        if self.survey is not None:
            self.survey.check(self._paths)
            self.survey = None  # a further check opens the files; data loader processes need no copy
        elif not self.in_memory:
            check_readable(self._paths)

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageDataset:
        """Return the images at ``indices``, in that order, with the same name, classes and transform."""
        indices = np.asarray(indices, dtype=np.int64)
        part = copy.copy(self)
        images = self.images
        part.images = images[indices] if isinstance(images, np.ndarray) else [images[i] for i in indices]
        part.targets = self.targets[indices]
        return part

    def examples(self, limit: int = 10) -> list[tuple[Image.Image, int]]:
        """Return the first image of each class and its label, for the first ``limit`` classes that have images."""
        labels, first = np.unique(self.targets, return_index=True)
        return [(self.image(i), label) for i, label in zip(first[:limit], labels[:limit].tolist(), strict=True)]

    def read_table(self, size: tuple[int, int], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all images in memory, resized as by ``stack_images``.

        Args:
            size: (H, W) of the result.
            channels: 1 (greyscale) or 3 (RGB).

        Returns:
            uint8 images (N, channels, H, W) and int64 labels (N,).
        """
        return stack_images(self, size, channels), torch.as_tensor(self.targets)

    def fingerprint(self) -> str:
        """Return a hash (16 hex digits) of the class names, the labels and the images.

        Image files enter it by their path relative to ``root`` and their size in bytes, not by their pixels.
        """
        digest = hashlib.sha256(repr((self.class_names, self.channels, self.grey_levels)).encode())
        digest.update(self.targets.tobytes())
        if isinstance(self.images, np.ndarray):
            digest.update(repr(self.images.shape).encode() + self.images.tobytes())
        else:
            root = self.root or "."
            sizes = [(Path(os.path.relpath(p, root)).as_posix(), p.stat().st_size) for p in self._paths]
            digest.update(repr(sizes).encode())
        return digest.hexdigest()[:16]

    @property
    def _paths(self) -> Sequence[Path]:
        """The image files, if the images are not in memory."""
        return cast(Sequence[Path], self.images)

    def _labelled(self, image: Image.Image, index: int):
        return image if self.transform is None else self.transform(image), int(self.targets[index])

    def _find_channels(self) -> int:
        if isinstance(self.images, np.ndarray):
            return 1 if self.images.ndim == 3 else 3
        return grey_or_rgb(check_readable(self._paths, decode=False))

    def _find_size(self) -> tuple[int, int]:
        if isinstance(self.images, np.ndarray):
            height, width = self.images.shape[1:3]
            return height, width
        with self.open(0) as image:
            return image.height, image.width


@runtime_checkable
class StreamSource(Protocol):
    """A stream of labelled images that creates its own loader, such as a ``StreamDataset``."""

    def stream_loader(self, transform: Callable, batch_size: int, training: bool, *options) -> Any: ...  # noqa: D102


def stack_images(dataset: ImageDataset, size: tuple[int, int], channels: int) -> torch.Tensor:
    """Return all images of a data set in one tensor, without the data set's transform.

    Args:
        dataset: the images.
        size: (H, W) of the result; images of another size are resized (bicubic with antialiasing, without keeping the
            aspect ratio).
        channels: 1 (greyscale) or 3 (RGB).

    Returns:
        uint8 tensor (N, channels, H, W).

    Raises:
        ValueError: ``channels`` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels!r}; expected 1 (greyscale) or 3 (RGB)")
    stack = torch.empty(len(dataset), channels, *size, dtype=torch.uint8)
    pixels = parallel_map(lambda i: to_pixels(dataset.image(i), size, channels), range(len(dataset)), "reading images")
    for row, image in zip(stack, pixels, strict=True):
        row.copy_(image)
    return stack


def _as_paths(files: Sequence[str | Path]) -> list[Path]:
    return [file if isinstance(file, Path) else Path(file) for file in files]  # Path(Path) takes microseconds


def _check_arrays(images, targets: np.ndarray, class_names: tuple[str, ...]) -> None:
    if isinstance(images, np.ndarray):
        is_valid = images.dtype == np.uint8 and (images.ndim == 3 or images.shape[3:] == (3,))
        if not is_valid:
            raise ValueError(
                f"images are {images.dtype} of shape {images.shape}; "
                "expected uint8 (N, H, W) or (N, H, W, 3): scale to 0..255, round, and move the channels last"
            )
    if targets.shape != (len(images),) or len(images) == 0:
        raise ValueError(f"{len(images)} images but targets of shape {targets.shape}; expected one label per image")
    if targets.min() < 0 or targets.max() >= len(class_names):
        raise ValueError(
            f"targets run from {targets.min()} to {targets.max()} but there are {len(class_names)} class names; "
            f"expected labels in 0..{len(class_names) - 1}"
        )


def to_pixels(image: Image.Image, size: tuple[int, int], channels: int) -> torch.Tensor:
    """Convert a PIL image to a uint8 tensor (channels, H, W).

    Args:
        image: the image.
        size: (H, W) of the result; an image of another size is resized.
        channels: 1 (greyscale) or 3 (RGB).
    """
    height, width = size
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)  # with antialiasing when shrinking
    return pil_to_tensor(image)
