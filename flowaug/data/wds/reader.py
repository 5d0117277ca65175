"""Read and count the samples of webdataset shards, without unpickling anything."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from PIL import Image
from webdataset.tariterators import base_plus_ext

from flowaug.data.image_files import describe_error, parallel_map, to_mode
from flowaug.data.wds.index import ShardSet
from flowaug.files import cache_folder, write_json

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
LABEL_KEYS = ("cls", "json", "txt")
LABEL_FIELDS = ("label", "cls", "class", "target")  # fields of a JSON file, tried in this order
DAMAGE = (tarfile.TarError, OSError, EOFError, ValueError)  # exceptions raised by a damaged archive
COUNTS_VERSION = 2  # of the cached counts
BLOCK = 512  # bytes of a tar header


@dataclass(frozen=True)
class Sample:
    """The files of one sample: consecutive files of a shard with the same key.

    Attributes:
        shard: the .tar file.
        key: path of the files in the shard, without their suffixes.
        files: ``{suffix: contents}``; of several files with one suffix the first, as in timm.
        repeats: number of further files with the suffix of an earlier one: samples that have the same key.
    """

    shard: Path
    key: str
    files: dict[str, bytes]
    repeats: int = 0

    @property
    def name(self) -> str:
        """The shard and the key."""
        return f"{self.shard}:{self.key}"

    def repeat_faults(self) -> dict[str, str]:
        """Return the names and errors of the samples that were left out because they have this one's key."""
        message = "it has the key of the sample before it; give every sample of a shard its own key"
        return {f"{self.name} ({number})": message for number in range(2, self.repeats + 2)}

    def label_name(self, field: str | None = None) -> str:
        """Return the label of the label file as text: a number or a class name.

        Args:
            field: field of a JSON file that holds the label; None tries ``LABEL_FIELDS``.

        Raises:
            ValueError: there is no label file, or it contains neither a number nor a name.
        """
        suffix = next((key for key in LABEL_KEYS if key in self.files), None)
        if suffix is None:
            raise ValueError(f"no label file; expected one of {', '.join(LABEL_KEYS)}")
        text = self.files[suffix].decode("utf-8").strip()
        text = _json_label(text, field) if suffix == "json" else text
        if not text:
            raise ValueError(f"the .{suffix} file is empty; expected a number or a class name")
        if text.startswith("-") and text[1:].isdecimal():
            raise ValueError(f"label is {text}; expected a non-negative number or a class name")
        return str(int(text)) if text.isdecimal() else text

    def image(self, mode: str) -> Image.Image:
        """Decode the image and convert it to mode "L" or "RGB".

        Raises:
            ValueError: there is no image file.
            Exception: the image is bad; the type depends on its decoder.
        """
        with Image.open(io.BytesIO(self.files[self.image_key()])) as image:
            return to_mode(image, mode)

    @property
    def mode(self) -> str | None:
        """The PIL mode in the header of the image; None if it cannot be read."""
        try:
            with Image.open(io.BytesIO(self.files[self.image_key()])) as image:
                return image.mode
        except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
            return None

    def image_key(self) -> str:
        """Return the suffix of the image file.

        Raises:
            ValueError: there is no image file.
        """
        suffix = next((key for key in IMAGE_KEYS if key in self.files), None)
        if suffix is None:
            raise ValueError(f"no image file; expected one of {', '.join(IMAGE_KEYS)}")
        return suffix


@dataclass(frozen=True)
class SampleCounts:
    """Counts of the samples of a split.

    Attributes:
        count: number of samples with an image file and a label.
        labels: ``{label as text: number of samples}``.
        faults: ``{shard or shard:key: error}`` of damaged shards and bad samples.
    """

    count: int
    labels: dict[str, int]
    faults: dict[str, str]


def read_shard(path: Path, pixels: bool = True) -> Iterator[Sample]:
    """Yield the samples of a shard in order.

    In a damaged archive, the last sample before the damage is left out if it may be incomplete.

    Args:
        path: an uncompressed .tar file.
        pixels: read the image files too; otherwise their contents are empty.

    Raises:
        tarfile.TarError, OSError, EOFError, ValueError: the archive is damaged from here on (``DAMAGE``).
    """
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for key, group in itertools.groupby(_members(tar), lambda member: member[0]):
            files, met = {}, Counter()
            for _, suffix, header in group:
                if suffix in LABEL_KEYS + IMAGE_KEYS:
                    met[suffix] += 1
                if suffix in files:
                    continue
                if suffix in LABEL_KEYS or (suffix in IMAGE_KEYS and pixels):
                    files[suffix] = cast(IO[bytes], tar.extractfile(header)).read()
                elif suffix in IMAGE_KEYS:
                    files[suffix] = b""
            yield Sample(path, key, files, max(met.values(), default=1) - 1)


def read_shards(paths: Sequence[Path], skipped: dict[str, str]) -> Iterator[Sample]:
    """Yield the samples of several shards; add damaged shards, which end early, and repeated keys to ``skipped``."""
    for path in paths:
        try:
            for sample in read_shard(path):
                skipped.update(sample.repeat_faults())
                yield sample
        except DAMAGE as error:
            skipped[str(path)] = describe_error(error)


def count_samples(shards: ShardSet) -> SampleCounts:
    """Count the samples of each label, without decoding images.

    The result is cached in ``cache_folder()`` until the path, size or modification time of a shard changes.
    """
    path = cache_folder() / "shards" / f"{_cache_key(shards)}.json"
    try:
        return SampleCounts(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        counts = _count(shards)

    try:
        write_json(path, vars(counts))
    except OSError:
        pass  # without a cache, the next run counts again
    return counts


def sizes(shards: ShardSet) -> list[tuple[str, int]]:
    """Return the name and the size in bytes of each shard."""
    return [(path.name, path.stat().st_size) for path in shards.paths]


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield the key, suffix and header of each file, and raise ``tarfile.ReadError`` if the archive is truncated."""
    while (member := tar.next()) is not None:
        cast(Any, tar).members.clear()  # tarfile would keep the headers of the whole shard in memory
        key, suffix = base_plus_ext(member.name)
        if member.isfile() and key is not None and suffix is not None:
            yield key, suffix.lower(), member
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(BLOCK) != bytes(BLOCK):  # tarfile stops without an error at a bad header
        raise tarfile.ReadError(f"no end-of-archive mark at byte {tar.offset}")


def _json_label(text: str, field: str | None) -> str:
    """Return the label in a JSON file, which is its value or a field of it, as text."""
    value = json.loads(text)
    if isinstance(value, dict):
        fields = (field,) if field else LABEL_FIELDS
        value = next((value[name] for name in fields if name in value), None)
        if value is None:
            raise ValueError(f"the .json file has no field {' or '.join(fields)}")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"the .json file has a label of type {type(value).__name__}; expected a number or a name")
    return str(value)


def _count(shards: ShardSet) -> SampleCounts:
    parts = parallel_map(lambda path: _count_shard(path, shards.field), shards.paths, "counting samples", " shards", 1)
    labels, faults = Counter(), {}
    for shard_labels, shard_faults in parts:
        labels.update(shard_labels)
        faults.update(shard_faults)
    return SampleCounts(labels.total(), dict(labels), faults)


def _count_shard(path: Path, field: str | None) -> tuple[Counter, dict[str, str]]:
    """Return the number of samples of each label, and the errors, of one shard."""
    labels, faults = Counter(), {}
    try:
        for sample in read_shard(path, pixels=False):
            faults.update(sample.repeat_faults())
            try:
                sample.image_key()
                labels[sample.label_name(field)] += 1
            except ValueError as error:
                faults[sample.name] = describe_error(error)
    except DAMAGE as error:
        faults[str(path)] = describe_error(error)
    return labels, faults


def _cache_key(shards: ShardSet) -> str:
    files = [(str(path.resolve()), *_size_and_mtime(path)) for path in shards.paths]
    return hashlib.sha256(repr((COUNTS_VERSION, files, shards.field)).encode()).hexdigest()[:16]


def _size_and_mtime(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
