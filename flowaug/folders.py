"""Image files: which there are, whether they decode, and their pixels as 8-bit grey or RGB."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "validation", "test")}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")


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


def check_readable(paths: Sequence[Path], decode: bool = True) -> list[str]:
    """Open every file, decode it to its end if ``decode``, and return the images' PIL modes.

    Raises:
        ValueError: some files are no images or are truncated; names the first and counts the rest.
    """
    probes = list(parallel(lambda path: _probe(path, decode), paths, "checking images"))
    bad = [(path, fault) for path, (_, fault) in zip(paths, probes, strict=True) if fault]
    if bad:
        raise ValueError(
            f"{bad[0][0]} cannot be read as an image ({bad[0][1]}); {len(bad)} of {len(paths)} files are "
            "bad. Every image must decode to its end: delete or replace the bad files and run again"
        )
    return [mode for mode, _ in probes]


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


def grey_or_rgb(modes: Iterable[str]) -> int:
    """Number of channels that holds images of these PIL modes: 1 if all are grey, else 3."""
    return 1 if all(mode in GREY_MODES for mode in modes) else 3


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert to "L" or "RGB": 16-bit grey is scaled (PIL would clip it), transparency is dropped."""
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode == "P":  # a palette with transparency warns unless it goes by way of RGBA
        image = image.convert("RGBA")
    return image.convert(mode)


def parallel(
    function: Callable, items: Sequence, description: str, unit: str = " images", chunksize: int = 16
) -> Iterator:
    """``map(function, items)`` in threads, in order, with a progress bar from the third second on."""
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        results = pool.imap(function, items, chunksize)
        yield from tqdm(results, description, len(items), leave=False, delay=2, unit=unit)


def describe(error: Exception) -> str:
    """One line on what went wrong."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


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


def _probe(path: Path, decode: bool) -> tuple[str, str | None]:
    """The PIL mode of a file and what is wrong with it (None: nothing)."""
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                return image.mode, "float pixels have no known range; save it with 8 or 16 bits"
            if decode:
                image.load()
            return image.mode, None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return "", describe(error)
