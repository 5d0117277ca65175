"""The plan of a training: what it will do, hold and take; printed at its start, and alone by ``--dry-run``."""

import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowaug.data.transforms import DataConfig
from flowaug.flows.flow import Flow
from flowaug.training.classifier import StepPlan
from flowaug.training.options import FinetuneOptions, RunOptions, TrainFlowOptions

GIB = 2**30
PROBE_SIDE = 1024  # side of the matrices whose product measures the device


class Cost(NamedTuple):
    """Cost of one image: floating-point operations of a forward pass, bytes kept for the backward pass."""

    flops: float
    activations: float


def cost_per_image(model: nn.Module, inputs: tuple[Tensor, ...]) -> Cost:
    """Count on the meta device, without computing anything.

    Args:
        model: any module; not changed.
        inputs: a small batch for it, on any device.
    """
    shadow, kept = copy.deepcopy(model).to("meta"), {}
    parameters = {p.untyped_storage()._cdata for p in shadow.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = 0 if storage._cdata in parameters else storage.nbytes()
        return tensor  # held by the graph, so that no other storage takes its place

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = shadow(*(tensor.to("meta") for tensor in inputs))
    del result
    return Cost(counter.get_total_flops() / len(inputs[0]), sum(kept.values()) / len(inputs[0]))


def measured_speed(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Return the floating-point operations per second of a matrix product on ``device``."""
    a = torch.ones(PROBE_SIDE, PROBE_SIDE, device=device, dtype=dtype)
    products, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        float((a @ a)[0, 0])  # waits for the device
        products += 1
    return products * 2 * PROBE_SIDE**3 / (time.perf_counter() - began)


def flow_plan(options: TrainFlowOptions, flow: Flow, dataset, val_images: int, accelerator: Accelerator) -> str:
    """Return the plan of a flow training as text.

    Args:
        options: options whose schedule fits the data.
        flow: the flow.
        dataset: the training set.
        val_images: images of the validation set.
        accelerator: where it runs.
    """
    training, gaussians = options.training, options.gaussians
    x, y = torch.rand(2, *flow.event_shape), torch.zeros(2, dtype=torch.int64)
    cost = cost_per_image(flow, (x, y))
    images = training.steps * training.batch_size * accelerator.num_processes
    parameters = _count(flow)
    kept = 0.25 * cost.activations if training.grad_checkpointing else cost.activations
    memory = 20 * parameters + kept * training.batch_size  # weights, gradients, two moments, the average
    own = (len(dataset) + val_images) * flow.dim
    speed = measured_speed(accelerator.device, getattr(torch, training.conditioner_dtype)) * accelerator.num_processes
    weight = f", λ' = {gaussians.kld_weight:g}" if gaussians.uses("kld_weight") else ""
    solve_at = f", solved for at step {gaussians.solve_step(training.steps)}" if gaussians.uses("solve_at") else ""
    source = f", starting from {options.flow.init_from}" if options.flow.init_from else ""
    return _lines(
        data=_data_line(dataset, val_images),
        flow=f"{options.flow.model}, {_millions(parameters)}, images {tuple(flow.event_shape)}{source}",
        gaussians=f"{gaussians.estimator}{weight}{solve_at}",
        training=_steps_line(training.steps, training.batch_size, accelerator, images / len(dataset))
        + f"; {training.opt}, lr {training.lr:g}, {training.lr_schedule} schedule",
        memory=f"about {_size(memory)} per process to train, {_size(own)} for the images",
        time=_time_line(3 * cost.flops * images, speed, accelerator.device),
        output=_output_line(options.run),
    )


def classifier_plan(
    options: FinetuneOptions,
    model: nn.Module,
    config: DataConfig,
    sets: tuple,
    plan: StepPlan,
    flow: str,
    accelerator: Accelerator,
) -> str:
    """Return the plan of a fine-tuning as text.

    Args:
        options: options.
        model: the classifier.
        config: its data configuration.
        sets: training and validation set.
        plan: optimizer steps.
        flow: what --flow-aug stands for.
        accelerator: where it runs.
    """
    training, schedule = options.training, options.schedule
    cost = cost_per_image(model, (torch.rand(2, *config.input_size),))
    per_step = training.batch_size * training.grad_accum_steps
    images = plan.batches_before(plan.steps) * training.batch_size * accelerator.num_processes
    parameters = _count(model)
    memory = (20 if training.model_ema else 16) * parameters
    memory += (0.5 if training.amp in ("bf16", "fp16") else 1.0) * cost.activations * training.batch_size
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(training.amp or "no", torch.float32)
    speed = measured_speed(accelerator.device, dtype) * accelerator.num_processes
    return _lines(
        data=_data_line(sets[0], len(sets[1])),
        classifier=f"{options.classifier.model}, {_millions(parameters)}, input {config.input_size}, "
        f"{cost.flops / 1e9:.2g} GFLOP per image",
        flow=flow,
        training=_steps_line(plan.steps, per_step, accelerator, plan.passes() * training.epoch_repeats)
        + f"; {training.opt}, lr {schedule.lr:g}, {schedule.sched} schedule, mixed precision {training.amp or 'no'}",
        memory=f"about {_size(memory)} per process",
        time=_time_line(3 * cost.flops * images, speed, accelerator.device),
        output=_output_line(options.run),
    )


def copies_memory(copies: int | None, images: int, shape: tuple[int, ...]) -> str:
    """Return a note on the memory of ``--flow-aug-copies`` at the flow's ``shape`` (C, H, W), or "" without copies."""
    if not copies:
        return ""
    return f"; --flow-aug-copies takes {_size((copies + 1) * images * math.prod(shape))} of memory"


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M parameters"


def _size(count: float) -> str:
    """Return a number of bytes in a readable unit."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{max(1, round(count / 2**20))} MiB"


def _data_line(dataset, val_images: int) -> str:
    shape = "×".join(map(str, (*dataset.image_size, dataset.channels)))
    return (
        f"{dataset.name}: {len(dataset)} training and {val_images} validation images, {len(dataset.class_names)} "
        f"classes; the first image is {shape}"
    )


def _steps_line(steps: int, per_step: int, accelerator: Accelerator, epochs: float) -> str:
    processes = f" on each of {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return f"{steps} steps of {per_step} images{processes}, {epochs:.1f} epochs, on {accelerator.device}"


def _time_line(flops: float, speed: float, device: torch.device) -> str:
    seconds = flops / speed
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= s or s == 1)
    return f"at least {seconds / size:.1f} {unit}: {flops:.2g} FLOP at {speed / 1e9:.0f} GFLOP/s measured on {device}"


def _output_line(run: RunOptions) -> str:
    found = run.resume == "auto" and (Path(run.output) / "state.safetensors").is_file()
    return f"{run.output}" + ("; resumes the interrupted run there" if found else "")


def _lines(**parts: str) -> str:
    return "\n".join(f"{name:<11}{text}" for name, text in parts.items())
