"""What is known of the image files of a folder: each file is opened once, and the next start reads a cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from flowaug.data.image_files import parallel_map, probe, raise_faults
from flowaug.files import cache_folder, write_atomic

FACTS = np.dtype(
    [("bytes", "i8"), ("mtime", "i8"), ("mode", "S8"), ("height", "i4"), ("width", "i4"), ("decoded", "?")]
)


class FolderSurvey:
    """PIL modes, sizes and faults of the image files of a folder.

    The facts on good files are cached in ``cache_folder()`` until the size or the modification time of a file changes.
    Bad files are not cached. While a process opens files, others that need them wait and then read its cache.

    Args:
        root: folder to which the cache belongs.
        paths: all image files of the folder.

    Attributes:
        facts: array (N,) of dtype ``FACTS``; ``mode`` is empty for files that are not opened yet, or are bad.
    """

    def __init__(self, root: Path, paths: Sequence[Path]):
        self.paths = paths
        prefix = f"{root}{os.sep}"
        self.names = [os.fsencode(os.fspath(path).removeprefix(prefix)) for path in paths]
        key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        self.cache = cache_folder() / "images" / f"{key}.npz"
        self.facts = np.zeros(len(paths), FACTS)
        self.header_faults: dict[int, str] = {}
        self.pixel_faults: dict[int, str] = {}

    def open(self, decode: np.ndarray) -> None:
        """Open the files on which the cache has no facts.

        Args:
            decode: booleans (N,): files that are also decoded; of the others, only the header is read.

        Raises:
            ValueError: some files are not images; the message names the first and counts them.
        """
        with _locked(self.cache):
            facts = self._read_cache()
            unknown = np.flatnonzero((facts["mode"] == b"") | (decode & ~facts["decoded"])).tolist()
            probes = parallel_map(lambda i: probe(self.paths[i], bool(decode[i])), unknown, "checking images")
            for i, found in zip(unknown, probes, strict=True):
                if found.header_fault:
                    self.header_faults[i] = found.header_fault
                    continue
                is_decoded = bool(decode[i]) and found.pixel_fault is None
                if found.pixel_fault:
                    self.pixel_faults[i] = found.pixel_fault
                facts[i] = (*facts[i].item()[:2], found.mode.encode(), *found.size, is_decoded)
            if unknown:
                self._write_cache(facts)
        self.facts = facts
        raise_faults(self.paths, self.header_faults, len(self.paths))

    def modes(self) -> list[str]:
        """Return the different PIL modes of the files."""
        return [mode.decode() for mode in np.unique(self.facts["mode"])]

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width in the header of a file."""
        return int(self.facts["height"][index]), int(self.facts["width"][index])

    def check(self, paths: Sequence[Path]) -> None:
        """Check that some of the files decode completely; those that are decoded already are not opened again.

        Raises:
            ValueError: some files are bad; the message names the first and counts them.
        """
        if self.facts["decoded"].all():
            return
        where = {path: i for i, path in enumerate(self.paths)}
        chosen = np.array([where[path] for path in paths])
        if not all(self.facts["decoded"][i] or i in self.pixel_faults for i in chosen):
            self.open(np.isin(np.arange(len(self.paths)), chosen))
        faults = {int(i): self.pixel_faults[i] for i in chosen.tolist() if i in self.pixel_faults}
        raise_faults(self.paths, faults, len(paths))

    def _read_cache(self) -> np.ndarray:
        """Return the facts on files that have not changed; ``mode`` is empty for the others."""
        facts, now = np.zeros(len(self.paths), FACTS), np.zeros(len(self.paths), FACTS)
        now["bytes"], now["mtime"] = np.array([_size_and_mtime(path) for path in self.paths], "i8").reshape(-1, 2).T
        try:
            with np.load(io.BytesIO(self.cache.read_bytes())) as file:
                names, cached = file["names"].tobytes().split(b"\0"), file["facts"]
        except Exception:  # no cache, or a damaged one: OSError, ValueError, KeyError, BadZipFile, ...
            return now
        if cached.dtype != FACTS or len(names) != len(cached):
            return now
        if names == self.names:
            facts = cached
        else:
            where = {name: i for i, name in enumerate(names)}
            rows = np.array([where.get(name, -1) for name in self.names])
            facts[rows >= 0] = cached[rows[rows >= 0]]
        is_same = (facts["bytes"] == now["bytes"]) & (facts["mtime"] == now["mtime"])
        return np.where(is_same, facts, now)

    def _write_cache(self, facts: np.ndarray) -> None:
        content = io.BytesIO()
        np.savez(content, names=np.frombuffer(b"\0".join(self.names), np.uint8), facts=facts)
        with contextlib.suppress(OSError):  # without a cache, the next start opens the files again
            write_atomic(self.cache, content.getvalue())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds the lock of a cache file; without a lock where the folder does not allow it."""
    lock = FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _size_and_mtime(path: Path) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except OSError:  # opening it will report the cause
        return -1, 0
    return stat.st_size, stat.st_mtime_ns
