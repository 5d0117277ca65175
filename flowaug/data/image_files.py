"""Image files: which there are, whether they decode, and their pixels as 8-bit grey or RGB."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")


def check_readable(paths: Sequence[Path], decode: bool = True) -> list[str]:
    """Open every file, decode it to its end if ``decode``, and return the images' PIL modes.

    Raises:
        ValueError: some files are no images or are truncated; names the first and counts the rest.
    """
    probes = list(parallel_map(lambda path: _probe(path, decode), paths, "checking images"))
    bad = [(path, fault) for path, (_, fault) in zip(paths, probes, strict=True) if fault]
    if bad:
        raise ValueError(
            f"{bad[0][0]} cannot be read as an image ({bad[0][1]}); {len(bad)} of {len(paths)} files are "
            "bad. Every image must decode to its end: delete or replace the bad files and run again"
        )
    return [mode for mode, _ in probes]


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


def parallel_map(
    function: Callable, items: Sequence, description: str, unit: str = " images", chunksize: int = 16
) -> Iterator:
    """``map(function, items)`` in threads, in order, with a progress bar from the third second on."""
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        results = pool.imap(function, items, chunksize)
        yield from tqdm(results, description, len(items), leave=False, delay=2, unit=unit)


def describe_error(error: Exception) -> str:
    """One line on what went wrong."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


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
        return "", describe_error(error)
