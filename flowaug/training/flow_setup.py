"""The start of a flow training: a schedule that fits the data, the flow, its initial parameters and its images."""

import dataclasses

import torch
from accelerate import Accelerator

from flowaug.flows.checkpoint import load_flow
from flowaug.flows.flow import Flow
from flowaug.flows.passes import ImageTable
from flowaug.flows.registry import create_flow
from flowaug.training.flow_batches import augment
from flowaug.training.options import FlowOptions, FlowTrainingOptions, TrainFlowOptions

INIT_IMAGES = 512
DECAY_RATIO = 0.4
OWN_COUPLINGS = ("jet_",)  # architectures whose couplings cannot be chosen


def learning_rate(step: int, options: FlowTrainingOptions) -> float:
    """Return the learning rate of a step: linear warm-up, then as ``--lr-schedule`` says."""
    warm = min(1.0, (step + 1) / max(options.warmup_steps, 1))
    if options.lr_schedule == "halving":
        return options.lr * warm * 0.5 ** (3 * step // options.steps)
    return options.lr * min(warm, (options.steps - step) / ((options.decay_ratio or DECAY_RATIO) * options.steps))


def fit_schedule(options: TrainFlowOptions, images: int, num_processes: int) -> TrainFlowOptions:
    """Return the options with every step number inside the training.

    Args:
        options: options as given.
        images: number of training images.
        num_processes: processes that share them.

    Raises:
        ValueError: SWA would never begin.
    """
    training = options.training
    per_epoch = max(1, images // (training.batch_size * num_processes))
    steps = min(training.steps, training.max_epochs * per_epoch)
    if training.swa_from is not None and training.swa_from >= steps:
        raise ValueError(f"--swa-from {training.swa_from} is never reached in {steps} steps; choose an earlier step")
    training = dataclasses.replace(training, steps=steps, warmup_steps=min(training.warmup_steps, steps // 4))
    return dataclasses.replace(options, training=training)


def create(options: FlowOptions, dataset, seed: int) -> Flow:
    """Create the flow for a data set."""
    coupling = {} if options.model.startswith(OWN_COUPLINGS) else {"coupling": options.coupling or "affine"}
    flow = create_flow(
        options.model,
        event_shape=(dataset.channels, options.image_size, options.image_size),
        num_classes=len(dataset.class_names),
        grey_levels=2**options.bits if options.bits else dataset.grey_levels,
        seed=seed,
        **coupling,
        **options.model_kwargs,
    )
    flow.class_names = dataset.class_names
    return flow


def initialise(flow: Flow, table: ImageTable, options: TrainFlowOptions) -> None:
    """Set the flow's parameters to those of ``--init-from``, or from the data, alike on every process."""
    if options.flow.init_from:
        return start_from(flow, options.flow.init_from)
    generator = torch.Generator().manual_seed(options.training.seed)
    chosen = torch.randperm(len(table), generator=generator)[:INIT_IMAGES]
    x = augment(table.images[chosen], options.transforms, generator)
    return flow.initialise(flow.dequantise(x, generator))


def start_from(flow: Flow, source: str) -> None:
    """Copy the bijection of a trained flow into ``flow``, in place; the class Gaussians stay as they are.

    Raises:
        ValueError: the trained flow takes images of another shape.
    """
    trained = load_flow(source)
    if trained.event_shape != flow.event_shape:
        raise ValueError(
            f"the flow at {source!r} takes images of shape {trained.event_shape}, the data have {flow.event_shape}; "
            "start from a flow with the same number of channels"
        )
    flow.bijection.load_state_dict(trained.bijection.state_dict())


def read_table(data, train, size: int, accelerator: Accelerator) -> ImageTable:
    """Read a split into memory at the flow's image size, with the channels and classes of the training set."""
    images, targets = data.read_table((size, size), train.channels)
    process = accelerator.process_index, accelerator.num_processes
    return ImageTable(images, targets, len(train.class_names), 256, *process)
