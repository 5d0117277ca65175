"""Built-in data sets: scikit-learn's digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import cast

import numpy as np

from flowaug.data.images import ImageDataset

FASHION_MNIST_DIR = "/usr/share/datasets/fashion-mnist"  # the environment variable FLOWAUG_FASHION_MNIST overrides it

FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def load_digits(split: str) -> ImageDataset:
    """Load scikit-learn's digits: 1797 images of 8×8, with pixel values 0..16 rescaled to 0..255.

    The split is fixed: 80 % of each class are training images, the others validation images.

    Args:
        split: "train" or "val".
    """
    from sklearn import datasets  # imported here because it is slow and only this data set needs it
    from sklearn.utils import Bunch

    raw = cast(Bunch, datasets.load_digits())
    images = np.rint(raw.images * 255 / 16).astype(np.uint8)
    data = ImageDataset(images, raw.target, "0123456789", name="digits", grey_levels=17)

    rng = np.random.default_rng(0)  # not the user's seed: the split is the same in every run
    orders = [rng.permutation(np.flatnonzero(data.targets == k)) for k in range(10)]
    parts = [o[: round(0.8 * len(o))] if split == "train" else o[round(0.8 * len(o)) :] for o in orders]
    return data.subset(np.sort(np.concatenate(parts)))


def load_fashion_mnist(split: str) -> ImageDataset:
    """Load Fashion-MNIST from its gzipped IDX files: 60,000 training and 10,000 validation images of 28×28.

    Args:
        split: "train" or "val".

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is truncated or is not an IDX file.
    """
    stem = {"train": "train", "val": "t10k"}[split]
    folder = Path(os.environ.get("FLOWAUG_FASHION_MNIST") or FASHION_MNIST_DIR)
    images = _read_idx(folder / f"{stem}-images-idx3-ubyte.gz", 3)
    targets = _read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 1)
    return ImageDataset(images, targets, FASHION_MNIST_CLASSES, name="fashion_mnist")


def _read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read the uint8 array of a gzipped IDX file: 4 magic bytes, ``ndim`` big-endian int32 sizes, then the values."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} does not exist; install Fashion-MNIST with `apt-get install dataset-fashion-mnist`, "
            "or set the environment variable FLOWAUG_FASHION_MNIST to the folder of its four .gz files"
        )
    try:
        raw = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(raw, ">i4", ndim, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a complete IDX file ({error}); install or copy it again") from error
