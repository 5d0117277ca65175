"""What ``finetune.py`` builds before its loop: the classifier and its weights, the schedule, the way of a batch."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.data import resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowaug.files import pack, write_atomic, write_json
from flowaug.flows.checkpoint import CONFIG, WEIGHTS
from flowaug.training.pipeline import BatchPipeline
from flowaug.training.weights import _weights


def create_classifier(args: argparse.Namespace, num_classes: int, channels: int):
    """Build the timm model of ``--model``.

    Returns:
        The model and ((C, H, W) of its input, mean, std).

    Raises:
        ValueError: an unknown model, or weights that do not fit it.
        FileNotFoundError: no weights at ``--checkpoint``.
    """
    _check_name(args.model)
    model = _create_model(args.model, _constructor_options(args, num_classes, channels) | _weights(args))
    model.pretrained_cfg.pop("state_dict", None)  # or every copy of the model would copy the checkpoint too
    config = resolve_data_config({"img_size": args.img_size} if args.img_size else {}, model=model)
    side = config["input_size"][-1]
    mean, std = (v if channels == 3 else (sum(v) / 3,) for v in (config["mean"], config["std"]))
    return model, ((channels, side, side), mean, std)


def _constructor_options(args: argparse.Namespace, num_classes: int, channels: int) -> dict:
    options = {"num_classes": num_classes, "in_chans": channels, **args.model_kwargs}
    if args.drop:
        options["drop_rate"] = args.drop
    if args.drop_path:
        options["drop_path_rate"] = args.drop_path
    if args.img_size and _takes_img_size(args.model, options):
        options["img_size"] = args.img_size
    return options


def write_classifier(
    folder: Path, args: argparse.Namespace, model: nn.Module, pipeline: BatchPipeline, class_names: Sequence[str]
) -> None:
    """Write what ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads: weights and ``config.json``."""
    mean, std = (getattr(pipeline, name).flatten().tolist() for name in ("mean", "std"))
    layers = {name: model.pretrained_cfg.get(name) for name in ("first_conv", "classifier")}
    data = {"input_size": pipeline.input_size, "mean": mean, "std": std, "interpolation": "bicubic", "crop_pct": 1.0}
    config = {
        "architecture": model.pretrained_cfg["architecture"],
        "num_classes": len(class_names),
        "num_features": model.num_features,
        "label_names": list(class_names),
        "model_args": _constructor_options(args, len(class_names), pipeline.input_size[0]),
        "pretrained_cfg": data | layers | {"num_classes": len(class_names)},
    }
    write_json(folder / CONFIG, config)
    write_atomic(folder / WEIGHTS, pack(model.state_dict()))


def _create_model(name: str, options: dict) -> nn.Module:
    try:
        return timm.create_model(name, **options)
    except OSError as error:  # no network, no such file on the hub
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"the weights of {name} cannot be fetched ({reason}); give a file with --checkpoint, or --no-pretrained to "
            "start from random ones"
        ) from error


def _check_name(name: str) -> None:
    if not timm.is_model(timm.models.parse_model_name(name)[1].split(".")[0]) and ":" not in name:
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"timm has no model {name!r}; models of a like name: {close}")


def _takes_img_size(name: str, options: dict) -> bool:
    """Whether the constructor has an ``img_size``: those of convolutional networks refuse it."""
    try:
        with torch.device("meta"):
            timm.create_model(name, img_size=64, **options)
    except TypeError:
        return False
    except (AssertionError, ValueError, RuntimeError):  # 64 does not suit its patches, so it does read the size
        return True
    return True


def create_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Timm's optimiser of ``--opt``, with layer-wise decay of the learning rate if ``--layer-decay`` is given."""
    options = {"opt": args.opt, "lr": args.lr, "weight_decay": args.weight_decay, "momentum": args.momentum}
    return create_optimizer_v2(model, layer_decay=args.layer_decay, **options)


def create_schedule(args: argparse.Namespace, optimizer, steps: int):
    """Timm's scheduler of ``--sched`` over ``steps``; what timm calls an epoch is one step here."""
    cycle = max(1, steps // args.lr_cycles)
    return create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=cycle,
        min_lr=args.min_lr,
        warmup_epochs=int(args.warmup_share * steps),
        warmup_lr=args.lr / 100,
        decay_epochs=max(1, round(args.decay_share * steps)),
        decay_rate=args.decay_rate,
        cycle_limit=args.lr_cycles,
        cycle_decay=args.lr_cycle_decay,
        step_on_epochs=True,
    )[0]


def create_loss(args: argparse.Namespace) -> nn.Module:
    """Cross entropy: of soft labels where Mixup or CutMix makes them, else of hard ones, smoothed if asked for."""
    if args.mixup or args.cutmix:
        return SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=args.smoothing)


def count_steps(args: argparse.Namespace, loader) -> tuple[int, int]:
    """Optimiser steps of the training, and of an epoch."""
    per_epoch = max(1, len(loader) // args.grad_accum_steps)
    return args.steps or args.epochs * per_epoch, per_epoch


def evaluation_steps(steps: int, per_epoch: int) -> int:
    """Steps between evaluations: whole epochs, ten times in all at most."""
    return per_epoch * max(1, math.ceil(steps / per_epoch) // 10)


@torch.no_grad()
def accuracy(
    model: nn.Module, loader, pipeline: BatchPipeline, device: torch.device, reduce=lambda t: t, real=None
) -> dict:
    """Top-1 and top-5 accuracy and the number of images, over all processes, each image counted once.

    Processes may have different numbers of batches: they meet only at the end, so a model that is wrapped for training
    on several processes, which would exchange buffers at every batch, is looked into.

    Args:
        model: classifier; left in the mode it was in.
        loader: this process's share of (uint8 images, labels).
        pipeline: what brings images to the classifier's input.
        device: where the model lives.
        reduce: sums a tensor over the processes.
        real: ImageNet's ReaL labels, for ``real_top1`` and ``real_top5``; None leaves them out.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    was_training = model.training
    model.eval()
    if real is not None:
        real.reset()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y in loader:
        logits = model(pipeline.evaluate(x.to(device)))
        best = logits.topk(min(5, logits.shape[1]), 1).indices == y.to(device)[:, None]
        sums += torch.stack([best[:, 0].sum(), best.any(1).sum(), sums.new_tensor(len(y))])
        if real is not None:
            real.add(logits)
    model.train(was_training)
    top1, top5, count = reduce(sums).tolist()
    values = {"top1": top1 / count, "top5": top5 / count, "images": int(count)}
    return values if real is None else values | _real_accuracy(reduce(real.sums().to(device)))


def _real_accuracy(sums: Tensor) -> dict:
    top1, top5, count = sums.tolist()
    return {"real_top1": top1 / max(count, 1), "real_top5": top5 / max(count, 1)}
