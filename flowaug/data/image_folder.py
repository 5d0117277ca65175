"""Image folders: ``train/`` and ``val/``, each with one folder of images per class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowaug.data.class_map import check_class_counts
from flowaug.data.image_files import IMAGE_SUFFIXES, grey_or_rgb
from flowaug.data.images import ImageDataset
from flowaug.data.survey import FolderSurvey
from flowaug.files import files_below

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "test")}


def scan_folder(root: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the image files of a folder as ``{"train": {class name: paths}, "val": ...}``, sorted by name.

    ``"val"`` is missing if the folder has no validation split.

    Raises:
        FileNotFoundError: ``root`` or its ``train/`` does not exist.
        ValueError: there are no class folders, or the classes of ``train/`` and ``val/`` differ.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {str(root)!r} does not exist; give a folder with train/ and val/")
    train, val = find_split(root, "train"), find_split(root, "val")
    if train is None:
        raise missing_split(root, "train")
    classes = {"train": _scan_classes(train)}
    if val is not None:
        classes["val"] = _scan_classes(val)
        _check_same_classes(list(classes["train"]), list(classes["val"]), val)
    return classes


def find_split(root: Path, split: str) -> Path | None:
    """Return the folder of a split under any of its accepted names, or None."""
    return next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), None)


def missing_split(root: Path, split: str) -> FileNotFoundError:
    """Return an error that says which folder was expected and which folders exist."""
    here = sorted(p.name for p in root.iterdir() if p.is_dir())
    names = " or ".join(f"{name}/" for name in SPLIT_FOLDERS[split])
    return FileNotFoundError(
        f"{str(root)!r} has no {names}; expected train/ and val/, each with one folder per class, "
        f"but the folders in it are: {', '.join(here[:5]) or 'none'}{', ...' * (len(here) > 5)}"
    )


def _scan_classes(folder: Path) -> dict[str, list[Path]]:
    """Return ``{class name: image paths}`` of one split, without hidden files and other suffixes."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(f"{str(folder)!r} has no class folders; expected one folder of images per class")
    return {name: [p for p in files_below(folder / name) if _is_image(p)] for name in names}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _check_same_classes(train: list[str], val: list[str], folder: Path) -> None:
    differ = sorted(set(train) ^ set(val))
    if differ:
        present, absent = ("train", folder.name) if differ[0] in train else (folder.name, "train")
        raise ValueError(
            f"the classes of train/ and {folder.name}/ differ: {differ[0]!r} is in {present}/ but not in {absent}/ "
            f"({len(differ)} such classes; train/ has {len(train)} classes, {folder.name}/ has {len(val)}); expected "
            f"the same class folders in both: add or remove folders in {str(folder.parent)!r}"
        )


def load_folder(root: Path, split: str, decode: bool = False) -> ImageDataset:
    """Open one split of an image folder.

    The images have 1 channel if those of ``train/`` and ``val/`` are all greyscale, else 3, so that both splits agree.

    Args:
        root: folder with ``train/`` and ``val/``.
        split: "train" or "val".
        decode: whether the next step is ``ImageDataset.check``: all files of the split are decoded at once. With the
            training images, those of validation are decoded too.

    Raises:
        FileNotFoundError: the folder or the split does not exist.
        ValueError: the classes of the splits differ, a class has too few images, or a file is not an image.
    """
    splits = scan_folder(root)
    if split not in splits:
        raise missing_split(root, split)

    classes = splits[split]
    counts = {name: len(paths) for name, paths in classes.items()}
    check_class_counts(counts, 2 if split == "train" else 1, str(find_split(root, split)))

    images = [path for paths in classes.values() for path in paths]
    targets = np.repeat(np.arange(len(classes)), list(counts.values()))
    files = {name: [p for paths in by_class.values() for p in paths] for name, by_class in splits.items()}
    known = survey_splits(root, files, split, decode)
    return ImageDataset(images, targets, list(classes), name=root.resolve().name, root=root, **known)


def survey_splits(root: Path, files: Mapping[str, Sequence[Path]], split: str, decode: bool) -> dict[str, Any]:
    """Open all image files of a data set once, and return arguments of ``ImageDataset`` for one split.

    Args:
        root: folder of the data set.
        files: image files of the splits, "train" first.
        split: "train" or "val".
        decode: decode the files of the split, see ``load_folder``.

    Raises:
        ValueError: a file is not an image.
    """
    survey = FolderSurvey(root, [path for paths in files.values() for path in paths])
    decoded = {"train": tuple(files), "val": ("val",)}[split] if decode else ()
    survey.open(np.repeat([name in decoded for name in files], [len(paths) for paths in files.values()]))
    first = 0 if split == "train" else len(files["train"])
    return {"channels": grey_or_rgb(survey.modes()), "image_size": survey.size(first), "survey": survey}
