"""Find the webdataset shards of each split: in folders, by patterns, or from timm's ``_info.json``."""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from flowaug.data.image_files import describe_error
from flowaug.data.image_folder import find_split
from flowaug.files import files_below

SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "eval", "test")}


@dataclass(frozen=True)
class ShardSet:
    """The shards of a split.

    Attributes:
        paths: the .tar files.
        declared: number of samples according to ``_info.json``, or None.
        field: field of the JSON files that holds the label; None tries ``flowaug.data.wds.reader.LABEL_FIELDS``.
    """

    paths: tuple[Path, ...]
    declared: int | None = None
    field: str | None = None


def is_shards(dataset: str | None, data_dir: Path | None) -> bool:
    """Return whether the options name webdataset shards.

    They do if ``dataset`` starts with ``wds/``, or without ``dataset`` if ``data_dir`` is a pattern of .tar files or a
    folder that contains some, directly or in ``train/``.
    """
    if dataset is not None or data_dir is None:
        return dataset is not None and dataset.partition("/")[0] == "wds"
    if not data_dir.is_dir():
        return ".tar" in str(data_dir)
    return any((find_split(data_dir, "train") or data_dir).glob("*.tar"))


def find_shards(source: Path) -> dict[str, ShardSet]:
    """Return the shards of the splits, ``{"train": ..., "val": ...}``, in a folder or of a pattern.

    In a folder, timm's ``_info.json`` lists the shards of each split. Without it, names do: ``train-000.tar``,
    ``set-val-07.tar`` or ``train/000.tar``. If a pattern names training shards only, validation shards in the same
    folders are used.

    Args:
        source: a folder, or paths with braces or asterisks: ``shards/train-{000000..000127}.tar``.

    Raises:
        FileNotFoundError: a shard does not exist, or a split has no shards.
        ValueError: ``_info.json`` is malformed.
    """
    if source.is_dir():
        info = next((source / name for name in ("_info.json", "info.json") if (source / name).is_file()), None)
        if info is not None:
            return _check_shards(_read_info(info), source)
        paths = siblings = [path for path in files_below(source) if path.suffix == ".tar"]
    else:
        paths = _expand(source)
        siblings = sorted({shard for path in paths for shard in path.parent.glob("*.tar")})

    splits = {split: _filter_split(paths, split) for split in SPLIT_WORDS}
    splits["val"] = splits["val"] or _filter_split(siblings, "val")
    return _check_shards({split: ShardSet(shards) for split, shards in splits.items()}, source)


def _expand(pattern: Path) -> list[Path]:
    """Return the paths of a pattern with braces or asterisks."""
    names = itertools.chain.from_iterable(
        sorted(glob.glob(name)) if "*" in name else [name] for name in braceexpand(str(pattern))
    )
    return [Path(name) for name in names]


def _filter_split(paths: Sequence[Path], split: str) -> tuple[Path, ...]:
    """Return the paths whose names contain the first word for the split that occurs in any of them."""
    for word in SPLIT_WORDS[split]:
        found = tuple(path for path in paths if word in _split_words(path))
        if found:
            return found
    return ()


def _split_words(path: Path) -> list[str]:
    """Return the words for splits in the name of a file, or all words in the name of its folder if there are none."""
    known = {word for words in SPLIT_WORDS.values() for word in words}
    in_name = [word for word in re.split(r"[^a-z]+", path.stem.lower()) if word in known]
    return in_name or re.split(r"[^a-z]+", path.parent.name.lower())


def _read_info(path: Path) -> dict[str, ShardSet]:
    """Read the splits of timm's ``_info.json``."""
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        found = {split: next(splits[w] for w in words if w in splits) for split, words in SPLIT_WORDS.items()}
        return {split: _parse_split(path.parent, entry) for split, entry in found.items()}
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(
            f"{path} does not describe a train and a val split in timm's format ({describe_error(error)}); "
            "correct it, or delete it to find the splits by the names of the shards"
        ) from error


def _parse_split(folder: Path, entry: dict) -> ShardSet:
    paths = tuple(folder / Path(name).name for name in entry["filenames"])  # never outside the folder
    return ShardSet(paths, int(entry["num_samples"]), entry.get("alt_label") or None)


def _check_shards(splits: dict[str, ShardSet], source: Path) -> dict[str, ShardSet]:
    """Return the splits unchanged if each has shards and all of them exist."""
    for split, shards in splits.items():
        missing = [path for path in shards.paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"shard {str(missing[0])!r} does not exist ({len(missing)} of {len(shards.paths)} {split} shards are "
                "missing); correct the pattern or copy the shards again (they are read from files, not from URLs)"
            )
        if not shards.paths:
            raise FileNotFoundError(
                f"{str(source)!r} has no {split} shards; expected .tar files named like {split}-000000.tar or in a "
                f"folder {split}/, or a pattern of both splits: 'shards/{{train-{{000..127}},val-{{000..007}}}}.tar'"
            )
    return splits
