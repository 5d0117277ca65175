"""What webdataset shards hold: their samples one by one, and a count of them; nothing is unpickled."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from webdataset.tariterators import base_plus_ext

from flowaug.data.image_files import describe_error, parallel_map, to_mode
from flowaug.data.wds.index import ShardSet
from flowaug.files import write_json

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
LABEL_KEYS = ("cls", "json", "txt")
LABEL_FIELDS = ("label", "cls", "class", "target")  # of a json file, in this order
DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError)  # what a broken archive raises
BLOCK = 512


@dataclass(frozen=True)
class Sample:
    """The files of one sample: those of one key that stand together in a shard."""

    shard: Path
    key: str
    files: dict[str, bytes]

    @property
    def name(self) -> str:
        """Shard and key."""
        return f"{self.shard}:{self.key}"

    def label_name(self, field: str | None = None) -> str:
        """What the label file says: a number or a class name, as text.

        Raises:
            ValueError: there is no label file, or it holds neither.
        """
        suffix = next((key for key in LABEL_KEYS if key in self.files), None)
        if suffix is None:
            raise ValueError(f"no label: none of {', '.join(LABEL_KEYS)}")
        text = self.files[suffix].decode("utf-8").strip()
        text = _json_label(text, field) if suffix == "json" else text
        if not text:
            raise ValueError(f"its .{suffix} is empty")
        if text.startswith("-") and text[1:].isdecimal():
            raise ValueError(f"label {text}: negative numbers stand for no label")
        return str(int(text)) if text.isdecimal() else text

    def image(self, mode: str) -> Image.Image:
        """The image, decoded to its end, in mode "L" or "RGB".

        Raises:
            ValueError: there is no image file.
            Exception: whatever the decoder raises at a bad one.
        """
        with Image.open(io.BytesIO(self.files[self.image_key()])) as image:
            return to_mode(image, mode)

    @property
    def mode(self) -> str | None:
        """PIL's mode by the header of the image; None if that cannot be read."""
        try:
            with Image.open(io.BytesIO(self.files[self.image_key()])) as image:
                return image.mode
        except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            return None

    def image_key(self) -> str:
        """The suffix of the image file."""
        suffix = next((key for key in IMAGE_KEYS if key in self.files), None)
        if suffix is None:
            raise ValueError(f"no image: none of {', '.join(IMAGE_KEYS)}")
        return suffix


@dataclass(frozen=True)
class Census:
    """What a pass over the headers of a split found.

    Attributes:
        count: samples that have an image and a label.
        labels: {label as written: samples}.
        faults: {shard, or shard:key: what is wrong with it}.
    """

    count: int
    labels: dict[str, int]
    faults: dict[str, str]


def read_shard(path: Path, pixels: bool = True) -> Iterator[Sample]:
    """The samples of a shard in order; one that damage cuts off, or may have cut off, is not among them.

    Args:
        path: an uncompressed .tar file.
        pixels: read the image files too; otherwise their bytes are passed over.

    Raises:
        tarfile.TarError, OSError, EOFError, ValueError: the archive is damaged from here on (`DAMAGE`).
    """
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for key, group in itertools.groupby(_members(tar), lambda member: member[0]):
            wanted = (m for m in group if m[1] in (*IMAGE_KEYS, *LABEL_KEYS))
            yield Sample(
                path, key, {s: tar.extractfile(m).read() if pixels or s in LABEL_KEYS else b"" for _, s, m in wanted}
            )


def read_shards(paths: Sequence[Path], skipped: dict[str, str]) -> Iterator[Sample]:
    """The samples of several shards; a damaged one ends early and is named in ``skipped``."""
    for path in paths:
        try:
            yield from read_shard(path)
        except DAMAGE as error:
            skipped[str(path)] = describe_error(error)


def take_census(shards: ShardSet) -> Census:
    """Count samples and labels by the headers of the shards; kept in the user's cache until a shard changes."""
    path = cache_folder() / "shards" / f"{_identity(shards)}.json"
    try:
        return Census(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        census = _count(shards)
    try:
        write_json(path, vars(census))
    except OSError:
        pass  # a cache that cannot be written costs the next run a pass, no more
    return census


def cache_folder() -> Path:
    """Where what can be worked out again is kept: the environment's FLOWAUG_CACHE or ``~/.cache/flowaug``."""
    return Path(os.environ.get("FLOWAUG_CACHE") or "~/.cache/flowaug").expanduser()


def sizes(shards: ShardSet) -> list[tuple[str, int]]:
    """Name and bytes of each shard."""
    return [(path.name, path.stat().st_size) for path in shards.paths]


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, suffix and header of each file."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # or a shard's headers pile up in memory
        key, suffix = base_plus_ext(member.name)
        if member.isfile() and key is not None:
            yield key, suffix.lower(), member
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(BLOCK) != bytes(BLOCK):  # tarfile ends in silence at a bad header
        raise tarfile.ReadError(f"no end-of-archive mark at byte {tar.offset}")


def _json_label(text: str, field: str | None) -> str:
    """The label in a json file: the value itself or a field of it."""
    value = json.loads(text)
    if isinstance(value, dict):
        fields = (field,) if field else LABEL_FIELDS
        value = next((value[name] for name in fields if name in value), None)
        if value is None:
            raise ValueError(f"its .json has no field {' or '.join(fields)}")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"its .json has a label of type {type(value).__name__}, expected a number or a name")
    return str(value)


def _count(shards: ShardSet) -> Census:
    parts = parallel_map(lambda path: _count_shard(path, shards.field), shards.paths, "counting samples", " shards", 1)
    labels, faults = Counter(), {}
    for counts, wrong in parts:
        labels.update(counts)
        faults.update(wrong)
    return Census(labels.total(), dict(labels), faults)


def _count_shard(path: Path, field: str | None) -> tuple[Counter, dict[str, str]]:
    labels, faults = Counter(), {}
    try:
        for sample in read_shard(path, pixels=False):
            try:
                sample.image_key()
                labels[sample.label_name(field)] += 1
            except ValueError as error:
                faults[sample.name] = describe_error(error)
    except DAMAGE as error:
        faults[str(path)] = describe_error(error)
    return labels, faults


def _identity(shards: ShardSet) -> str:
    facts = [(str(path.resolve()), *_stamp(path)) for path in shards.paths]
    return hashlib.sha256(repr((facts, shards.field)).encode()).hexdigest()[:16]


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
