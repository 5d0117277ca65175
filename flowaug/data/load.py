"""Open data sets of 8-bit images with int64 labels: by name, from an image folder or from webdataset shards."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np

from flowaug.data.builtin import load_digits, load_fashion_mnist
from flowaug.data.class_map import ClassMap, read_class_map, relabel
from flowaug.data.image_folder import SPLIT_FOLDERS, load_folder
from flowaug.data.images import ImageDataset
from flowaug.data.timm_sources import is_timm, open_timm
from flowaug.data.wds.dataset import StreamDataset, open_stream
from flowaug.data.wds.index import is_shards

DATASETS = ("digits", "fashion_mnist")


def load_dataset(
    dataset: str | None = None,
    data_dir: str | Path | None = None,
    split: str = "train",
    images_per_class: int | None = None,
    seed: int = 0,
    *,
    class_map: str | Path | None = None,
    num_classes: int | None = None,
    train_samples: int | None = None,
) -> ImageDataset | StreamDataset:
    """Open and check one split of a named data set, an image folder or webdataset shards.

    Images are 8-bit and not normalised. Image files are decoded once to find bad ones before training starts.
    Files that have not changed are not opened again at the next start, see ``flowaug.data.survey``.

    Args:
        dataset: "digits" (the default; 8×8, 17 grey levels, fixed 80/20 split), "fashion_mnist", "wds/", or a name
            that timm accepts, such as "torch/cifar10" or "hfds/owner/name", see
            ``flowaug.data.timm_sources.open_timm``.
        data_dir: folder with ``train/`` and ``val/`` (or ``validation/``, ``test/``), each with one folder per class;
            or a folder or pattern of webdataset shards, see ``flowaug.data.wds.index.find_shards``; or the root folder
            of a timm data set.
        split: "train" or "val".
        images_per_class: size of a random subset of the training images of each class; None keeps all images.
        seed: seed of the random subset.
        class_map: JSON file with the label of each class, see ``flowaug.data.class_map.read_class_map``.
        num_classes: required number of classes; None accepts any number.
        train_samples: number of samples per training epoch of webdataset shards; None takes it from timm's
            ``_info.json`` or counts the samples. The training shards are not counted if this number is known and
            ``num_classes`` or ``class_map`` is given.

    Returns:
        A ``StreamDataset`` for webdataset shards, else an ``ImageDataset``.

    Raises:
        ValueError: options are unknown or contradict each other, a class has too few images, or an image is unreadable.
        FileNotFoundError: the folder, the split or a file of the data set does not exist.
    """
    data_dir = None if data_dir is None else Path(data_dir).expanduser()
    if is_shards(dataset, data_dir):
        source = _checked_source(data_dir, images_per_class)
        return open_stream(source, split, class_map, num_classes, train_samples)

    _check_options(dataset, data_dir, split, images_per_class, train_samples)
    data = _load(dataset, data_dir, split, decode=images_per_class is None)
    data = _apply_class_map(data, split, class_map, num_classes)
    if images_per_class is not None:
        data = data.subset(_choose_per_class(data, images_per_class, seed))
    data.check()
    return data


def _checked_source(data_dir: Path | None, images_per_class: int | None) -> Path:
    """Return the folder or pattern of the shards, after a check of the options for shards."""
    if data_dir is None:
        raise ValueError(
            "dataset 'wds/' needs data_dir (--data-dir); give a folder with .tar shards or a pattern of their paths"
        )
    if images_per_class is not None:
        raise ValueError(
            "images_per_class needs random access to images, but webdataset shards are read as a stream; leave it out, "
            "or unpack the shards into train/ and val/ with one folder per class"
        )
    return data_dir


def _apply_class_map(
    data: ImageDataset, split: str, class_map: str | Path | None, num_classes: int | None
) -> ImageDataset:
    """Return the data set with the labels of the class map, if there is one, and check the number of classes."""
    classes = ClassMap.from_names(data.class_names, data.name) if class_map is None else read_class_map(class_map)
    classes.check_count(num_classes)
    return data if class_map is None else relabel(data, classes, split)


def _load(dataset: str | None, data_dir: Path | None, split: str, decode: bool) -> ImageDataset:
    if is_timm(dataset):
        return open_timm(dataset, data_dir, split, decode)
    if data_dir is not None:
        return load_folder(data_dir, split, decode)
    return {"digits": load_digits, "fashion_mnist": load_fashion_mnist}[dataset or "digits"](split)


def _check_options(dataset, data_dir, split, images_per_class, train_samples) -> None:
    if dataset is not None and data_dir is not None and not is_timm(dataset):
        raise ValueError(f"both dataset={dataset!r} and data_dir={str(data_dir)!r} are given; give one of them")
    if dataset not in (None, *DATASETS) and not is_timm(dataset):
        close = difflib.get_close_matches(str(dataset), DATASETS, 1)
        hint = f"did you mean {close[0]!r}?" if close else "for a folder, use data_dir (--data-dir) instead"
        raise ValueError(
            f"unknown dataset {dataset!r}; expected {', '.join(DATASETS)}, torch/…, hfds/… or wds/; {hint}"
        )
    if train_samples is not None:
        raise ValueError(
            f"train_samples is {train_samples}, but only webdataset shards accept it; leave it out, the images of "
            "this data set are counted"
        )
    if split not in SPLIT_FOLDERS:
        raise ValueError(f"unknown split {split!r}; expected 'train' or 'val'")
    if images_per_class is not None and split != "train":
        raise ValueError("images_per_class selects training images only; leave it out for split='val'")
    if images_per_class is not None and images_per_class < 2:
        raise ValueError(f"images_per_class is {images_per_class}; mixing needs at least 2 images per class")


def _choose_per_class(data: ImageDataset, count: int, seed: int) -> np.ndarray:
    """Return the sorted indices of ``count`` random images of each class."""
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
