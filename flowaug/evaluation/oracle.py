"""Reference classifiers, which evaluate images: any timm checkpoint, or a small model that is trained and cached."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

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
from flowaug.data.transforms import Preprocess, random_hflip, random_shift
from flowaug.data.wds.dataset import StreamDataset
from flowaug.files import pack, write_atomic

SMALL_MODEL, SMALL_STEPS, SMALL_BATCH = "test_resnet", 300, 64


class FeatureModel(Protocol):
    """A classifier in two parts, as timm's models are."""

    def forward_features(self, x: Tensor) -> Tensor: ...  # noqa: D102

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor: ...  # noqa: D102


class Oracle:
    """Frozen reference classifier for images in [0, 1].

    Args:
        model: module from normalised images (B, C, H, W) to logits (B, K).
        input_size: (C, H, W) of the model's input.
        mean: mean of the normalisation per channel.
        std: standard deviation of the normalisation per channel.
        name: name in reports.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int], mean, std, name: str):
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.preprocess = Preprocess(input_size, mean, std)

    @classmethod
    def from_timm(cls, model: nn.Module, name: str, channels: int | None = None, size: int | None = None) -> "Oracle":
        """Create a reference classifier from a timm model, with the normalisation of its data configuration.

        Args:
            model: a timm model.
            name: name in reports.
            channels: number of channels of the model's input; None for that of its data configuration.
            size: height and width of the model's input; None for those of its data configuration.
        """
        config = resolve_model_data_config(model)
        channels = channels or config["input_size"][0]
        mean, std = (v if channels == 3 else (sum(v) / len(v),) for v in (config["mean"], config["std"]))
        height, width = config["input_size"][1:] if size is None else (size, size)
        return cls(model, (channels, height, width), mean, std, name)

    def to(self, device: torch.device | str) -> "Oracle":
        """Move the classifier to a device, in place."""
        self.model.to(device)
        self.preprocess.to(device)
        return self

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Predict the labels (B,) of images (B, 1 or C, H, W) in [0, 1]; one channel is repeated for an RGB model."""
        return self.model(self._preprocess(x)).argmax(1)

    @torch.no_grad()
    def probabilities(self, x: Tensor, mirrored: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
        """Compute the class probabilities (B, K) of images.

        Args:
            x: images (B, 1 or C, H, W) in [0, 1].
            mirrored: average over each image and its horizontal flip.
            dtype: data type of the forward pass under ``torch.autocast``; the result is float32.
        """
        views = torch.cat([x, x.flip(3)]) if mirrored else x
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            logits = self.model(self._preprocess(views))
        return logits.float().softmax(1).unflatten(0, (-1, len(x))).mean(0)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Compute the penultimate features (B, d), the input of the last layer, of images (B, 1 or C, H, W) in [0, 1].

        Raises:
            ValueError: if the model is not a timm model.
        """
        model = self._feature_model()
        return _pool(model, model.forward_features(self._preprocess(x)))

    @torch.no_grad()
    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predict labels (B,) and compute penultimate features (B, d) in one pass; see :meth:`features`."""
        model = self._feature_model()
        hidden = model.forward_features(self._preprocess(x))
        return model.forward_head(hidden).argmax(1), _pool(model, hidden)

    def _feature_model(self) -> FeatureModel:
        if not (hasattr(self.model, "forward_features") and hasattr(self.model, "forward_head")):
            kind = type(self.model).__name__
            raise ValueError(f"{kind} has no forward_features and forward_head; use a timm model")
        return cast(FeatureModel, self.model)

    def _preprocess(self, x: Tensor) -> Tensor:
        self.check_channels(x.shape[1])
        channels = self.preprocess.input_size[0]
        return self.preprocess(x.to(self.preprocess.mean.device).expand(-1, channels, -1, -1))

    def check_channels(self, channels: int) -> None:
        """Check that the classifier accepts images with this number of channels.

        Raises:
            ValueError: if it does not.
        """
        own = self.preprocess.input_size[0]
        if channels not in (1, own):
            raise ValueError(
                f"the reference classifier takes {own} channels but the images have {channels}; "
                "use a classifier trained on such images"
            )


def _pool(model: FeatureModel, hidden: Tensor) -> Tensor:
    return model.forward_head(hidden, pre_logits=True).flatten(1)


def load_oracle(
    name: str,
    num_classes: int | None,
    channels: int = 3,
    checkpoint: Path | None = None,
    size: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Oracle:
    """Load a trained timm model as reference classifier.

    Args:
        name: timm model with pretrained weights, output folder of ``finetune.py``, ``hf-hub:…``, ``local-dir:…``, or
            the architecture of ``checkpoint``.
        num_classes: number of classes K of the data set, which the model must have; None if only its features are used.
        channels: number of channels of the images that ``checkpoint`` was trained on.
        checkpoint: file of weights (.safetensors, or a .pth with tensors only).
        size: height and width of the model's input; None for the model's own.
        class_names: class names of the data set in label order, compared with those of the model if it has any.

    Raises:
        ValueError: if the model is unknown, its number of classes or its class names differ, or the weights do not fit.
        FileNotFoundError: if there is no such checkpoint.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"no weights at {str(checkpoint)!r}; pass a .safetensors or .pth file of {name!r}")
    name = f"local-dir:{name}" if checkpoint is None and Path(name).is_dir() else name

    try:
        options = {} if checkpoint is None else {"num_classes": num_classes, "in_chans": channels}
        model = timm.create_model(name, pretrained=checkpoint is None, **options)
        if checkpoint is not None:
            load_checkpoint(model, str(checkpoint), weights_only=True)
    except (RuntimeError, KeyError, SafetensorError) as error:  # unknown model, invalid config.json, bad weights
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the reference classifier {name!r} cannot be loaded: {reason}") from error

    if num_classes not in (None, model.num_classes):
        raise ValueError(
            f"the reference classifier {name!r} has {model.num_classes} classes but the data set has {num_classes}; "
            "pass a checkpoint of this data set, or omit the classifier to train a small one"
        )
    _check_class_names(name, cast(dict, model.pretrained_cfg).get("label_names"), class_names)
    return Oracle.from_timm(model, name, channels if checkpoint else None, size)


def _check_class_names(name: str, model_names: Sequence[str] | None, data_names: Sequence[str] | None) -> None:
    if model_names is None or data_names is None:
        return
    if list(model_names) != list(data_names):
        raise ValueError(
            f"the reference classifier {name!r} has the classes {list(model_names)}, the data set has "
            f"{list(data_names)}: class order differs from the data set; fine-tune the classifier on this data set"
        )


def load_teacher(name: str, train: ImageDataset | StreamDataset) -> Oracle:
    """Load the classifier that provides soft labels for the training of a flow.

    Args:
        name: as for :func:`load_oracle`.
        train: training set of the flow.

    Raises:
        ValueError: as for :func:`load_oracle`, or if the classifier does not accept the channels of the images.
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
    """Train a small reference classifier on a data set, or load it if it was trained before.

    Args:
        train: training set; it should not contain the images to evaluate.
        cache: folder with one file of weights per data set and settings.
        image_size: (H, W) at which the images are read; the same as for the images to evaluate.
        channels: 1 or 3.
        steps: number of optimiser steps.
        seed: seed of the weights, the order of the images and the shifts.
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
        fit(oracle, images, torch.as_tensor(train.targets), optimizer, scheduler, SMALL_BATCH, seed, smoothing=0.1)
    write_atomic(path, pack(model.state_dict()))
    return oracle


def untrained(model: nn.Module, channels: int, image_size: tuple[int, int], name: str) -> Oracle:
    """Create a classifier to be trained by :func:`fit`, with an input of 32 to 64 pixels a side, scaled to [−1, 1]."""
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
    """Train a reference classifier for one cycle of a learning rate schedule.

    The images are randomly shifted by up to an eighth of their side.

    Args:
        oracle: the classifier; its model is trained in place, then frozen again.
        images: uint8 (N, C, H, W).
        targets: labels (N,).
        optimizer: optimiser of the model's parameters.
        scheduler: learning rate schedule; it determines the number of steps.
        batch_size: images per step; N if there are fewer.
        seed: seed of the order of the images, the shifts and the flips.
        hflip: probability of a horizontal flip.
        smoothing: label smoothing.
    """
    model = oracle.model.train().requires_grad_(True)
    generator = torch.Generator().manual_seed(seed)
    stream = endless_table(images, targets, batch_size, seed)
    for _ in tqdm(range(scheduler.total_steps), "training a classifier", leave=False, delay=2):
        x, y = next(stream)
        x = random_shift(x, max(images.shape[2:]) // 8, generator)
        x = random_hflip(x, hflip, generator) if hflip else x

        logits = model(oracle._preprocess(x))
        F.cross_entropy(logits, y.to(logits.device), label_smoothing=smoothing).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    model.eval().requires_grad_(False)


def _key(train: ImageDataset, *settings) -> str:
    """Return a hash of the data set and the settings, for the file name of the cached weights."""
    named = json.dumps([train.fingerprint(), SMALL_MODEL, SMALL_BATCH, settings])
    return hashlib.sha256(named.encode()).hexdigest()[:12]
