"""ReaL labels of ImageNet: a list of all correct classes for each validation image, instead of a single one."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import torch
from timm.data import RealLabelsImagenet
from torch import Tensor

TIMM_COPY = "timm"  # selects the file in the timm package


class RealLabels:
    """Accuracy counts by ReaL labels, for one process's part of the ImageNet validation set.

    Images with an empty list of labels are not counted.

    Reference: Beyer et al., "Are we done with ImageNet?", 2020, https://arxiv.org/abs/2006.07159

    Args:
        source: path of ``real.json``, which has a list of labels for each image from ILSVRC2012_val_00000001 on; or
            "timm" for the file in the timm package.
        dataset: the validation set, with labels in the order of ImageNet's classes.
        process_index: index of this process.
        num_processes: number of processes.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file has another format, or does not match the images.
    """

    def __init__(self, source: str | Path, dataset, process_index: int = 0, num_processes: int = 1):
        path = resources.files("timm.data") / "_info/imagenet_real_labels.json" if source == TIMM_COPY else Path(source)
        names = _validation_names(dataset)
        num_classes = len(dataset.class_names)
        _check(_read(path), path, len(names), num_classes)

        self.scores = RealLabelsImagenet(names, path, topk=(1, min(5, num_classes)))
        # timm's constructor requires the names of all images. Keep those of this process, in the order of its loader.
        self.scores.filenames = names[process_index::num_processes]

        unknown = sorted(set(names) - self.scores.real_labels.keys())
        if unknown:
            raise ValueError(
                f"{unknown[0]} is not among the {len(names)} images that {str(path)!r} has labels for; "
                "use the original validation set"
            )

    def reset(self) -> None:
        """Start a new evaluation; the next logits belong to the first images."""
        self.scores.sample_idx = 0
        self.scores.is_correct = {k: [] for k in self.scores.topk}

    def add(self, logits: Tensor) -> None:
        """Add the next images, given their logits (B, K)."""
        self.scores.add_result(logits)

    def sums(self) -> Tensor:
        """Return the top-1 correct, the top-5 correct and the counted images, float64 (3,)."""
        top1, top5 = (self.scores.is_correct[k] for k in self.scores.topk)
        return torch.tensor([sum(top1), sum(top5), len(top1)], dtype=torch.float64)


def _validation_names(dataset) -> list[str]:
    """Return ILSVRC2012_val_XXXXXXXX.JPEG for each image, in order; any suffix of the file name is dropped."""
    files = [] if getattr(dataset, "in_memory", True) else [Path(path).name for path in dataset.images]
    found = [re.match(r"ILSVRC2012_val_\d{8}", name) for name in files]
    names = [match[0] for match in found if match]
    if len(names) < len(files) or not names:
        other = next((name for name, match in zip(files, found, strict=True) if not match), "no files")
        raise ValueError(
            f"ReaL labels (--real-labels) go by file names ILSVRC2012_val_00000001.JPEG, but the val split of "
            f"{dataset.name} has {other}; use the original files in val/, one folder per class, or omit the option"
        )
    return [f"{name}.JPEG" for name in names]


def _read(path) -> list:
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(path)!r} is not there; pass the path of real.json, or --real-labels without a value for timm's copy"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); download real.json again") from error


def _check(labels, path, num_images: int, num_classes: int) -> None:
    if not (isinstance(labels, list) and all(isinstance(row, list) for row in labels)):
        raise ValueError(f"{str(path)!r} is not a list of lists of labels, one for each validation image")
    if len(labels) != num_images:
        raise ValueError(
            f"{str(path)!r} has labels for {len(labels)} images but the val split has {num_images}; "
            "use the file that belongs to the data set"
        )

    largest = max((label for row in labels for label in row), default=-1)
    if largest >= num_classes:
        raise ValueError(
            f"{str(path)!r} has labels up to {largest} but the data only {num_classes} classes; "
            "use a data set with the classes of the file, in the same order"
        )
