"""The classifier of a fine-tuning: its construction, optimizer, schedule, loss, evaluation and output folder."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flowaug.data.transforms import DataConfig, Preprocess
from flowaug.files import pack, write_atomic, write_json
from flowaug.flows.checkpoint import CONFIG, WEIGHTS
from flowaug.training.options import DEFAULT_EPOCHS, ClassifierOptions, ClassifierTrainingOptions, ScheduleOptions
from flowaug.training.weights import describe_misfit, weight_keywords


def create_classifier(
    options: ClassifierOptions, num_classes: int, channels: int, load_weights: bool = True
) -> tuple[nn.Module, DataConfig]:
    """Create a timm model and return it with its data configuration.

    Args:
        options: which model and which weights.
        num_classes: number of classes K.
        channels: channels of the images, 1 or 3.
        load_weights: False downloads nothing and starts from random weights, for a plan.

    Raises:
        ValueError: an unknown model, or weights that do not fit it.
        FileNotFoundError: there are no weights at ``options.checkpoint``.
    """
    _check_name(options.model)
    keywords = weight_keywords(options.model, options.pretrained, options.checkpoint, options.model_kwargs)
    if not load_weights and options.checkpoint is None:
        keywords = {"pretrained": False}
    try:
        model = _create_model(options.model, constructor_options(options, num_classes, channels) | keywords)
    except (RuntimeError, LookupError, AttributeError) as error:
        if options.checkpoint is None:
            raise
        message = describe_misfit(options.checkpoint, options.model, keywords, channels, error)
        raise ValueError(message) from error
    pretrained_cfg(model).pop("state_dict", None)  # or every copy of the model would copy the checkpoint too
    return model, data_config(options, model, channels)


def data_config(options: ClassifierOptions, model: nn.Module, channels: int) -> DataConfig:
    """Return timm's data configuration of a model, changed by the options; statistics of RGB are averaged for grey."""
    names = ("img_size", "crop_pct", "crop_mode", "interpolation")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    config = resolve_data_config(given, model=model)
    mean, std = (tuple(v) if channels == 3 else (sum(v) / len(v),) for v in (config["mean"], config["std"]))
    height, width = config["input_size"][1:]
    crop = {name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")}
    return DataConfig((channels, height, width), mean, std, **crop)


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return timm's description of a model and its weights."""
    return cast(Any, model).pretrained_cfg


def constructor_options(options: ClassifierOptions, num_classes: int, channels: int) -> dict[str, Any]:
    """Return the arguments of the model's constructor."""
    keywords = {"num_classes": num_classes, "in_chans": channels, **options.model_kwargs}
    if options.drop:
        keywords["drop_rate"] = options.drop
    if options.drop_path:
        keywords["drop_path_rate"] = options.drop_path
    if options.img_size and _takes_img_size(options.model, keywords):
        keywords["img_size"] = options.img_size
    return keywords


def write_classifier(
    folder: Path, model: nn.Module, model_args: dict[str, Any], config: DataConfig, class_names: Sequence[str]
) -> None:
    """Write weights and the ``config.json`` that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads.

    Args:
        folder: the output folder.
        model: a trained timm model.
        model_args: arguments of its constructor.
        config: what it expects of its input.
        class_names: names in label order.
    """
    layers = {name: pretrained_cfg(model).get(name) for name in ("first_conv", "classifier")}
    content = {
        "architecture": pretrained_cfg(model)["architecture"],
        "num_classes": len(class_names),
        "num_features": model.num_features,
        "label_names": list(class_names),
        "model_args": model_args,
        "pretrained_cfg": asdict(config) | layers | {"num_classes": len(class_names)},
    }
    write_atomic(folder / WEIGHTS, pack(model.state_dict()))  # first: nothing that fails later can lose them
    write_json(folder / CONFIG, content)


def _create_model(name: str, keywords: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, **keywords)
    except OSError as error:  # no network, no such file on the hub
        reason = str(error).partition("\n")[0]
        raise OSError(
            f"the weights of {name} cannot be downloaded ({reason}); give a file with --checkpoint, or --no-pretrained "
            "to start from random weights"
        ) from error


def _check_name(name: str) -> None:
    if not timm.is_model(timm.models.parse_model_name(name)[1].split(".")[0]) and ":" not in name:
        close = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise ValueError(f"timm has no model {name!r}; models with a similar name: {close}")


def _takes_img_size(name: str, keywords: dict[str, Any]) -> bool:
    """Return whether the constructor has an ``img_size``; those of convolutional networks refuse it."""
    try:
        with torch.device("meta"):
            timm.create_model(name, img_size=64, **keywords)
    except TypeError:
        return False
    except (AssertionError, ValueError, RuntimeError):  # 64 does not suit its patches, so it does read the size
        return True
    return True


def create_optimizer(
    model: nn.Module, training: ClassifierTrainingOptions, schedule: ScheduleOptions
) -> torch.optim.Optimizer:
    """Create timm's optimizer, with layer-wise decay of the learning rate if the options ask for it."""
    return create_optimizer_v2(
        model,
        opt=training.opt,
        lr=schedule.lr,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        layer_decay=training.layer_decay,
    )


def create_schedule(optimizer: torch.optim.Optimizer, schedule: ScheduleOptions, steps: int) -> Scheduler:
    """Create timm's learning-rate scheduler over ``steps`` optimizer steps; what timm calls an epoch is one step."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=schedule.sched,
        num_epochs=max(1, steps // schedule.lr_cycles),
        min_lr=schedule.min_lr,
        warmup_epochs=int(schedule.warmup_ratio * steps),
        warmup_lr=schedule.lr / 100,
        decay_epochs=max(1, round(schedule.decay_ratio * steps)),
        decay_rate=schedule.decay_rate,
        cycle_limit=schedule.lr_cycles,
        cycle_decay=schedule.lr_cycle_decay,
        step_on_epochs=True,
    )
    return cast(Scheduler, scheduler)


def create_loss(soft_labels: bool, smoothing: float) -> nn.Module:
    """Create the cross entropy: of soft labels after Mixup or CutMix, else of hard labels, smoothed."""
    return SoftTargetCrossEntropy() if soft_labels else nn.CrossEntropyLoss(label_smoothing=smoothing)


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the memory format of the classifier and its input."""
    return torch.channels_last if channels_last else torch.contiguous_format


class StepPlan:
    """The optimizer steps of a training: an epoch is one pass over the batches, whatever the accumulation.

    The last step of an epoch accumulates the batches that remain, as in timm's ``train.py``.

    Args:
        training: options with the length of the training.
        batches: batches per epoch of a process.
    """

    def __init__(self, training: ClassifierTrainingOptions, batches: int):
        self.batches, self.accumulation = batches, training.grad_accum_steps
        self.per_epoch = math.ceil(batches / self.accumulation)
        self.steps = training.steps or (training.epochs or DEFAULT_EPOCHS) * self.per_epoch

    def batches_before(self, step: int) -> int:
        """Return the number of batches that the first ``step`` steps use."""
        epoch, within = divmod(step, self.per_epoch)
        return epoch * self.batches + within * self.accumulation

    def batches_of(self, step: int) -> int:
        """Return the number of batches that a step accumulates."""
        return self.batches_before(step + 1) - self.batches_before(step)

    def passes(self) -> float:
        """Return the number of passes over the training set."""
        return self.batches_before(self.steps) / self.batches

    def is_evaluated(self, done: int) -> bool:
        """Return whether to evaluate after ``done`` steps: after whole epochs, at most ten times, and at the end."""
        epochs = max(1, math.ceil(self.steps / self.per_epoch) // 10)
        return done % (epochs * self.per_epoch) == 0 or done == self.steps


@torch.no_grad()
def accuracy(
    model: nn.Module,
    loader,
    preprocess: Preprocess,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] = lambda t: t,
    real=None,
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy and the number of images over all processes, each image counted once.

    Processes may have different numbers of batches and meet only at the end. A model that is wrapped for training on
    several processes would exchange buffers at every batch, so the wrapped model is used.

    Args:
        model: classifier; left in its present mode.
        loader: this process's part of the (uint8 images, labels).
        preprocess: from images in [0, 1] to the classifier's input.
        device: where the model is.
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
        logits = model(preprocess(x.to(device).float() / 255))
        best = logits.topk(min(5, logits.shape[1]), 1).indices == y.to(device)[:, None]
        sums += torch.stack([best[:, 0].sum(), best.any(1).sum(), sums.new_tensor(len(y))])
        if real is not None:
            real.add(logits)
    model.train(was_training)
    top1, top5, count = reduce(sums).tolist()
    values = {"top1": top1 / count, "top5": top5 / count, "images": int(count)}
    return values if real is None else values | _real_accuracy(reduce(real.sums().to(device)))


def _real_accuracy(sums: Tensor) -> dict[str, float]:
    top1, top5, count = sums.tolist()
    return {"real_top1": top1 / max(count, 1), "real_top5": top5 / max(count, 1)}
