"""Classifiers that judge images: any timm checkpoint, or a small model trained on the spot and kept."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models import load_checkpoint
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowaug.data import ImageDataset, stack_images
from flowaug.data.loaders import endless_table
from flowaug.data.transforms import random_hflip, random_shift
from flowaug.files import pack, write_atomic
from flowaug.training.pipeline import BatchPipeline

SMALL_MODEL, SMALL_STEPS, SMALL_BATCH = "test_resnet", 300, 64


class Oracle:
    """A frozen classifier of pixels.

    Args:
        model: takes normalised images (B, C, H, W), gives logits (B, K).
        input_size: (C, H, W) of the model.
        mean: normalisation per channel.
        std: normalisation per channel.
        name: what reports call it.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int], mean, std, name: str):
        self.model, self.name = model.eval().requires_grad_(False), name
        self.pipeline = BatchPipeline(input_size, mean, std)

    @classmethod
    def of(cls, model: nn.Module, name: str, channels: int | None = None, size: int | None = None) -> "Oracle":
        """Take a timm model with the normalisation and size of its own data configuration.

        Args:
            model: a timm model.
            name: what reports call it.
            channels: channels it was made for, where they differ from its configuration's.
            size: height and width to give it; default: the model's own.
        """
        config = resolve_model_data_config(model)
        channels = channels or config["input_size"][0]
        mean, std = (v if channels == 3 else (sum(v) / len(v),) for v in (config["mean"], config["std"]))
        shape = config["input_size"][1:] if size is None else (size, size)
        return cls(model, (channels, *shape), mean, std, name)

    def to(self, device: torch.device | str) -> "Oracle":
        """Move model and constants to a device, in place."""
        self.model.to(device)
        self.pipeline.to(device)
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The most likely label (B,) of each image (B, 1 or C, H, W) in [0, 1]."""
        return self.model(self._input(x)).argmax(1)

    @torch.no_grad()
    def probabilities(self, x: Tensor, mirrored: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        """The probability (B, K) of each class, of images (B, 1 or C, H, W) in [0, 1].

        Args:
            x: the images.
            mirrored: take the mean over each image and its mirror image.
            dtype: what the model computes in, where ``torch.autocast`` allows it.
        """
        views = torch.cat([x, x.flip(3)]) if mirrored else x
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            logits = self.model(self._input(views))
        return logits.float().softmax(1).unflatten(0, (-1, len(x))).mean(0)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Penultimate features (B, d), what the last layer sees, of images (B, 1 or C, H, W) in [0, 1].

        Raises:
            ValueError: the model is not one of timm.
        """
        return self._pooled(self._trunk(x))

    @torch.no_grad()
    def judge(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Most likely labels (B,) and penultimate features (B, d) by one pass; as for :meth:`features`."""
        hidden = self._trunk(x)
        return self.model.forward_head(hidden).argmax(1), self._pooled(hidden)

    def _trunk(self, x: Tensor) -> Tensor:
        if not (hasattr(self.model, "forward_features") and hasattr(self.model, "forward_head")):
            kind = type(self.model).__name__
            raise ValueError(f"{kind} has no forward_features and forward_head to stop at; take a model of timm")
        return self.model.forward_features(self._input(x))

    def _pooled(self, hidden: Tensor) -> Tensor:
        return self.model.forward_head(hidden, pre_logits=True).flatten(1)

    def _input(self, x: Tensor) -> Tensor:
        self.check_channels(x.shape[1])
        channels = self.pipeline.input_size[0]
        return self.pipeline.normalise(x.to(self.pipeline.mean.device).expand(-1, channels, -1, -1))

    def check_channels(self, channels: int) -> None:
        """Raise a ValueError unless it takes images of so many channels."""
        own = self.pipeline.input_size[0]
        if channels not in (1, own):
            raise ValueError(f"the oracle takes {own} channels but the images have {channels}; use another one")


def load_oracle(
    name: str,
    num_classes: int | None,
    channels: int = 3,
    checkpoint: Path | None = None,
    size: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Oracle:
    """Load a trained timm model.

    Args:
        name: timm model with weights of its own, a folder of ``finetune.py``, ``hf-hub:``, ``local-dir:``, or the
            architecture of ``checkpoint``.
        num_classes: classes K that the model must know, in the order of the data set; None for its features alone.
        channels: channels of the images that ``checkpoint`` was trained on.
        checkpoint: weights (.safetensors, or a .pth that holds tensors only).
        size: height and width to give it; default: the model's own.
        class_names: those of the data set, to compare with those that the model brings along, if it does.

    Raises:
        ValueError: unknown model, another number of classes, other names of them, or weights that do not fit.
        FileNotFoundError: no such checkpoint.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"no weights at {str(checkpoint)!r}; give a .safetensors or .pth file of {name!r}")
    name = f"local-dir:{name}" if checkpoint is None and Path(name).is_dir() else name
    try:
        options = {} if checkpoint is None else {"num_classes": num_classes, "in_chans": channels}
        model = timm.create_model(name, pretrained=checkpoint is None, **options)
        if checkpoint is not None:
            load_checkpoint(model, str(checkpoint), weights_only=True)
    except (RuntimeError, KeyError, SafetensorError) as error:  # unknown; a foreign config.json; damaged weights
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the oracle {name!r} cannot be loaded: {reason}") from error
    if num_classes not in (None, model.num_classes):
        raise ValueError(
            f"the oracle {name!r} knows {model.num_classes} classes but the data set has {num_classes}; give a "
            "checkpoint of this data set, or leave the oracle out to train a small one"
        )
    _check_class_names(name, model.pretrained_cfg.get("label_names"), class_names)
    return Oracle.of(model, name, channels if checkpoint else None, size)


def _check_class_names(name: str, theirs: Sequence[str] | None, ours: Sequence[str] | None) -> None:
    if None not in (theirs, ours) and list(theirs) != list(ours):
        raise ValueError(
            f"the oracle {name!r} knows the classes {list(theirs)}, the data set has {list(ours)}; its labels and its "
            "soft labels would be those of other classes: fine-tune it on this data set"
        )


def load_teacher(name: str, train: ImageDataset) -> Oracle:
    """Load the classifier whose soft labels a flow learns.

    Args:
        name: as for ``load_oracle``.
        train: the training images of the flow.

    Raises:
        ValueError: as ``load_oracle``, or it takes images of other channels.
    """
    teacher = load_oracle(name, len(train.class_names), train.channels, class_names=train.class_names)
    teacher.check_channels(train.channels)
    teacher.model.to(memory_format=torch.channels_last)
    return teacher


def small_oracle(
    train: ImageDataset,
    cache: Path,
    image_size: tuple[int, int],
    channels: int,
    steps: int = SMALL_STEPS,
    seed: int = 0,
) -> Oracle:
    """Train a small model on a data set, or take the one trained for it earlier.

    Args:
        train: training images; the judged ones should not be among them.
        cache: folder that keeps one file of weights per data set and setting.
        image_size: (H, W) at which the images are read, as those to be judged.
        channels: 1 or 3.
        steps: optimiser steps.
        seed: seed of weights, order and shifts.
    """
    path = cache / f"{train.name}-{_key(train, image_size, channels, steps, seed)}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(SMALL_MODEL, num_classes=len(train.class_names), in_chans=channels)
        oracle = untrained(model, channels, image_size, f"{SMALL_MODEL}, {steps} steps on {train.name}")
        if path.is_file():
            model.load_state_dict(load_file(path))
            return oracle
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        images = stack_images(train, image_size, channels)
        fit(oracle, images, train.targets, optimizer, scheduler, SMALL_BATCH, seed, smoothing=0.1)
    write_atomic(path, pack(model.state_dict()))
    return oracle


def untrained(model: nn.Module, channels: int, image_size: tuple[int, int], name: str) -> Oracle:
    """An oracle still to be fitted: images come in at 32 to 64 pixels a side, centred on 0."""
    side = max(32, min(64, max(image_size)))
    return Oracle(model, (channels, side, side), (0.5,), (0.5,), name)


def fit(
    oracle: Oracle,
    images: Tensor,
    targets: Tensor,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.OneCycleLR,
    batch_size: int,
    seed: int,
    hflip: float = 0.0,
    smoothing: float = 0.0,
) -> None:
    """Train the model of an oracle on images shifted by up to an eighth of their side, one cycle of the schedule.

    Args:
        oracle: its model is trained in place, and frozen again.
        images: uint8 (N, C, H, W).
        targets: labels (N,).
        optimizer: of the model's parameters.
        scheduler: its schedule, which says how many steps there are.
        batch_size: images per step; N where there are fewer.
        seed: seed of order, shifts and mirrors.
        hflip: probability that an image is mirrored left to right.
        smoothing: label smoothing.
    """
    model, generator = oracle.model.train().requires_grad_(True), torch.Generator().manual_seed(seed)
    stream = endless_table(images, targets, batch_size, seed)
    for _ in tqdm(range(scheduler.total_steps), "training a classifier", leave=False, delay=2):
        x, y = next(stream)
        x = random_shift(x, max(images.shape[2:]) // 8, generator)
        x = random_hflip(x, hflip, generator) if hflip else x
        logits = model(oracle._input(x))
        F.cross_entropy(logits, y.to(logits.device), label_smoothing=smoothing).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model.eval().requires_grad_(False)


def _key(train: ImageDataset, *settings) -> str:
    named = json.dumps([train.fingerprint(), SMALL_MODEL, SMALL_BATCH, settings])
    return hashlib.sha256(named.encode()).hexdigest()[:12]
