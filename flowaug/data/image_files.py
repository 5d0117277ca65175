"""Image files: checks that they decode, and conversion to 8-bit greyscale or RGB."""

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
    """Open image files and return their PIL modes.

    Args:
        paths: the files.
        decode: also decode all pixels, which finds truncated files; otherwise only the headers are read.

    Raises:
        ValueError: some files are truncated or are not images; the message names the first and counts them.
    """
    probes = list(parallel_map(lambda path: _probe(path, decode), paths, "checking images"))
    bad = [(path, fault) for path, (_, fault) in zip(paths, probes, strict=True) if fault]
    if bad:
        raise ValueError(
            f"{bad[0][0]} cannot be read as an image ({bad[0][1]}); {len(bad)} of {len(paths)} files are "
            "bad. Every image must decode completely: delete or replace the bad files and run again"
        )
    return [mode for mode, _ in probes]


def grey_or_rgb(modes: Iterable[str]) -> int:
    """Return the number of channels for images of these PIL modes: 1 if all are greyscale, else 3."""
    return 1 if all(mode in GREY_MODES for mode in modes) else 3


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to mode "L" or "RGB" and drop transparency."""
    if image.mode.startswith("I"):  # 16-bit greyscale: PIL's own conversion would clip it to 0..255
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    if image.mode == "P":  # PIL warns when a palette with transparency is converted directly
        image = image.convert("RGBA")
    return image.convert(mode)


def parallel_map(
    function: Callable, items: Sequence, description: str, unit: str = " images", chunksize: int = 16
) -> Iterator:
    """Apply a function to items in threads, and yield the results in order.

    A progress bar appears after 2 seconds.

    Args:
        function: called with one item.
        items: the arguments.
        description: label of the progress bar.
        unit: unit of the progress bar.
        chunksize: number of items that a thread takes at a time.
    """
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        results = pool.imap(function, items, chunksize)
        yield from tqdm(results, description, len(items), leave=False, delay=2, unit=unit)


def describe_error(error: Exception) -> str:
    """Return the type and the first line of the message of an exception."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _probe(path: Path, decode: bool) -> tuple[str, str | None]:
    """Return the PIL mode of a file and a description of its error (None if there is none)."""
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                return image.mode, "float pixels have no known range; save it with 8 or 16 bits"
            if decode:
                image.load()
            return image.mode, None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        return "", describe_error(error)
