"""What ``finetune.py`` builds before its loop: the classifier and its weights, the schedule, the way of a batch."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from timm.data import Mixup, resolve_data_config
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_state_dict
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from flowaug.checkpoint import CONFIG, WEIGHTS, pack, write_atomic, write_json
from flowaug.classifier import BatchPipeline, eval_transform, train_transform
from flowaug.copies import AugmentedCopies
from flowaug.data import ImageDataset, create_loader

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")


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


def _weights(args: argparse.Namespace) -> dict:
    """How timm is to find the weights."""
    if args.checkpoint is None:
        published = timm.models.is_model_pretrained(args.model) if args.pretrained is None else args.pretrained
        return {"pretrained": published and not args.dry_run}  # a plan downloads nothing
    tensors = read_checkpoint(args.checkpoint, args.model, args.model_kwargs)
    config = timm.models.get_pretrained_cfg(args.model.split(":")[-1])
    head = tensors.get(f"{_head(config)}.weight")
    overlay = {"state_dict": tensors, "num_classes": len(head) if head is not None else 0, "source": ""}
    return {"pretrained": True, "pretrained_cfg_overlay": overlay | {"custom_load": False}}


def _head(config) -> str:
    head = config.classifier if config is not None else None
    return head if isinstance(head, str) else ""


def read_checkpoint(path: Path, name: str, model_kwargs: dict | None = None) -> dict[str, Tensor]:
    """Weights of a timm model from a file; the names of another code base are matched one for one, by order.

    Args:
        path: ``.safetensors``, or a ``.pth`` that holds tensors only: nothing else is unpickled.
        name: timm model.
        model_kwargs: further arguments of its constructor.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not weights, or of another architecture.
    """
    if not Path(path).is_file() or Path(path).suffix not in WEIGHT_FILES:
        raise FileNotFoundError(f"no weights at {str(path)!r}; expected a file ending in {', '.join(WEIGHT_FILES)}")
    try:
        tensors = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each raise their own
        raise ValueError(
            f"{path} holds no weights that can be read safely ({type(error).__name__}: {error})"
        ) from error
    with torch.device("meta"):
        expected = timm.create_model(name, **(model_kwargs or {})).state_dict()
    if set(expected) & set(tensors):
        return tensors
    return _match_by_order(tensors, expected, path, name)


def _match_by_order(tensors: dict[str, Tensor], expected: dict[str, Tensor], path: Path, name: str) -> dict:
    theirs, ours = ([tuple(t.shape) for t in part.values()] for part in (tensors, expected))
    if theirs != ours:
        raise ValueError(
            f"{path} has other names than {name!r} and its {len(theirs)} tensors do not match the model's {len(ours)} "
            "in order and shape; it belongs to another architecture"
        )
    return dict(zip(expected, tensors.values(), strict=True))


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """Memory format of the classifier and its input."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


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


def create_pipeline(args: argparse.Namespace, spec, flow_mixup, num_classes: int, device) -> BatchPipeline:
    """The way of a batch to the classifier of ``spec = (input size, mean, std)``, on ``device``."""
    erasing = RandomErasing(args.reprob, mode="pixel", device=str(device)) if args.reprob else None
    off = {"flow_off_epoch": args.flow_aug_off_epoch, "mixup_off_epoch": args.mixup_off_epoch}
    return BatchPipeline(*spec, flow_mixup, create_mixup(args, num_classes), erasing, **off).to(device)


def create_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Build timm's Mixup and CutMix, or None when neither is asked for."""
    if not (args.mixup or args.cutmix):
        return None
    return Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)


def create_loss(args: argparse.Namespace) -> nn.Module:
    """Cross entropy: of soft labels where Mixup or CutMix makes them, else of hard ones, smoothed if asked for."""
    if args.mixup or args.cutmix:
        return SoftTargetCrossEntropy()
    return nn.CrossEntropyLoss(label_smoothing=args.smoothing)


def loaded_size(input_size: tuple[int, int, int], dataset: ImageDataset) -> int:
    """Height and width at which images are loaded: the model's, or the data set's own if that is smaller."""
    return min(input_size[-1], max(dataset.image_size))


def create_copies(args: argparse.Namespace, dataset: ImageDataset, flow_mixup, input_size, *share) -> AugmentedCopies:
    """The copies of ``--flow-aug-copies``; with ``--flow-aug-or-aa`` those that the flow has moved are spared --aa.

    ``share`` is (rank, world_size, reduce) of `AugmentedCopies` where there are several processes.
    """
    for_moved = None
    if args.flow_aug_or_aa:
        spared = argparse.Namespace(**{**vars(args), "aa": None})
        for_moved = train_transform(loaded_size(input_size, dataset), input_size[0], spared)
    return AugmentedCopies(dataset, flow_mixup, args.flow_aug_copies, args.seed, for_moved, *share)


def create_loaders(args: argparse.Namespace, sets, input_size: tuple[int, int, int], accelerator: Accelerator):
    """Loaders of uint8 images; those smaller than the model's input are enlarged on the device, after the flow."""
    train_set, val_set = sets
    size = loaded_size(input_size, train_set)
    place = (accelerator.process_index, accelerator.num_processes)
    batch = min(args.batch_size, len(train_set) // accelerator.num_processes)
    options = (args.seed, args.workers, *place)
    transform = train_transform(size, input_size[0], args)
    train = create_loader(train_set, transform, batch, True, *options, drop_last=True, copies=args.dataset_copies)
    return train, create_loader(val_set, eval_transform(size), batch, False, *options)


def count_steps(args: argparse.Namespace, loader) -> tuple[int, int]:
    """Optimiser steps of the training, and of an epoch."""
    per_epoch = max(1, len(loader) // args.grad_accum_steps)
    return args.steps or args.epochs * per_epoch, per_epoch


def evaluation_steps(steps: int, per_epoch: int) -> int:
    """Steps between evaluations: whole epochs, ten times in all at most."""
    return per_epoch * max(1, math.ceil(steps / per_epoch) // 10)
