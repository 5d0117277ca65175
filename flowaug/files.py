"""File utilities: lists of files, atomic writes, JSON, serialised tensors and markdown tables."""

import contextlib
import glob
import hashlib
import html
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from safetensors.torch import save as save_bytes
from torch import Tensor

BLOCK = 2**20  # bytes read at a time


def cache_folder() -> Path:
    """Return the folder of cached results.

    It is the environment variable FLOWAUG_CACHE, or ``flowaug`` in XDG_CACHE_HOME, or ``~/.cache/flowaug``.
    """
    own, shared = os.environ.get("FLOWAUG_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own or Path(shared or "~/.cache", "flowaug")).expanduser()


def leftovers(path: Path) -> list[Path]:
    """Return the temporary files that killed processes left of writing ``path``."""
    return sorted(path.parent.glob(f".{glob.escape(path.name)}*.tmp"))


def _create_temporary(path: Path) -> tuple[Path, BinaryIO]:
    """Create a file with an unpredictable name next to ``path``; never opens a file or link that is there already."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    return temporary, os.fdopen(handle, "wb")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old or the new content, never a partial file.

    The data goes to a new temporary file in the same folder, which is then renamed. After an error it is removed.

    Args:
        path: target file; missing parent folders are created.
        data: content.

    Raises:
        OSError: if the file cannot be written. The old file is unchanged.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, opened = _create_temporary(path)
        with opened as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"could not write {path} ({error.strerror}); free some space or choose another folder") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # or it would hide the error
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    r"""Write a text as UTF-8, atomically; bytes of names that are not UTF-8 become ``\udc..``, as in JSON."""
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: dict) -> None:
    """Write a dictionary as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def printable(text: object) -> str:
    r"""Return a text that can be drawn; bytes of names that are not UTF-8 become ``\udc..``."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and its subfolders, sorted; symbolic links to folders are followed.

    A link to a folder that contains it is left out, since it has no end. Links to nothing are among the files.
    """
    found: list[Path] = []
    _add_files(folder, frozenset(), found)
    return sorted(found)


def _add_files(folder: Path, above: frozenset[Path], found: list[Path]) -> None:
    place = folder.resolve()
    if place in above:
        return
    with os.scandir(folder) as entries:  # knows the kind of most entries without a system call for each
        for entry in entries:
            path = folder / entry.name
            if entry.is_dir():
                _add_files(path, above | {place}, found)
            elif entry.is_file() or (entry.is_symlink() and not path.exists()):  # neither pipes nor devices
                found.append(path)


def file_digest(path: Path | None) -> str | None:
    """Return the SHA-256 of a file as 64 hex digits; None without a path.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if path is None:
        return None
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def pack(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Serialise tensors in the safetensors format.

    Args:
        tensors: tensors by name, on any device.
        metadata: strings to store in the header.

    Returns:
        The content of a safetensors file.
    """
    return save_bytes({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)


def markdown_text(value: object) -> str:
    r"""Escape text for one line of markdown, such as a title or a cell of a table.

    ``&``, ``<`` and ``>`` become HTML entities; a backslash is put before ``\``, ``|``, ``[`` and ``]``; line breaks
    and control characters become spaces. Backticks stay: code spans have no effect beyond the line.

    Args:
        value: converted with ``str``.
    """
    text = html.escape(" ".join(str(value).splitlines()), quote=False)
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", text)
    return re.sub(r"([\\|\[\]])", r"\\\1", text)


def markdown_table(header: Sequence[str], rows: Iterable[Iterable]) -> str:
    """Format a markdown table.

    Every cell is escaped with ``markdown_text``.

    Args:
        header: column titles.
        rows: cells of each row; converted with ``str``.

    Returns:
        The lines of the table, without a final newline.
    """
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines)
