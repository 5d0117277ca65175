"""Which webdataset shards there are: folders, patterns and timm's ``_info.json``."""

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

SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "eval", "test")}


@dataclass(frozen=True)
class ShardSet:
    """The shards of a split.

    Attributes:
        paths: the .tar files.
        declared: how many samples ``_info.json`` says they hold, or None.
        field: where json files hold the label; None tries `LABEL_FIELDS`.
    """

    paths: tuple[Path, ...]
    declared: int | None = None
    field: str | None = None


def is_shards(dataset: str | None, data_dir: Path | None) -> bool:
    """Whether the options name webdataset shards: ``wds/``, a pattern of .tar files, or a folder with some in it."""
    if dataset is not None or data_dir is None:
        return dataset is not None and dataset.partition("/")[0] == "wds"
    if not data_dir.is_dir():
        return ".tar" in str(data_dir)
    return any((find_split(data_dir, "train") or data_dir).glob("*.tar"))


def find_shards(source: Path) -> dict[str, ShardSet]:
    """The shards of ``{"train": ..., "val": ...}`` in a folder or of a pattern.

    In a folder, ``_info.json`` (timm's) decides; without it, names do: ``train-000.tar``, ``set-val-07.tar`` or
    ``train/000.tar``. A pattern of training shards alone takes the validation shards that lie beside them.

    Args:
        source: a folder, or paths with braces or asterisks: ``shards/train-{000000..000127}.tar``.

    Raises:
        FileNotFoundError: shards that are named or needed are not there.
    """
    if source.is_dir():
        info = next((source / name for name in ("_info.json", "info.json") if (source / name).is_file()), None)
        if info is not None:
            return _checked(_from_info(info), source)
        paths = beside = sorted(source.rglob("*.tar"))
    else:
        paths = _expand(source)
        beside = sorted({shard for path in paths for shard in path.parent.glob("*.tar")})
    splits = {split: _of_split(paths, split) for split in SPLIT_WORDS}
    splits["val"] = splits["val"] or _of_split(beside, "val")
    return _checked({split: ShardSet(shards) for split, shards in splits.items()}, source)


def _expand(pattern: Path) -> list[Path]:
    """The files of a pattern with braces or asterisks."""
    names = itertools.chain.from_iterable(
        sorted(glob.glob(name)) if "*" in name else [name] for name in braceexpand(str(pattern))
    )
    return [Path(name) for name in names]


def _of_split(paths: Sequence[Path], split: str) -> tuple[Path, ...]:
    """Those whose name, or else whose folder, has a word for the split in it; the first word that any has."""
    for word in SPLIT_WORDS[split]:
        found = tuple(path for path in paths if word in _words(path))
        if found:
            return found
    return ()


def _words(path: Path) -> list[str]:
    every = {word for words in SPLIT_WORDS.values() for word in words}
    own = [word for word in re.split(r"[^a-z]+", path.stem.lower()) if word in every]
    return own or re.split(r"[^a-z]+", path.parent.name.lower())


def _from_info(path: Path) -> dict[str, ShardSet]:
    """The splits of timm's ``_info.json``."""
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        found = {split: next(splits[w] for w in words if w in splits) for split, words in SPLIT_WORDS.items()}
        return {split: _described(path.parent, facts) for split, facts in found.items()}
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(
            f"{path} does not describe a train and a val split as timm's shards do ({describe_error(error)}); "
            "correct it, or delete it to go by the names of the shards"
        ) from error


def _described(folder: Path, facts: dict) -> ShardSet:
    paths = tuple(folder / Path(name).name for name in facts["filenames"])  # never outside of the folder
    return ShardSet(paths, int(facts["num_samples"]), facts.get("alt_label") or None)


def _checked(splits: dict[str, ShardSet], source: Path) -> dict[str, ShardSet]:
    for split, shards in splits.items():
        lost = [path for path in shards.paths if not path.is_file()]
        if lost:
            raise FileNotFoundError(
                f"shard {str(lost[0])!r} is not there ({len(lost)} of {len(shards.paths)} such); "
                "correct the pattern or copy the shards again (they are read from files, not from URLs)"
            )
        if not shards.paths:
            raise FileNotFoundError(
                f"{str(source)!r} has no {split} shards; expected .tar files named like {split}-000000.tar or in a "
                f"folder {split}/, or a pattern that names both: 'shards/{{train-{{000..127}},val-{{000..007}}}}.tar'"
            )
    return splits
