"""Image files: checks that they decode, and conversion to 8-bit greyscale or RGB."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N")


class Probe(NamedTuple):
    """What opening an image file showed: PIL mode, (height, width), and what is wrong with its header or its pixels."""

    mode: str = ""
    size: tuple[int, int] = (0, 0)
    header_fault: str | None = None
    pixel_fault: str | None = None


def check_readable(paths: Sequence[Path], decode: bool = True) -> list[str]:
    """Open image files and return their PIL modes.

    Args:
        paths: the files.
        decode: also decode all pixels, which finds truncated files; otherwise only the headers are read.

    Raises:
        ValueError: some files are truncated or are not images; the message names the first and counts them.
    """
    probes = list(parallel_map(lambda path: probe(path, decode), paths, "checking images"))
    faults = {i: fault for i, found in enumerate(probes) if (fault := found.header_fault or found.pixel_fault)}
    raise_faults(paths, faults, len(paths))
    return [found.mode for found in probes]


def raise_faults(paths: Sequence[Path], faults: Mapping[int, str], count: int) -> None:
    """Raise an error if there are bad files.

    Args:
        paths: image files.
        faults: ``{index in paths: description}`` of the bad files.
        count: number of files that were checked.

    Raises:
        ValueError: there is a fault; the message names the first bad file and counts them.
    """
    if faults:
        first = min(faults)
        raise ValueError(
            f"{paths[first]} cannot be read as an image ({faults[first]}); {len(faults)} of {count} files are "
            "bad. Every image must decode completely: delete or replace the bad files and run again"
        )


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


def probe(path: Path, decode: bool) -> Probe:
    """Open an image file, and decode it too if ``decode`` is true."""
    found = Probe()
    try:
        with Image.open(path) as image:
            found = Probe(image.mode, (image.height, image.width))
            if image.mode == "F":
                return found._replace(header_fault="float pixels have no known range; save it with 8 or 16 bits")
            if decode:
                image.load()
            return found
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        is_header = found.mode == ""
        return found._replace(**{"header_fault" if is_header else "pixel_fault": describe_error(error)})
