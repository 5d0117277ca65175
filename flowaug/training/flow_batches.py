"""What a flow sees of its training images: which of them, in which order, and how they are augmented."""

import argparse
import itertools

import torch
from torch import Tensor

from flowaug.data.loaders import create_loader, endless_batches, endless_table
from flowaug.data.transforms import random_hflip, random_shift, train_transform
from flowaug.flows.checkpoint import load_flow, read_config
from flowaug.flows.flow import Flow
from flowaug.flows.passes import ImageTable


def training_batches(phases: list[tuple[Tensor | None, int]], dataset, table: ImageTable, args, start: int):
    """Batches of every phase (images, steps) in turn, epoch by epoch, from step ``start`` on."""
    for rows, steps in phases:
        files = dataset.subset(rows) if rows is not None and crops(args) else dataset
        part = table if rows is None else table.subset(rows)
        yield from itertools.islice(every_epoch(files, part, args, start), max(0, steps - start))
        start = max(0, start - steps)


def every_epoch(dataset, table: ImageTable, args: argparse.Namespace, start: int):
    """Shuffled batches, epoch after epoch, from step ``start`` on: from memory, or from files if timm is to crop."""
    place = table.rank, table.world_size
    if not crops(args):
        return endless_table(table.images, table.targets, args.batch_size, args.seed, start, *place)
    transform = train_transform(args.image_size, table.images.shape[1], args)
    size = min(args.batch_size, len(table) // table.world_size)
    loader = create_loader(dataset, transform, size, True, args.seed, args.workers, *place, drop_last=True)
    return endless_batches(loader, start)


def crops(args: argparse.Namespace) -> bool:
    """Whether images go through timm's transform, as the classifier's do, rather than be shifted and mirrored here."""
    return any(value is not None for value in (args.scale, args.ratio, args.aa, args.color_jitter))


def augment(x: Tensor, args: argparse.Namespace, generator: torch.Generator) -> Tensor:
    """Shift and mirror images (B, C, H, W), uint8 or in [0, 1], as the options say; returns them in [0, 1]."""
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    x = random_shift(x, args.shift, generator)
    return x if crops(args) else random_hflip(x, args.hflip, generator)


def inherited_options(given: argparse.Namespace) -> dict:
    """Options that the flow of ``--init-from`` decides: architecture and image size; nothing without one.

    Its latents are ready, so the class Gaussians are solved for before the first step unless ``--solve-at`` is given.

    Raises:
        ValueError: options that the trained flow decides were given as well.
        FileNotFoundError: no such flow.
    """
    if not given.init_from:
        return {}
    config = read_config(given.init_from)
    twice = [name for name in ("model", "coupling", "image_size", "model_kwargs") if getattr(given, name)]
    if twice:
        names = ", ".join("--" + name.replace("_", "-") for name in twice)
        raise ValueError(f"--init-from {given.init_from} decides {names}; leave them out")
    kwargs = dict(config["overrides"])
    decided = {"model": config["architecture"], "image_size": config["event_shape"][-1]}
    decided |= {"coupling": kwargs.pop("coupling", None), "model_kwargs": kwargs}
    return decided | ({"solve_at": 0} if given.estimator in ("fpi", "gradient", "data") else {})


def start_from(flow: Flow, source: str) -> None:
    """Copy the bijection of a trained flow into ``flow``, in place; the class Gaussians stay as they are.

    Raises:
        ValueError: the images have another shape than the trained flow's.
    """
    trained = load_flow(source)
    if trained.event_shape != flow.event_shape:
        raise ValueError(
            f"the flow at {source!r} takes images of shape {trained.event_shape}, the data have {flow.event_shape}; "
            "start from a flow of the same channels"
        )
    flow.bijection.load_state_dict(trained.bijection.state_dict())
