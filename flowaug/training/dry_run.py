"""What a training will do, hold and take, before it starts: ``--dry-run`` of both scripts."""

import argparse
import copy
import math
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

GIB = 2**30
PROBE = 1024  # side of the matrices whose product measures the device


class Cost(NamedTuple):
    """What one image costs: floating-point operations of a forward pass, bytes kept for the backward pass."""

    flops: float
    activations: float


def cost_per_image(model: nn.Module, inputs: tuple[Tensor, ...]) -> Cost:
    """Count on the meta device, without computing anything.

    Args:
        model: any module; left as it is.
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
    """Floating-point operations per second of a matrix product on ``device``."""
    a = torch.ones(PROBE, PROBE, device=device, dtype=dtype)
    products, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        float((a @ a)[0, 0])  # waits for the device
        products += 1
    return products * 2 * PROBE**3 / (time.perf_counter() - began)


def flow_plan(args: argparse.Namespace, flow: nn.Module, dataset, val_images: int, accelerator) -> str:
    """The plan of ``train_flow.py`` as text."""
    device = accelerator.device
    x, y = torch.rand(2, *flow.event_shape), torch.zeros(2, dtype=torch.int64)
    cost = cost_per_image(flow, (x, y))
    images = args.steps * args.batch_size * accelerator.num_processes
    parameters = _count(flow)
    kept = 0.25 * cost.activations if args.recompute else cost.activations
    memory = 20 * parameters + kept * args.batch_size  # weights, gradients, two moments, the average
    own = len(dataset) * flow.dim + val_images * flow.dim
    gaussians = args.estimator + (f", λ' = {args.kld_weight:g}" if args.kld_weight is not None else "")
    speed = measured_speed(device, getattr(torch, args.conditioner_dtype)) * accelerator.num_processes
    return _lines(
        data=_data_line(dataset, val_images),
        flow=f"{args.model}, {parameters / 1e6:.2f} M parameters, images {tuple(flow.event_shape)}"
        + (f", from {args.init_from}" if args.init_from else ""),
        gaussians=gaussians + (f", solved for after {args.solve_at} steps" if args.solve_at is not None else ""),
        training=_steps_line(args.steps, args.batch_size, accelerator, images / len(dataset)),
        memory=f"about {memory / GIB:.2f} GiB a process to train, {own / GIB:.2f} GiB for the images",
        time=_time_line(3 * cost.flops * images, speed, device),
        output=_output_line(args),
    )


def classifier_plan(args: argparse.Namespace, model: nn.Module, input_size, sets, steps: int, flow: str, accelerator):
    """The plan of ``finetune.py`` as text.

    Args:
        args: options.
        model: the classifier.
        input_size: (C, H, W) of it.
        sets: training and val data sets.
        steps: optimiser steps.
        flow: what --flow-aug comes to.
        accelerator: where it would run.
    """
    cost = cost_per_image(model, (torch.rand(2, *input_size),))
    per_step = args.batch_size * args.grad_accum_steps
    images, parameters = steps * per_step * accelerator.num_processes, _count(model)
    share = 0.5 if args.amp else 1.0
    memory = (20 if args.model_ema else 16) * parameters + share * cost.activations * args.batch_size
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp, torch.float32)
    speed = measured_speed(accelerator.device, dtype) * accelerator.num_processes
    return _lines(
        data=_data_line(sets[0], len(sets[1])),
        classifier=f"{args.model}, {parameters / 1e6:.2f} M parameters, input {tuple(input_size)}, "
        f"{cost.flops / 1e9:.2f} GFLOP an image",
        flow=flow,
        training=_steps_line(steps, per_step, accelerator, images / len(sets[0]))
        + f"; {args.opt}, lr {args.lr:g}, {args.sched}",
        memory=f"about {memory / GIB:.2f} GiB a process",
        time=_time_line(3 * cost.flops * images, speed, accelerator.device),
        output=_output_line(args),
    )


def copies_memory(copies: int | None, images: int, shape: tuple[int, int, int]) -> str:
    """What the images and their ``copies`` take at the flow's ``shape`` (C, H, W); nothing is said without copies."""
    if not copies:
        return ""
    return f"; --flow-aug-copies takes {(copies + 1) * images * math.prod(shape) / GIB:.2f} GiB on the host"


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _data_line(dataset, val_images: int) -> str:
    shape = "×".join(map(str, (*dataset.image_size, dataset.channels)))
    return (
        f"{dataset.name}: {len(dataset)} training and {val_images} val images of {shape}, "
        f"{len(dataset.class_names)} classes"
    )


def _steps_line(steps: int, per_step: int, accelerator, epochs: float) -> str:
    processes = f" on each of {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return f"{steps} steps of {per_step} images{processes}, {epochs:.1f} epochs, on {accelerator.device}"


def _time_line(flops: float, speed: float, device: torch.device) -> str:
    seconds = flops / speed
    unit, size = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if seconds >= s or s == 1)
    return f"not under {seconds / size:.1f} {unit}: {flops:.2g} FLOP at {speed / 1e9:.0f} GFLOP/s measured on {device}"


def _output_line(args: argparse.Namespace) -> str:
    state = args.output / "state.safetensors"
    found = "; would resume the run there" if args.resume == "auto" and state.is_file() else ""
    return f"{args.output}{found}"


def _lines(**parts: str) -> str:
    return "\n".join(f"{name:<11}{text}" for name, text in parts.items())
