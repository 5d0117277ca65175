"""Class maps: the labels of classes by name, read from a file or taken from the data."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowaug.data.image_files import IMAGE_SUFFIXES
from flowaug.data.images import ImageDataset


@dataclass(frozen=True)
class ClassMap:
    """Labels of the class names of a data set (folder names, synsets, or numbers as text).

    Attributes:
        table: ``{name: label}``; several names may have the same label.
        names: one name per class, in the order of the labels 0 .. K - 1.
        origin: description of the map in messages.
    """

    table: dict[str, int]
    names: tuple[str, ...]
    origin: str

    @classmethod
    def identity_map(cls, num_classes: int) -> ClassMap:
        """Return the map of ``num_classes`` classes whose names are their labels: "0", "1", ...

        Raises:
            ValueError: ``num_classes`` is less than 1.
        """
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected at least 1")
        return cls.from_names([str(label) for label in range(num_classes)], f"num_classes={num_classes}")

    @classmethod
    def from_names(cls, names: Sequence[str], origin: str = "the data") -> ClassMap:
        """Return the map that gives the classes the labels 0, 1, ... in the given order."""
        return cls({name: label for label, name in enumerate(names)}, tuple(names), origin)

    def label(self, name: str) -> int | None:
        """Return the label of a class name, or None if the map does not contain it.

        A number in 0 .. K - 1 is its own label, unless the map contains names that are numbers.
        """
        if name in self.table or not name.isdecimal() or any(key.isdecimal() for key in self.table):
            return self.table.get(name)
        return int(name) if int(name) < len(self.names) else None

    def labels(self, names: Iterable[str]) -> np.ndarray:
        """Return the labels of class names as an int64 array.

        Raises:
            ValueError: some names are not in the map; the message gives the first and counts them.
        """
        found = {name: self.label(name) for name in names}
        missing = [name for name, label in found.items() if label is None]
        if missing:
            raise ValueError(
                f"class {missing[0]!r} of the data is not in {self.origin} ({len(missing)} of {len(found)} classes are "
                f"missing), which has {len(self.names)} classes: {', '.join(list(self.table)[:4])}, ...; correct the "
                "class map or the data"
            )
        return np.array(list(found.values()), dtype=np.int64)

    def check_count(self, num_classes: int | None) -> None:
        """Raise a ValueError unless there are ``num_classes`` classes; None accepts any number."""
        if num_classes not in (None, len(self.names)):
            raise ValueError(
                f"num_classes is {num_classes} but {self.origin} has {len(self.names)} classes "
                f"({', '.join(self.names[:4])}, ...); correct one of them"
            )


def read_class_map(path: str | Path) -> ClassMap:
    """Read a class map from a JSON file.

    Labels must be 0 .. K - 1 without gaps. If several names have the same label, the first one names the class.

    Args:
        path: JSON file with ``{"name": label, ...}`` or ``["name of class 0", "name of class 1", ...]``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not JSON, has another structure, or its labels have gaps.
    """
    origin = f"the class map {str(path)!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f'{origin} does not exist; give a JSON file such as {{"ant": 0, "bee": 1}}')
    table = _parse_class_map(_read_json(path, origin), origin)

    names: dict[int, str] = {}
    for name, label in table.items():
        names.setdefault(label, name)
    gap = next((label for label in range(len(names)) if label not in names), None)
    if gap is not None or not names:
        raise ValueError(f"{origin} has no class {gap or 0}; labels must run from 0 to K - 1 without gaps")
    return ClassMap(table, tuple(names[label] for label in range(len(names))), origin)


def relabel(data: ImageDataset, classes: ClassMap, split: str) -> ImageDataset:
    """Return a copy of a data set with the labels and class names of a class map; the images are shared.

    Args:
        data: the data set.
        classes: the class map.
        split: "train" or "val"; in "train", every class needs at least 2 images.

    Raises:
        ValueError: a class of the data is not in the map, or a class of the map has too few training images.
    """
    part = copy.copy(data)
    part.targets = classes.labels(data.class_names)[data.targets]
    part.class_names = classes.names
    if split == "train":
        sizes = np.bincount(part.targets, minlength=len(classes.names)).tolist()
        check_class_counts(dict(zip(classes.names, sizes, strict=True)), 2, f"{data.name} after relabeling")
    return part


def _read_json(path: str | Path, origin: str):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{origin} is not JSON ({error}); correct or replace it") from error


def _parse_class_map(content, origin: str) -> dict[str, int]:
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        if len(set(content)) < len(content):
            raise ValueError(
                f"{origin} lists a name twice; if several names have the same label, give {{name: label}} instead"
            )
        return {name: label for label, name in enumerate(content)}
    if isinstance(content, dict) and all(type(label) is int and label >= 0 for label in content.values()):
        return content
    raise ValueError(
        f'{origin} is neither a list of names nor {{"name": label}} with labels 0, 1, 2, ...; correct or replace it'
    )


def check_class_counts(counts: dict[str, int], minimum: int, where: str) -> None:
    """Check that every class has enough images.

    Args:
        counts: number of images by class name.
        minimum: required number: 2 for training, because mixup needs a partner, or 1 for validation.
        where: description of the data in the message.

    Raises:
        ValueError: a class has fewer than ``minimum`` images; the message names the first such class.
    """
    for name, count in counts.items():
        if count < minimum:
            found = "no image" if count == 0 else f"only {count} image" + "s" * (count > 1)
            need = "2 images per class to mix" if minimum == 2 else f"{minimum} image per class"
            raise ValueError(
                f"class {name!r} has {found} in {where}; flowaug needs at least {need}. Add images "
                f"(files ending in {', '.join(IMAGE_SUFFIXES[:3])}, ...) or remove the class everywhere"
            )
