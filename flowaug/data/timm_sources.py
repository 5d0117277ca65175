"""Data sets with timm's names: ``torch/NAME`` (torchvision) and ``hfds/NAME`` (Hugging Face)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeGuard

import numpy as np
from PIL import Image
from timm.data import create_dataset

from flowaug.data.image_files import describe_error, grey_or_rgb, parallel_map
from flowaug.data.image_folder import find_split, missing_split, survey_splits
from flowaug.data.images import ImageDataset

PREFIXES = ("torch", "hfds", "tfds", "hfids")
PACKAGES = {"torch": "torchvision", "hfds": "datasets", "tfds": "tensorflow-datasets", "hfids": "datasets"}
SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}
NUM_PROBED = 256


class ReaderDataset(ImageDataset):
    """Images of a timm reader with random access, that is, a Hugging Face data set.

    Args:
        reader: ``reader[i]`` is an open image file and its label.
        targets: labels (N,).
        class_names: names of the classes in label order.
        name: name of the data set in messages and file names.
        channels: 1 or 3.
    """

    def __init__(self, reader, targets: np.ndarray, class_names: Sequence[str], *, name: str, channels: int):
        self.reader = reader
        super().__init__(range(len(targets)), targets, class_names, name=name, channels=channels)

    def open(self, index: int) -> Image.Image:
        """Open an image file without decoding it."""
        return Image.open(self.reader[self.images[index]][0])

    def check(self) -> None:
        """Check that every image decodes completely.

        Raises:
            ValueError: some images are bad; the message names the first and counts them.
        """
        faults = parallel_map(self._fault, range(len(self)), "checking images")
        bad = [(index, fault) for index, fault in enumerate(faults) if fault]
        if bad:
            raise ValueError(
                f"image {bad[0][0]} of {self.name} cannot be read ({bad[0][1]}); {len(bad)} of {len(self)} images are "
                "bad. Every image must decode completely: filter the data set, or download it again"
            )

    def fingerprint(self) -> str:
        """Return a hash (16 hex digits) of the class names, the labels and Hugging Face's fingerprint of the images."""
        facts = (self.class_names, self.channels, self.name, getattr(self.reader.dataset, "_fingerprint", ""))
        digest = hashlib.sha256(repr(facts).encode() + np.asarray(self.images).tobytes())
        digest.update(self.targets.tobytes())
        return digest.hexdigest()[:16]

    def _fault(self, index: int) -> str | None:
        try:
            self.image(index)
            return None
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            return describe_error(error)


def is_timm(dataset: str | None) -> TypeGuard[str]:
    """Return whether a data set name starts with a prefix of timm: ``torch/``, ``hfds/``, ``tfds/`` or ``hfids/``."""
    return dataset is not None and "/" in dataset and dataset.partition("/")[0].lower() in PREFIXES


def open_timm(name: str, root: Path | None, split: str, decode: bool = False) -> ImageDataset:
    """Open one split of a data set by its timm name.

    Args:
        name: "torch/cifar10", "torch/image_folder", "hfds/owner/name", ...
        root: folder of torchvision's files, or Hugging Face's cache folder (None: its default).
        split: "train" or "val"; for Hugging Face, "val" is the first of validation, val and test that exists.
        decode: decode image files at once, see ``flowaug.data.image_folder.load_folder``.

    Raises:
        ValueError: timm does not know the name, a package is not installed, or there is no random access to images.
        FileNotFoundError: the files of the data set do not exist.
    """
    prefix = name.partition("/")[0].lower()
    if prefix in ("tfds", "hfids"):
        raise ValueError(
            f"{name!r} is a streaming data set: no random access, so it cannot be resumed or sharded exactly; use the "
            "same data as hfds/…, torch/…, an image folder, or webdataset shards (wds/)"
        )
    if prefix == "torch" and root is None:
        raise ValueError(f"dataset {name!r} needs data_dir (--data-dir); give the folder of torchvision's files")
    if prefix == "hfds":
        return _from_reader(name, {part: _create(name, root, part) for part in {"train", split}}, split)
    return _from_torchvision(name, root, {part: _create(name, root, part) for part in SPLITS}, split, decode)


def _create(name: str, root: Path | None, split: str):
    """Create timm's data set, and turn its exceptions into ones with a clear message."""
    candidates = _split_names(name, root, split)
    try:
        for candidate in candidates:
            try:
                return create_dataset(name, root=root and str(root), split=candidate)
            except ValueError as error:
                is_unknown_split = "split" in str(error)
                if not is_unknown_split or candidate == candidates[-1]:
                    raise
    except ImportError as error:
        package = PACKAGES[name.partition("/")[0].lower()]
        raise ValueError(f"{name!r} needs the package {package} ({error}); pip install {package}") from error
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"{name!r} is not in {str(root)!r} ({_first_line(error)}); download it there first, or correct data_dir "
            "(--data-dir)"
        ) from error
    except AssertionError as error:
        raise ValueError(
            f"timm has no data set {name!r} ({_first_line(error)}); see timm.data.create_dataset for the names"
        ) from error


def _split_names(name: str, root: Path | None, split: str) -> tuple[str, ...]:
    """Return the split names to try with timm.

    For torchvision's image folder it is the name of the split's folder: timm reads the whole root if that is missing.
    """
    if root is None or name.lower() not in ("torch/image_folder", "torch/folder"):
        return SPLITS[split] if name.lower().startswith("hfds/") else SPLITS[split][:1]
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {str(root)!r} does not exist; give a folder with train/ and val/")
    folder = find_split(root, split)
    if folder is None:
        raise missing_split(root, split)
    return (folder.name,)


def _from_torchvision(name: str, root: Path | None, raw: dict, split: str, decode: bool) -> ImageDataset:
    """Convert torchvision's arrays (CIFAR, MNIST) or lists of files (ImageNet, image folders, Places365)."""
    data = raw[split]
    names = [_class_name(entry) for entry in raw["train"].classes]
    if hasattr(data, "data"):
        targets = np.asarray(data.targets)
        return ImageDataset(np.asarray(data.data), targets if targets.ndim == 1 else targets[:, 0], names, name=name)

    files = {part: _listed_files(source, name) for part, source in raw.items()}
    paths, targets = zip(*files[split], strict=True)
    listed = {part: [Path(path) for path, _ in pairs] for part, pairs in files.items()}
    known = survey_splits(root or Path(data.root), listed, split, decode)
    return ImageDataset(paths, targets, names, name=name, root=data.root, **known)


def _listed_files(source, name: str) -> list[tuple[str, int]]:
    """Return the paths and labels of torchvision's data set; its attribute has one of two names."""
    files = getattr(source, "samples", None) or getattr(source, "imgs", None)
    if not files:
        raise ValueError(
            f"{name!r} has neither an array of images nor a list of files; expected one of them; save it as an image "
            "folder with train/ and val/ instead"
        )
    return files


def _class_name(entry: str | tuple[str, ...]) -> str:
    """Return the name of a class, with ImageNet's synonyms joined."""
    return entry if isinstance(entry, str) else ", ".join(entry)


def _from_reader(name: str, raw: dict, split: str) -> ReaderDataset:
    readers = {part: data.reader for part, data in raw.items()}
    train = readers["train"]
    names = _class_names(train)
    targets = np.fromiter(readers[split].iter_targets(), np.int64, len(readers[split]))

    # Reading all images would be slow, so the number of channels is that of a sample of the training set.
    probed = range(0, len(train), max(1, len(train) // NUM_PROBED))
    channels = grey_or_rgb(_mode(train[i][0]) for i in probed)
    return ReaderDataset(readers[split], targets, names, name=name, channels=channels)


def _class_names(reader) -> list[str]:
    """Return the class names of the data set, or "0", "1", ... if it has none."""
    if reader.class_to_idx:
        return sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    return [str(label) for label in range(max(reader.iter_targets(), default=-1) + 1)]


def _mode(file) -> str:
    with Image.open(file) as image:
        return image.mode


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
