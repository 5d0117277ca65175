"""Built-in data sets: scikit-learn's digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np

from flowaug.data.images import ImageDataset

FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # the environment's FLOWAUG_FASHION_MNIST overrules it


FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def load_digits(split: str) -> ImageDataset:
    """scikit-learn's digits with 0..16 spread over 0..255; 80 % of each class, always the same, to train."""
    from sklearn import datasets  # imported here: slow, and only this data set needs it

    raw = datasets.load_digits()
    images = np.rint(raw.images * 255 / 16).astype(np.uint8)
    data = ImageDataset(images, raw.target, "0123456789", name="digits", grey_levels=17)
    rng = np.random.default_rng(0)  # a fixed split: never the user's seed
    orders = [rng.permutation(np.flatnonzero(data.targets == k)) for k in range(10)]
    parts = [o[: round(0.8 * len(o))] if split == "train" else o[round(0.8 * len(o)) :] for o in orders]
    return data.subset(np.sort(np.concatenate(parts)))


def load_fashion_mnist(split: str) -> ImageDataset:
    """Load Fashion-MNIST from its gzipped idx files: 60,000 images of 28×28 to train, 10,000 to validate."""
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
