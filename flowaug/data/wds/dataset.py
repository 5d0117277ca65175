"""webdataset shards as a data set: streamed, shared out over processes and workers, bad samples skipped and counted."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from flowaug.data.class_map import ClassMap, as_found, check_class_counts, numbered, read_class_map
from flowaug.data.image_files import describe_error, grey_or_rgb, parallel_map
from flowaug.data.images import to_pixels
from flowaug.data.wds.index import ShardSet, find_shards
from flowaug.data.wds.loader import StreamLoader
from flowaug.data.wds.reader import Census, Sample, read_shards, sizes, take_census

SHUFFLE_BUFFER = 2048  # undecoded samples per worker: some 250 MB of ImageNet
PROBED_SHARDS, PROBED_SAMPLES = 16, 16
NAMED = 20  # of what was skipped, in metrics.json

log = logging.getLogger(__name__)


class StreamDataset:
    """The shards of one split; images are decoded as they pass and nothing is held.

    Args:
        shards: the files.
        classes: labels by what the shards call a class.
        name: what messages and file names call this data set.
        channels: 1 or 3.
        count: samples that an epoch stands for.
        faults: what is known to be wrong already, as ``skipped`` holds it.

    Attributes:
        class_names: the name of each class.
        image_size: ``(H, W)`` of the first image.
        skipped: {shard, or shard:key: what is wrong with it} of all that was passed over so far.

    Raises:
        ValueError: no sample can be used.
    """

    grey_levels = 256

    def __init__(
        self, shards: ShardSet, classes: ClassMap, *, name: str, channels: int, count: int, faults: dict[str, str]
    ):
        self.shards, self.classes, self.name, self.channels, self.count = shards, classes, name, channels, count
        self.skipped: dict[str, str] = {}
        self.note(faults)
        self.image_size = self._first_size()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class."""
        return self.classes.names

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        """16 hex digits that change with the classes and the names and sizes of the shards."""
        facts = (self.classes.table, self.class_names, self.channels, self.shards.field, sizes(self.shards))
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def decoded(self, paths: Sequence[Path], skipped: dict[str, str]) -> Iterator[tuple[Image.Image, int]]:
        """Image and label of every good sample in order; the others are named in ``skipped``."""
        return self._decode(read_shards(paths, skipped), skipped)

    def endless(
        self, lane: int, lanes: int, copies: int, key: str, skipped: dict[str, str]
    ) -> Iterator[tuple[Image.Image, int]]:
        """Good samples of an epoch in random order: first those of this lane's shards, then of any, without end.

        Args:
            lane: which share of the shards.
            lanes: how many shares there are, over all processes and their workers.
            copies: how often this lane's shards come before the others.
            key: of the epoch: every lane sees the same order of shards before they are shared out.
            skipped: takes the names of the others.
        """
        shards, rng = list(self.shards.paths), random.Random(f"{key}/{lane}")
        random.Random(key).shuffle(shards)
        own = itertools.repeat(shards[lane::lanes], copies)
        others = (rng.sample(shards, len(shards)) for _ in itertools.count())  # where shards are few, these fill in
        for part in itertools.chain(own, others):
            raw = webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 4, rng=rng)(read_shards(part, skipped))
            yield from self._decode(raw, skipped)

    def examples(self, limit: int = 10) -> list[tuple[Image.Image, int]]:
        """The first image of each of the first ``limit`` classes met, in the order of the labels."""
        found: dict[int, Image.Image] = {}
        for image, label in self.decoded(self.shards.paths, {}):
            found.setdefault(label, image)
            if len(found) == min(limit, len(self.class_names)):
                break
        return [(found[label], label) for label in sorted(found)]

    def read_table(self, size: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
        """Every good sample, once, in memory: uint8 (N, channels, H, W) and labels (N,), in the order of the shards."""
        parts = parallel_map(
            lambda path: self._shard_table(path, size, channels), self.shards.paths, "reading shards", " shards", 1
        )
        images, labels, skipped = zip(*parts, strict=True)
        for names in skipped:
            self.note(names)
        return torch.cat(images), torch.cat(labels)

    def stream_loader(self, transform: Callable, batch_size: int, training: bool, *options) -> StreamLoader:
        """A loader of batches; ``options`` are seed, workers, rank, world size and copies."""
        return StreamLoader(self, transform, batch_size, training, *options)

    def note(self, names: dict[str, str]) -> None:
        """Count samples and shards as skipped, and warn of those that were not known yet."""
        new = sorted(names.keys() - self.skipped.keys())
        if new:
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            log.warning("skipped %s (%s)%s", new[0], names[new[0]], more)
        self.skipped.update(names)

    def _first_size(self) -> tuple[int, int]:
        """Height and width of the first good image; that there is one keeps endless streams from waiting for it."""
        skipped: dict[str, str] = {}
        for image, _ in self.decoded(self.shards.paths, skipped):
            return image.size[::-1]
        raise ValueError(f"no sample can be used in {_where(self.shards)}: {_first(skipped)}")

    def _decode(self, samples: Iterator[Sample], skipped: dict[str, str]) -> Iterator[tuple[Image.Image, int]]:
        for sample in samples:
            try:
                yield sample.image("L" if self.channels == 1 else "RGB"), self._label(sample)
            except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
                skipped[sample.name] = describe_error(error)

    def _label(self, sample: Sample) -> int:
        name = sample.label_name(self.shards.field)
        label = self.classes.label(name)
        if label is None:
            raise ValueError(f"label {name!r} is none of the {len(self.class_names)} classes of {self.classes.origin}")
        return label

    def _shard_table(self, path: Path, size: tuple[int, int], channels: int) -> tuple[Tensor, Tensor, dict[str, str]]:
        skipped: dict[str, str] = {}
        pairs = [(to_pixels(image, size, channels), label) for image, label in self.decoded([path], skipped)]
        images = torch.empty(len(pairs), channels, *size, dtype=torch.uint8)
        for row, (pixels, _) in zip(images, pairs, strict=True):
            row.copy_(pixels)
        labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
        return images, labels, skipped


def open_stream(
    source: Path,
    split: str,
    class_map: Path | None = None,
    num_classes: int | None = None,
    train_samples: int | None = None,
) -> StreamDataset:
    """One split of a folder or pattern of shards.

    Samples are counted and labels checked in one pass over the headers, kept in the user's cache, unless both the
    number of training samples and the classes are declared.

    Args:
        source: folder, or paths with braces or asterisks, as `find_shards` takes them.
        split: "train" or "val".
        class_map: JSON file, see `read_class_map`.
        num_classes: number of classes; labels are then 0 .. N - 1.
        train_samples: samples that a training epoch stands for.

    Raises:
        ValueError: labels that do not fit together, or nothing to read.
        FileNotFoundError: shards or the class map are not there.
    """
    source = Path(source).expanduser()
    splits = find_shards(source)
    declared = train_samples or splits["train"].declared
    classes, train = _settle_classes(splits["train"], class_map, num_classes, declared)
    census = train if split == "train" else take_census(splits["val"])
    classes.labels(census.labels)
    count = declared if split == "train" and declared else census.count
    name = (source if source.is_dir() else source.parent).resolve().name
    options = {"name": name, "channels": _channels(splits["train"]), "count": count, "faults": census.faults}
    return StreamDataset(splits[split], classes, **options)


def count_skipped(sets: dict[str, object], gather: Callable[[list], list] = list) -> dict:
    """What was passed over in each set that is a stream: samples, shards and the first names, over all processes.

    Args:
        sets: data sets by the name of their split.
        gather: joins lists of all processes; every process must call it.
    """
    return {split: _summary(data, gather) for split, data in sets.items() if isinstance(data, StreamDataset)}


def _summary(data: StreamDataset, gather: Callable[[list], list]) -> dict:
    names = dict(sorted(item for part in gather([data.skipped]) for item in part.items()))
    shards = len(names.keys() & {str(path) for path in data.shards.paths})
    return {"samples": len(names) - shards, "shards": shards, "names": dict(itertools.islice(names.items(), NAMED))}


def _settle_classes(
    shards: ShardSet, class_map: Path | None, num_classes: int | None, declared: int | None
) -> tuple[ClassMap, Census]:
    """The classes of the training shards, and what they hold: by the headers, or as declared where all of it is."""
    known = class_map is not None or num_classes is not None
    classes = (read_class_map(class_map) if class_map is not None else numbered(num_classes)) if known else None
    if classes is not None and declared is not None:
        classes.check_count(num_classes)
        return classes, Census(declared, {}, {})
    census = take_census(shards)
    if not census.count:
        raise ValueError(f"no sample with an image and a label in {_where(shards)}: {_first(census.faults)}")
    classes = classes or _classes_found(census, shards)
    classes.check_count(num_classes)
    labels, counts = classes.labels(census.labels), list(census.labels.values())
    per_class = np.bincount(labels, counts, len(classes.names)).astype(int).tolist()
    check_class_counts(dict(zip(classes.names, per_class, strict=True)), 2, _where(shards))
    return classes, census


def _classes_found(census: Census, shards: ShardSet) -> ClassMap:
    """Classes by number where every label is one, else by name in alphabetical order."""
    if not all(label.isdecimal() for label in census.labels):
        return as_found(sorted(census.labels), _where(shards))
    largest = max(map(int, census.labels))
    if largest >= census.count:
        raise ValueError(
            f"labels run up to {largest} but {_where(shards)} hold only {census.count} samples; "
            "give a class map (--class-map) that numbers the classes from 0"
        )
    return numbered(largest + 1)


def _channels(shards: ShardSet) -> int:
    """1 if the first images of some shards are all grey, else 3."""
    some = shards.paths[:: max(1, len(shards.paths) // PROBED_SHARDS)]
    heads = (itertools.islice(read_shards([path], {}), PROBED_SAMPLES) for path in some)
    return grey_or_rgb(filter(None, (sample.mode for head in heads for sample in head)))


def _where(shards: ShardSet) -> str:
    return f"the {len(shards.paths)} shards from {str(shards.paths[0])!r} on"


def _first(faults: dict[str, str]) -> str:
    return ": ".join(next(iter(faults.items()), ("they are empty",)))
