"""webdataset shards as a streaming data set that skips and counts bad samples."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import webdataset.filters
from PIL import Image
from torch import Tensor

from flowaug.data.class_map import ClassMap, check_class_counts, read_class_map
from flowaug.data.image_files import describe_error, grey_or_rgb, parallel_map
from flowaug.data.images import to_pixels
from flowaug.data.wds.index import ShardSet, find_shards
from flowaug.data.wds.loader import StreamLoader
from flowaug.data.wds.reader import Sample, SampleCounts, count_samples, read_shards, sizes

SHUFFLE_BUFFER = 2048  # undecoded samples per worker: about 250 MB for ImageNet
PROBED_SHARDS, PROBED_SAMPLES = 16, 16
MAX_REPORTED = 20  # names of skipped samples in metrics.json

log = logging.getLogger(__name__)


class StreamDataset:
    """Images and labels of the webdataset shards of one split, decoded while reading and not kept in memory.

    Args:
        shards: the shards.
        classes: labels of the class names in the shards.
        name: name of the data set in messages and file names.
        channels: 1 or 3.
        count: number of samples per epoch.
        faults: known errors, in the format of ``skipped``.

    Attributes:
        image_size: (H, W) of the first image.
        skipped: ``{shard or shard:key: error}`` of the shards and samples skipped so far.

    Raises:
        ValueError: there is no usable sample.
    """

    grey_levels = 256
    fixed_size = None  # samples may differ in size

    def __init__(
        self, shards: ShardSet, classes: ClassMap, *, name: str, channels: int, count: int, faults: dict[str, str]
    ):
        self.shards = shards
        self.classes = classes
        self.name = name
        self.channels = channels
        self.count = count
        self.skipped: dict[str, str] = {}
        self.note(faults)
        self.image_size = self._find_size()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order."""
        return self.classes.names

    def __len__(self) -> int:
        return self.count

    def fingerprint(self) -> str:
        """Return a hash (16 hex digits) of the classes and the names and sizes of the shards."""
        facts = (self.classes.table, self.class_names, self.channels, self.shards.field, sizes(self.shards))
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def decoded(self, paths: Sequence[Path], skipped: dict[str, str]) -> Iterator[tuple[Image.Image, int]]:
        """Yield the image and label of every good sample of some shards, in order.

        Args:
            paths: the shards.
            skipped: dictionary to which bad samples and damaged shards are added.
        """
        return self._decode(read_shards(paths, skipped), skipped)

    def endless(
        self, worker_index: int, num_workers: int, repeats: int, key: str, skipped: dict[str, str]
    ) -> Iterator[tuple[Image.Image, int]]:
        """Yield the image and label of good samples of an epoch in random order, without end.

        The samples of this worker's shards come first, ``repeats`` times. Samples of random shards follow, so that
        workers with few shards get as many samples as the others.

        Args:
            worker_index: index of this worker among the workers of all processes.
            num_workers: number of workers of all processes.
            repeats: number of passes over this worker's shards.
            key: seed of the epoch, the same for all workers, which divide one random order of the shards.
            skipped: dictionary to which bad samples and damaged shards are added.
        """
        shards = list(self.shards.paths)
        random.Random(key).shuffle(shards)
        rng = random.Random(f"{key}/{worker_index}")

        worker_shards = itertools.repeat(shards[worker_index::num_workers], repeats)
        all_shards = (rng.sample(shards, len(shards)) for _ in itertools.count())
        for paths in itertools.chain(worker_shards, all_shards):
            shuffle = webdataset.filters.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 4, rng=rng)
            yield from self._decode(shuffle(read_shards(paths, skipped)), skipped)

    def examples(self, limit: int = 10) -> list[tuple[Image.Image, int]]:
        """Return the first image and the label of each of the first ``limit`` classes found, sorted by label."""
        found: dict[int, Image.Image] = {}
        for image, label in self.decoded(self.shards.paths, {}):
            found.setdefault(label, image)
            if len(found) == min(limit, len(self.class_names)):
                break
        return [(found[label], label) for label in sorted(found)]

    def read_table(self, size: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
        """Return all good samples as uint8 (N, channels, H, W) and labels (N,), in the order of the shards.

        Images are resized to ``size`` = (H, W).
        """
        parts = parallel_map(
            lambda path: self._read_shard(path, size, channels), self.shards.paths, "reading shards", " shards", 1
        )
        images, labels, skipped = zip(*parts, strict=True)
        for names in skipped:
            self.note(names)
        return torch.cat(images), torch.cat(labels)

    def stream_loader(self, transform: Callable, batch_size: int, training: bool, *options) -> StreamLoader:
        """Create a ``StreamLoader``; ``options`` are its seed, workers, process_index, num_processes and repeats."""
        return StreamLoader(self, transform, batch_size, training, *options)

    def note(self, names: dict[str, str]) -> None:
        """Add samples and shards to ``skipped``, and log a warning if some of them are new."""
        new = sorted(names.keys() - self.skipped.keys())
        if new:
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            log.warning("skipped %s (%s)%s", new[0], names[new[0]], more)
        self.skipped.update(names)

    def _find_size(self) -> tuple[int, int]:
        """Return (H, W) of the first good image, and raise if there is none: ``endless`` would search forever."""
        skipped: dict[str, str] = {}
        for image, _ in self.decoded(self.shards.paths, skipped):
            return image.height, image.width
        raise ValueError(
            f"no sample of {_describe_shards(self.shards)} can be used; first error: {_first_fault(skipped)}"
        )

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
            raise ValueError(
                f"label {name!r} is not one of the {len(self.class_names)} classes of {self.classes.origin}"
            )
        return label

    def _read_shard(self, path: Path, size: tuple[int, int], channels: int) -> tuple[Tensor, Tensor, dict[str, str]]:
        """Return the images, the labels and the skipped samples of one shard."""
        skipped: dict[str, str] = {}
        samples = [(to_pixels(image, size, channels), label) for image, label in self.decoded([path], skipped)]
        images = torch.empty(len(samples), channels, *size, dtype=torch.uint8)
        for row, (pixels, _) in zip(images, samples, strict=True):
            row.copy_(pixels)
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        return images, labels, skipped


def open_stream(
    source: Path,
    split: str,
    class_map: str | Path | None = None,
    num_classes: int | None = None,
    train_samples: int | None = None,
) -> StreamDataset:
    """Open one split of a folder or pattern of webdataset shards.

    Samples are counted and their labels checked in one pass over the shards, whose result is cached. The training
    shards are not counted if both the number of training samples and the classes are given.

    Args:
        source: folder, or paths with braces or asterisks, see ``flowaug.data.wds.index.find_shards``.
        split: "train" or "val".
        class_map: JSON file with the label of each class, see ``flowaug.data.class_map.read_class_map``.
        num_classes: number of classes; without ``class_map``, the labels must be 0 .. num_classes - 1.
        train_samples: number of samples per training epoch; None uses the number in ``_info.json`` or counts them.

    Raises:
        ValueError: labels are inconsistent, a class has too few images, or there is no usable sample.
        FileNotFoundError: a shard, the shards of a split or the class map do not exist.
    """
    source = Path(source).expanduser()
    splits = find_shards(source)
    declared = train_samples or splits["train"].declared
    classes, train_counts = _resolve_classes(splits["train"], class_map, num_classes, declared)

    counts = train_counts if split == "train" else count_samples(splits["val"])
    classes.labels(counts.labels)  # raises an error for unknown classes
    return StreamDataset(
        splits[split],
        classes,
        name=(source if source.is_dir() else source.parent).resolve().name,
        channels=_find_channels(splits["train"]),
        count=declared if split == "train" and declared else counts.count,
        faults=counts.faults,
    )


def count_skipped(sets: Mapping[str, object], gather: Callable[[list], list] = list) -> dict:
    """Count what all processes skipped in each data set that is a stream.

    Args:
        sets: data sets by the name of their split.
        gather: function that joins the lists of all processes; every process must call ``count_skipped``.

    Returns:
        ``{split: {"samples": count, "shards": count, "names": {name: error}}}`` with the first ``MAX_REPORTED`` names.
    """
    return {split: _count_skipped(data, gather) for split, data in sets.items() if isinstance(data, StreamDataset)}


def _count_skipped(data: StreamDataset, gather: Callable[[list], list]) -> dict:
    names = dict(sorted(item for part in gather([data.skipped]) for item in part.items()))
    shards = len(names.keys() & {str(path) for path in data.shards.paths})
    return {
        "samples": len(names) - shards,
        "shards": shards,
        "names": dict(itertools.islice(names.items(), MAX_REPORTED)),
    }


def _resolve_classes(
    shards: ShardSet, class_map: str | Path | None, num_classes: int | None, declared: int | None
) -> tuple[ClassMap, SampleCounts]:
    """Return the classes and the sample counts of the training shards, which are only counted if necessary."""
    classes = None
    if class_map is not None:
        classes = read_class_map(class_map)
    elif num_classes is not None:
        classes = ClassMap.identity_map(num_classes)

    if classes is not None and declared is not None:
        classes.check_count(num_classes)
        return classes, SampleCounts(declared, {}, {})

    counts = count_samples(shards)
    if not counts.count:
        raise ValueError(
            f"no sample of {_describe_shards(shards)} has an image and a label; first error: "
            f"{_first_fault(counts.faults)}"
        )
    classes = classes or _find_classes(counts, shards)
    classes.check_count(num_classes)

    labels = classes.labels(counts.labels)
    per_class = np.bincount(labels, list(counts.labels.values()), len(classes.names)).astype(int).tolist()
    check_class_counts(dict(zip(classes.names, per_class, strict=True)), 2, _describe_shards(shards))
    return classes, counts


def _find_classes(counts: SampleCounts, shards: ShardSet) -> ClassMap:
    """Return the classes of the labels found: by number if all labels are numbers, else by name, sorted."""
    if not all(label.isdecimal() for label in counts.labels):
        return ClassMap.from_names(sorted(counts.labels), _describe_shards(shards))
    largest = max(map(int, counts.labels))
    if largest >= counts.count:
        raise ValueError(
            f"the largest label is {largest}, but {_describe_shards(shards)} have only {counts.count} samples; "
            "give a class map (--class-map) that numbers the classes from 0"
        )
    return ClassMap.identity_map(largest + 1)


def _find_channels(shards: ShardSet) -> int:
    """Return 1 if the first images of a sample of the shards are all greyscale, else 3."""
    probed = shards.paths[:: max(1, len(shards.paths) // PROBED_SHARDS)]
    samples = (itertools.islice(read_shards([path], {}), PROBED_SAMPLES) for path in probed)
    return grey_or_rgb(filter(None, (sample.mode for shard in samples for sample in shard)))


def _describe_shards(shards: ShardSet) -> str:
    return f"the {len(shards.paths)} shard(s) starting with {str(shards.paths[0])!r}"


def _first_fault(faults: dict[str, str]) -> str:
    return ": ".join(next(iter(faults.items()), ("the shards are empty",)))
