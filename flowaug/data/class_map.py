"""Which label a class has: class maps and declared numbers of classes."""

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
    """The label of each name that a data set gives its classes (folder, synset, class name, or number as text).

    Attributes:
        table: {name: label}; several names may share a label.
        names: the name of each class, in the order of the labels 0 .. K - 1.
        origin: what messages call the map.
    """

    table: dict[str, int]
    names: tuple[str, ...]
    origin: str

    def label(self, name: str) -> int | None:
        """The label of a class, or None; a number is its own label unless the map's names are numbers too."""
        if name in self.table or not name.isdecimal() or any(key.isdecimal() for key in self.table):
            return self.table.get(name)
        return int(name) if int(name) < len(self.names) else None

    def labels(self, names: Iterable[str]) -> np.ndarray:
        """The labels (K',) of the classes of a data set.

        Raises:
            ValueError: some have none; names the first and counts the rest.
        """
        found = {name: self.label(name) for name in names}
        lost = [name for name, label in found.items() if label is None]
        if lost:
            raise ValueError(
                f"class {lost[0]!r} of the data is not in {self.origin} ({len(lost)} of {len(found)} such); it has "
                f"{len(self.names)} classes: {', '.join(list(self.table)[:4])}, ...; correct it or the data"
            )
        return np.array(list(found.values()), dtype=np.int64)

    def check_count(self, num_classes: int | None) -> None:
        """Raise a ValueError unless there are ``num_classes`` classes (None: any number)."""
        if num_classes not in (None, len(self.names)):
            raise ValueError(
                f"num_classes is {num_classes} but {self.origin} has {len(self.names)} classes "
                f"({', '.join(self.names[:4])}, ...); correct one of them"
            )


def numbered(num_classes: int) -> ClassMap:
    """The map of classes whose names are their labels."""
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected at least 1")
    return as_found([str(label) for label in range(num_classes)], f"num_classes={num_classes}")


def as_found(names: Sequence[str], origin: str = "the data") -> ClassMap:
    """The map that leaves classes in their order."""
    return ClassMap({name: label for label, name in enumerate(names)}, tuple(names), origin)


def read_class_map(path: str | Path) -> ClassMap:
    """Read ``{"name": label, ...}`` or ``["name of class 0", ...]`` from a JSON file.

    A class takes the first of its names. Labels must run from 0 without gaps.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file.
    """
    origin = f"the class map {str(path)!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f'{origin} is not there; give a JSON file such as {{"ant": 0, "bee": 1}}')
    table = _as_table(_read_json(path, origin), origin)
    names: dict[int, str] = {}
    for name, label in table.items():
        names.setdefault(label, name)
    gap = next((label for label in range(len(names)) if label not in names), None)
    if gap is not None or not names:
        raise ValueError(f"{origin} has no class {gap or 0}; labels must run from 0 to K - 1 without gaps")
    return ClassMap(table, tuple(names[label] for label in range(len(names))), origin)


def relabel(data: ImageDataset, classes: ClassMap, split: str) -> ImageDataset:
    """The data set under the labels and names of a map; every class must have images to train on.

    Raises:
        ValueError: the map lacks a class of the data, or a class of the map has too few training images.
    """
    part = copy.copy(data)
    part.targets = classes.labels(data.class_names)[data.targets]
    part.class_names = classes.names
    if split == "train":
        sizes = np.bincount(part.targets, minlength=len(classes.names)).tolist()
        check_class_counts(dict(zip(classes.names, sizes, strict=True)), 2, f"the {data.name} under its labels")
    return part


def _read_json(path: str | Path, origin: str):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{origin} is not JSON ({error}); correct or replace it") from error


def _as_table(content, origin: str) -> dict[str, int]:
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        if len(set(content)) < len(content):
            raise ValueError(f"{origin} lists a name twice; give {{name: label}} where names share a label")
        return {name: label for label, name in enumerate(content)}
    if isinstance(content, dict) and all(type(label) is int and label >= 0 for label in content.values()):
        return content
    raise ValueError(f'{origin} is neither a list of names nor {{"name": label}} with labels 0, 1, 2, ...')


def check_class_counts(counts: dict[str, int], minimum: int, where: str) -> None:
    """Refuse classes with fewer than ``minimum`` images.

    Raises:
        ValueError: names the first such class, how many images it has and how many it needs.
    """
    for name, count in counts.items():
        if count < minimum:
            found = "no image" if count == 0 else f"only {count} image" + "s" * (count > 1)
            need = "2 images per class to mix" if minimum == 2 else f"{minimum} image per class"
            raise ValueError(
                f"class {name!r} has {found} in {where}; flowaug needs at least {need}. Add images "
                f"(files ending in {', '.join(IMAGE_SUFFIXES[:3])}, ...) or remove the class everywhere"
            )
