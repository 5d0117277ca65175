"""Data sets: 8-bit images and int64 labels; x in [0, 1] leaves by :func:`batches`; owns no normalisation."""

from __future__ import annotations

import copy
import difflib
import gzip
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from flowaug import folders
from flowaug.loaders import batches, create_loader

__all__ = ["DATASETS", "ImageDataset", "batches", "create_loader", "load_dataset", "stack_images"]

DATASETS = ("digits", "fashion_mnist")
FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # the environment's FLOWAUG_FASHION_MNIST overrules it
FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


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
        self.images = images if isinstance(images, np.ndarray) else [Path(path) for path in images]
        self.targets = np.asarray(targets, dtype=np.int64)
        self.class_names, self.name = tuple(class_names), name
        self.grey_levels, self.transform, self.root = grey_levels, transform, root
        _check_source(self.images, self.targets, self.class_names)
        self.channels = channels or self._own_channels()
        self.image_size = self._own_size()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        image = self.image(index)
        return image if self.transform is None else self.transform(image), int(self.targets[index])

    @property
    def in_memory(self) -> bool:
        """Whether the pixels are held as an array (else: as files)."""
        return isinstance(self.images, np.ndarray)

    def image(self, index: int) -> Image.Image:
        """The untransformed image, in mode "L" (1 channel) or "RGB" (3 channels)."""
        mode = "L" if self.channels == 1 else "RGB"
        if self.in_memory:
            return Image.fromarray(self.images[index]).convert(mode)
        with Image.open(self.images[index]) as image:
            return folders.to_mode(image, mode)

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageDataset:
        """The images at ``indices``, in that order, under the same name, classes and transform."""
        indices, part = np.asarray(indices, dtype=np.int64), copy.copy(self)
        part.images = self.images[indices] if self.in_memory else [self.images[i] for i in indices]
        part.targets = self.targets[indices]
        return part

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

    def _own_channels(self) -> int:
        if self.in_memory:
            return 1 if self.images.ndim == 3 else 3
        return folders.grey_or_rgb(folders.check_readable(self.images, decode=False))

    def _own_size(self) -> tuple[int, int]:
        if self.in_memory:
            return self.images.shape[1:3]
        with Image.open(self.images[0]) as image:
            return image.size[::-1]


def load_dataset(
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    split: str = "train",
    images_per_class: int | None = None,
    seed: int = 0,
) -> ImageDataset:
    """Open one split of a named data set or of an image folder, checked before any work starts.

    Args:
        dataset: "digits" (the default; 8×8, 17 grey levels, fixed 80/20 split) or "fashion_mnist".
        data_dir: folder with ``train/`` and ``val/`` (or ``validation/``, ``test/``), one folder per class.
        split: "train" or "val".
        images_per_class: keep a random subset of this many training images of each class.
        seed: seed of that subset; it changes nothing else.

    Raises:
        ValueError: contradicting or unknown options, classes with too few images, unreadable images.
        FileNotFoundError: the folder, the split or the data set's files are not there.
    """
    _check_options(dataset, data_dir, split, images_per_class)
    if data_dir is not None:
        data = _load_folder(Path(data_dir).expanduser(), split)
    else:
        data = {"digits": _load_digits, "fashion_mnist": _load_fashion_mnist}[dataset or "digits"](split)
    if images_per_class is not None:
        data = data.subset(_choose_per_class(data, images_per_class, seed))
    if not data.in_memory:
        folders.check_readable(data.images)
    return data


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
    pixels = folders.parallel(
        lambda i: _pixels(dataset.image(i), size, channels), range(len(dataset)), "reading images"
    )
    for row, image in zip(stack, pixels, strict=True):
        row.copy_(torch.from_numpy(image).permute(2, 0, 1))
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


def _check_options(dataset, data_dir, split, images_per_class) -> None:
    if dataset is not None and data_dir is not None:
        raise ValueError(f"both dataset={dataset!r} and data_dir={str(data_dir)!r} are given; give one of them")
    if dataset not in (None, *DATASETS):
        close = difflib.get_close_matches(str(dataset), DATASETS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "; for a folder of images use data_dir (--data-dir)"
        raise ValueError(f"unknown dataset {dataset!r}; the known ones are {', '.join(DATASETS)}{hint}")
    if split not in folders.SPLIT_FOLDERS:
        raise ValueError(f"unknown split {split!r}; expected 'train' or 'val'")
    if images_per_class is not None and split != "train":
        raise ValueError("images_per_class chooses training images only; leave it out for split='val'")
    if images_per_class is not None and images_per_class < 2:
        raise ValueError(f"images_per_class is {images_per_class}; mixing needs at least 2 images per class")


def _choose_per_class(data: ImageDataset, count: int, seed: int) -> np.ndarray:
    """Sorted indices of ``count`` random images of each class."""
    sizes = np.bincount(data.targets, minlength=len(data.class_names))
    if sizes.min() < count:
        smallest = data.class_names[sizes.argmin()]
        raise ValueError(
            f"images_per_class is {count} but class {smallest!r} has only {sizes.min()} training images; "
            f"set it to at most {sizes.min()} or add images to that class"
        )
    rng = np.random.default_rng(seed)
    members = (np.flatnonzero(data.targets == k) for k in range(len(data.class_names)))
    return np.sort(np.concatenate([rng.choice(m, count, replace=False) for m in members]))


def _load_folder(root: Path, split: str) -> ImageDataset:
    """One split of an image folder; grey only if every image of train and val is, so that both agree."""
    splits = folders.scan_folder(root)
    if split not in splits:
        raise folders.missing_split(root, split)
    classes, where = splits[split], str(folders.find_split(root, split))
    counts = {name: len(paths) for name, paths in classes.items()}
    folders.check_class_counts(counts, 2 if split == "train" else 1, where)
    everything = [path for table in splits.values() for paths in table.values() for path in paths]
    channels = folders.grey_or_rgb(folders.check_readable(everything, decode=False))
    images = [path for paths in classes.values() for path in paths]
    targets = np.repeat(np.arange(len(classes)), list(counts.values()))
    return ImageDataset(images, targets, classes, name=root.resolve().name, channels=channels, root=root)


def _load_digits(split: str) -> ImageDataset:
    """scikit-learn's digits with 0..16 spread over 0..255; 80 % of each class, always the same, to train."""
    from sklearn.datasets import load_digits  # imported here: slow, and only this data set needs it

    raw = load_digits()
    images = np.rint(raw.images * 255 / 16).astype(np.uint8)
    data = ImageDataset(images, raw.target, "0123456789", name="digits", grey_levels=17)
    rng = np.random.default_rng(0)  # a fixed split: never the user's seed
    orders = [rng.permutation(np.flatnonzero(data.targets == k)) for k in range(10)]
    parts = [o[: round(0.8 * len(o))] if split == "train" else o[round(0.8 * len(o)) :] for o in orders]
    return data.subset(np.sort(np.concatenate(parts)))


def _load_fashion_mnist(split: str) -> ImageDataset:
    stem = {"train": "train", "val": "t10k"}[split]
    folder = Path(os.environ.get("FLOWAUG_FASHION_MNIST") or FASHION_MNIST_DIR)
    images = _read_idx(folder / f"{stem}-images-idx3-ubyte.gz", 3)
    targets = _read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 1)
    return ImageDataset(images, targets, FASHION_MNIST_CLASSES, name="fashion_mnist")


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """The uint8 array in a gzipped idx file: four magic bytes, ``ndim`` big-endian sizes, the bytes."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} is not there; install Fashion-MNIST with `apt-get install dataset-fashion-mnist` "
            "or name the folder of its four .gz files in the environment variable FLOWAUG_FASHION_MNIST"
        )
    try:
        raw = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(raw, ">i4", ndim, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a whole idx file ({error}); install or copy it again") from error


def _pixels(image: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    """The image as uint8 ``(H, W, channels)``."""
    height, width = size
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)  # antialiased when it shrinks
    return np.array(image).reshape(height, width, channels)
