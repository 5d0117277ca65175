"""timm's data sets by name: torch/NAME (torchvision) and hfds/NAME (Hugging Face)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timm.data import create_dataset

from flowaug.data.image_files import check_readable, describe_error, grey_or_rgb, parallel_map
from flowaug.data.image_folder import find_split, missing_split
from flowaug.data.images import ImageDataset

PREFIXES = ("torch", "hfds", "tfds", "hfids")
PACKAGES = {"torch": "torchvision", "hfds": "datasets", "tfds": "tensorflow-datasets", "hfids": "datasets"}
SPLITS = {"train": ("train",), "val": ("validation", "val", "test")}
PROBED = 256


class ReaderDataset(ImageDataset):
    """Images behind a timm reader that can be indexed: a Hugging Face table.

    Args:
        reader: ``reader[i]`` is an open image file and its label.
        targets: labels (N,).
        class_names: the name of each class.
        name: what messages and file names call this data set.
        channels: 1 or 3.
    """

    def __init__(self, reader, targets: np.ndarray, class_names: Sequence[str], *, name: str, channels: int):
        self.reader = reader
        super().__init__(range(len(targets)), targets, class_names, name=name, channels=channels)

    def open(self, index: int) -> Image.Image:
        """The image file, not decoded yet."""
        return Image.open(self.reader[self.images[index]][0])

    def check(self) -> None:
        """Decode every image to its end.

        Raises:
            ValueError: some do not; names the first and counts the rest.
        """
        faults = parallel_map(self._fault, range(len(self)), "checking images")
        bad = [(index, fault) for index, fault in enumerate(faults) if fault]
        if bad:
            raise ValueError(
                f"image {bad[0][0]} of {self.name} cannot be read ({bad[0][1]}); {len(bad)} of {len(self)} images are "
                "bad. Every image must decode to its end: filter the data set, or download it again"
            )

    def fingerprint(self) -> str:
        """16 hex digits that change with the class names, the labels and what Hugging Face says of the table."""
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


def is_timm(dataset: str | None) -> bool:
    """Whether a name is one of timm's: torch/…, hfds/…, tfds/…, hfids/…."""
    return dataset is not None and "/" in dataset and dataset.partition("/")[0].lower() in PREFIXES


def open_timm(name: str, root: Path | None, split: str) -> ImageDataset:
    """One split of a data set by its name in timm.

    Args:
        name: "torch/cifar10", "torch/image_folder", "hfds/owner/name", ...
        root: where torchvision's files lie or Hugging Face keeps its own.
        split: "train" or "val" (of Hugging Face the first of validation, val and test that there is).

    Raises:
        ValueError: timm does not know it, its package is not installed, or it cannot be indexed.
        FileNotFoundError: its files are not there.
    """
    prefix = name.partition("/")[0].lower()
    if prefix in ("tfds", "hfids"):
        raise ValueError(
            f"{name!r} is a stream without places, which cannot be resumed or shared out exactly; use the same data as "
            "hfds/…, torch/…, an image folder, or shards (wds/)"
        )
    if prefix == "torch" and root is None:
        raise ValueError(f"dataset {name!r} needs data_dir (--data-dir): the folder that holds torchvision's files")
    if prefix == "hfds":
        return _from_reader(name, {part: _create(name, root, part) for part in {"train", split}}, split)
    return _from_torchvision(name, {part: _create(name, root, part) for part in SPLITS}, split)


def _create(name: str, root: Path | None, split: str):
    """What timm makes of the name; its exceptions as sentences."""
    words = _split_words(name, root, split)
    try:
        for word in words:
            try:
                return create_dataset(name, root=root and str(root), split=word)
            except ValueError as error:
                if "split" not in str(error) or word == words[-1]:
                    raise
    except ImportError as error:
        package = PACKAGES[name.partition("/")[0].lower()]
        raise ValueError(f"{name!r} needs the package {package} ({error}); pip install {package}") from error
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"{name!r} is not in {str(root)!r} ({_line(error)}); download it there first, or correct --data-dir"
        ) from error
    except AssertionError as error:
        raise ValueError(f"timm has no data set {name!r} ({_line(error)}); see timm.data.create_dataset") from error


def _split_words(name: str, root: Path | None, split: str) -> tuple[str, ...]:
    """The names under which to ask for a split; torchvision's image folder would take the root for lack of one."""
    if name.lower() not in ("torch/image_folder", "torch/folder"):
        return SPLITS[split] if name.lower().startswith("hfds/") else SPLITS[split][:1]
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {str(root)!r} is not there; give a folder with train/ and val/")
    folder = find_split(root, split)
    if folder is None:
        raise missing_split(root, split)
    return (folder.name,)


def _from_torchvision(name: str, raw: dict, split: str) -> ImageDataset:
    """Arrays (CIFAR, MNIST) or lists of files (ImageNet, image folders, Places365)."""
    data, names = raw[split], [_class_name(entry) for entry in raw["train"].classes]
    if hasattr(data, "data"):
        targets = np.asarray(data.targets)
        return ImageDataset(np.asarray(data.data), targets if targets.ndim == 1 else targets[:, 0], names, name=name)
    files = {part: getattr(source, "samples", None) or getattr(source, "imgs", None) for part, source in raw.items()}
    if not all(files.values()):
        raise ValueError(f"{name!r} holds neither arrays nor a list of files; arrange it as train/ and val/ folders")
    paths, targets = zip(*files[split], strict=True)
    modes = check_readable([Path(path) for part in files.values() for path, _ in part], decode=False)
    return ImageDataset(paths, targets, names, name=name, channels=grey_or_rgb(modes), root=data.root)


def _class_name(entry: str | tuple[str, ...]) -> str:
    return entry if isinstance(entry, str) else ", ".join(entry)


def _from_reader(name: str, raw: dict, split: str) -> ReaderDataset:
    readers = {part: data.reader for part, data in raw.items()}
    names = _class_names(readers["train"])
    targets = np.fromiter(readers[split].iter_targets(), np.int64, len(readers[split]))
    train = readers["train"]
    some = range(0, len(train), max(1, len(train) // PROBED))
    channels = grey_or_rgb(_mode(train[i][0]) for i in some)
    return ReaderDataset(readers[split], targets, names, name=name, channels=channels)


def _class_names(reader) -> list[str]:
    """By the table's own names of its classes, or else by number."""
    if reader.class_to_idx:
        return sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    return [str(label) for label in range(max(reader.iter_targets(), default=-1) + 1)]


def _mode(file) -> str:
    with Image.open(file) as image:
        return image.mode


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]
