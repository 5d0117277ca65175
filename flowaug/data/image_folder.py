"""Image folders: train/ and val/ with one folder of images per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowaug.data.class_map import check_class_counts
from flowaug.data.image_files import IMAGE_SUFFIXES, check_readable, grey_or_rgb
from flowaug.data.images import ImageDataset

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "test")}


def scan_folder(root: Path) -> dict[str, dict[str, list[Path]]]:
    """List the image files of ``root`` as ``{"train": {class name: paths}, "val": ...}``, everything sorted.

    Raises:
        FileNotFoundError: ``root`` or its ``train/`` is not there.
        ValueError: no class folders, or the classes of train and val differ.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {str(root)!r} is not there; give a folder with train/ and val/")
    found = {split: find_split(root, split) for split in SPLIT_FOLDERS}
    if found["train"] is None:
        raise missing_split(root, "train")
    classes = {split: _scan_classes(folder) for split, folder in found.items() if folder}
    if "val" in classes:
        _check_same_classes(list(classes["train"]), list(classes["val"]), found["val"])
    return classes


def find_split(root: Path, split: str) -> Path | None:
    """The folder that holds ``split``, under any of its accepted names."""
    return next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), None)


def missing_split(root: Path, split: str) -> FileNotFoundError:
    """The error that says which folder was expected and what is there instead."""
    here = sorted(p.name for p in root.iterdir() if p.is_dir())
    names = " or ".join(f"{name}/" for name in SPLIT_FOLDERS[split])
    return FileNotFoundError(
        f"{str(root)!r} has no {names}; expected train/ and val/, each with one folder per class, "
        f"but the folders there are: {', '.join(here[:5]) or 'none'}{', ...' * (len(here) > 5)}"
    )


def _scan_classes(folder: Path) -> dict[str, list[Path]]:
    """``{class name: image paths}`` of one split; hidden files and other suffixes do not count."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(f"{str(folder)!r} has no class folders; expected one folder of images per class")
    return {name: sorted(p for p in (folder / name).rglob("*") if _is_image(p)) for name in names}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _check_same_classes(train: list[str], val: list[str], folder: Path) -> None:
    differ = sorted(set(train) ^ set(val))
    if differ:
        has, lacks = ("train", folder.name) if differ[0] in train else (folder.name, "train")
        raise ValueError(
            f"the classes of train/ and {folder.name}/ differ: {differ[0]!r} is in {has}/ but not in "
            f"{lacks}/ ({len(differ)} such, {len(train)} classes in train/, {len(val)} in {folder.name}/); "
            f"both need the same class folders: add or remove them in {str(folder.parent)!r}"
        )


def load_folder(root: Path, split: str) -> ImageDataset:
    """One split of an image folder; grey only if every image of train and val is, so that both agree."""
    splits = scan_folder(root)
    if split not in splits:
        raise missing_split(root, split)
    classes, where = splits[split], str(find_split(root, split))
    counts = {name: len(paths) for name, paths in classes.items()}
    check_class_counts(counts, 2 if split == "train" else 1, where)
    everything = [path for table in splits.values() for paths in table.values() for path in paths]
    channels = grey_or_rgb(check_readable(everything, decode=False))
    images = [path for paths in classes.values() for path in paths]
    targets = np.repeat(np.arange(len(classes)), list(counts.values()))
    return ImageDataset(images, targets, classes, name=root.resolve().name, channels=channels, root=root)
