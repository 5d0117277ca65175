"""ImageNet's ReaL labels: all classes that people see in each validation image, instead of one."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import torch
from timm.data import RealLabelsImagenet
from torch import Tensor

OWN = "timm"  # stands for the copy that timm carries


class RealLabels:
    """Counts what of a process's share of the ImageNet validation images is right by the ReaL labels.

    Images whose list of labels is empty do not count. L. Beyer et al., "Are we done with ImageNet?", 2020,
    https://arxiv.org/abs/2006.07159

    Args:
        source: ``real.json``, a list of labels for each of ILSVRC2012_val_00000001 onwards; "timm" for timm's copy.
        dataset: the val split, its labels in the order of ImageNet's classes.
        rank: this process.
        world_size: number of processes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such list, or does not fit the images.
    """

    def __init__(self, source: str | Path, dataset, rank: int = 0, world_size: int = 1):
        path = resources.files("timm.data") / "_info/imagenet_real_labels.json" if source == OWN else Path(source)
        names, classes = _validation_names(dataset), len(dataset.class_names)
        _check(_read(path), path, len(names), classes)
        self.scores = RealLabelsImagenet(names, path, topk=(1, min(5, classes)))
        self.scores.filenames = names[rank::world_size]  # a loader's order; timm checks the number of all of them
        lost = sorted(set(names) - self.scores.real_labels.keys())
        if lost:
            raise ValueError(f"{lost[0]} is not among the {len(names)} images that {str(path)!r} has labels for")

    def reset(self) -> None:
        """Start an evaluation: the next logits are those of the first images."""
        self.scores.sample_idx, self.scores.is_correct = 0, {k: [] for k in self.scores.topk}

    def add(self, logits: Tensor) -> None:
        """Count the next images, logits (B, K)."""
        self.scores.add_result(logits)

    def sums(self) -> Tensor:
        """Images right by their best class, by one of their best five, and images that count, float64 (3,)."""
        best, any_of = (self.scores.is_correct[k] for k in self.scores.topk)
        return torch.tensor([sum(best), sum(any_of), len(best)], dtype=torch.float64)


def _validation_names(dataset) -> list[str]:
    """ILSVRC2012_val_XXXXXXXX.JPEG of each image, in order; what follows the number in a file's name is cut off."""
    files = [] if getattr(dataset, "in_memory", True) else [Path(path).name for path in dataset.images]
    found = [re.match(r"ILSVRC2012_val_\d{8}", name) for name in files]
    if not all(found) or not found:
        other = next((name for name, match in zip(files, found, strict=True) if not match), "no files")
        raise ValueError(
            f"ReaL labels (--real-labels) go by file names ILSVRC2012_val_00000001.JPEG, but the val split of "
            f"{dataset.name} has {other}; use the original files in val/, one folder per class, or leave the option out"
        )
    return [f"{match[0]}.JPEG" for match in found]


def _read(path) -> list:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not there; give real.json, or --real-labels alone for timm's copy")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); download real.json again") from error


def _check(labels, path, images: int, classes: int) -> None:
    if not (isinstance(labels, list) and all(isinstance(row, list) for row in labels)):
        raise ValueError(f"{str(path)!r} is not a list of lists of labels, one for each validation image")
    if len(labels) != images:
        raise ValueError(f"{str(path)!r} has labels for {len(labels)} images but the val split has {images}")
    largest = max((label for row in labels for label in row), default=-1)
    if largest >= classes:
        raise ValueError(f"{str(path)!r} has labels up to {largest} but the data only {classes} classes, in that order")
