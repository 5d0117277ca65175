"""The training loop that all arms of ``augmentation_gain.py`` share."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowaug import FlowMixupTransform
from flowaug.data import ImageDataset, create_loader
from flowaug.data.loaders import endless_batches, seeded
from flowaug.data.transforms import Preprocess, eval_transform, train_transform
from flowaug.training.classifier import (
    accuracy,
    create_classifier,
    create_loss,
    create_optimizer,
    create_schedule,
    memory_format,
)
from flowaug.training.options import FinetuneOptions
from flowaug.training.pipeline import BatchPipeline, create_pipeline, loaded_size
from flowaug.training.resume import TrainingState

CPU = torch.device("cpu")
EVAL_BATCH_SIZE = 250
SAVE_EVERY = 100  # steps between training states

Sets = tuple[ImageDataset, ImageDataset]  # training set, evaluation set


def train(options: FinetuneOptions, sets: Sets, transform: FlowMixupTransform | None, folder: Path, name: str) -> dict:
    """Train a classifier and evaluate it once, at the end.

    The initial weights and the order depend on the seed only, so that arms with the same seed are paired. An
    interrupted run resumes from its last state. The global random number generators are left unchanged.

    Args:
        options: options of the classifier.
        sets: training set and evaluation set.
        transform: augmentation of batches, or None.
        folder: folder of the training state.
        name: label of the progress bar.

    Returns:
        Accuracy, number of steps, last loss, milliseconds per image and the counts of ``transform``.
    """
    training, schedule = options.training, options.schedule
    steps, seed = training.steps, training.seed
    model, pipeline, (train_loader, eval_loader) = build(options, sets, transform)
    optimizer = create_optimizer(model, training, schedule)
    scheduler = create_schedule(optimizer, schedule, steps)
    parts = (model, optimizer) if transform is None else (model, optimizer, transform)
    state = TrainingState(folder, {"options": options.training_options()}, *parts)
    start = state.restore(steps)

    stream, seconds = endless_batches(train_loader, start), torch.zeros(2)
    model.train()
    for step in tqdm(range(start, steps), name, steps, initial=start, unit=" steps", delay=2):
        scheduler.step(step)
        with seeded(seed, step):
            loss, times = train_step(options, model, pipeline, optimizer, stream, (seed, step))
        seconds += times
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < steps:
            state.save(step + 1)

    with precision(options):
        values = accuracy(model, eval_loader, pipeline.preprocess, CPU)
    state.discard()
    times = costs(seconds, train_loader.batch_size * (steps - start))
    counts = None if transform is None else transform.counts
    return {**values, "steps": steps, "last_loss": loss, **times, "counts": counts}


def build(
    options: FinetuneOptions, sets: Sets, transform: FlowMixupTransform | None
) -> tuple[nn.Module, BatchPipeline, tuple]:
    """Create the classifier, the augmentation of its batches, and the loaders of the training and evaluation set."""
    train_set, eval_set = sets
    num_classes, channels, seed = len(train_set.class_names), train_set.channels, options.training.seed
    with seeded(seed):
        model, config = create_classifier(options.classifier, num_classes, channels)
    model = model.to(memory_format=memory_format(options.classifier.channels_last))

    preprocess = Preprocess(config.input_size, config.mean, config.std)
    pipeline = create_pipeline(preprocess, options.transforms, num_classes, CPU, transform)

    size, batch_size = loaded_size(config, train_set), min(options.training.batch_size, len(train_set))
    whole = dataclasses.replace(config, input_size=(channels, *size), crop_pct=1.0, crop_mode="center")
    augment = train_transform(size, channels, options.transforms)
    train_loader = create_loader(train_set, augment, batch_size, True, seed, drop_last=True)
    eval_loader = create_loader(eval_set, eval_transform(whole), EVAL_BATCH_SIZE, False, 0)
    return model, pipeline, (train_loader, eval_loader)


def train_step(
    options: FinetuneOptions,
    model: nn.Module,
    pipeline: BatchPipeline,
    optimizer: torch.optim.Optimizer,
    stream: Iterator,
    numbers: tuple[int, ...],
) -> tuple[float, Tensor]:
    """Update the weights once.

    Args:
        options: options of the classifier.
        model: the classifier.
        pipeline: augmentation of batches.
        optimizer: optimizer of ``model``.
        stream: batches of images and labels.
        numbers: seed of flow mixup in this step.

    Returns:
        The loss, and the seconds (2,) of loading and augmenting the batch and of everything else.
    """
    began = time.perf_counter()
    if pipeline.flow_mixup is not None:
        pipeline.flow_mixup.reseed(*numbers)
    x, y = pipeline(*next(stream))
    augmented = time.perf_counter()

    criterion = create_loss(options.transforms.mixes, options.transforms.smoothing)
    layout = memory_format(options.classifier.channels_last)
    with precision(options):
        loss = criterion(model(x.contiguous(memory_format=layout)), y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), options.training.clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), torch.tensor([augmented - began, time.perf_counter() - augmented])


def precision(options: FinetuneOptions) -> torch.autocast:
    """Return the autocast context of the forward pass."""
    return torch.autocast("cpu", torch.bfloat16, enabled=options.training.amp == "bf16")


def costs(seconds: Tensor, images: int) -> dict[str, float]:
    """Return milliseconds per image: ``augment_ms`` to load and augment it, ``step_ms`` for the whole step."""
    augmenting, rest = (1000 * seconds / images).tolist()
    return {"augment_ms": augmenting, "step_ms": augmenting + rest}
