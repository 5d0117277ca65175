"""From images to the classifier's input: data loaders, offline copies, augmentation of batches on the device."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from flowaug.data import ImageDataset, create_loader
from flowaug.data.transforms import DataConfig, Preprocess, eval_transform, train_transform
from flowaug.data.wds.dataset import StreamDataset
from flowaug.evaluation.pictures import draw_augmented
from flowaug.mixup.offline import AugmentedCopies
from flowaug.mixup.timm_mixup import mix_any_batch
from flowaug.mixup.transform import FlowMixupTransform
from flowaug.training.options import ClassifierTrainingOptions, ClassifierTransformOptions, FlowAugOptions


class BatchPipeline:
    """Augment uint8 batches on the device, in the only order that keeps labels correct.

    Flow mixup (hard labels, [0, 1]) → Mixup/CutMix (soft labels) → resize and normalise → RandomErasing.

    Args:
        preprocess: from images in [0, 1] to the classifier's input.
        flow_mixup: the flow augmentation, or None.
        mixup: timm's Mixup, or None.
        erasing: timm's RandomErasing, or None.
        flow_off_epoch: epoch from which flow mixup is off, None for never.
        mixup_off_epoch: epoch from which Mixup only makes labels one-hot and smooths them, None for never.
    """

    def __init__(
        self,
        preprocess: Preprocess,
        flow_mixup: FlowMixupTransform | None = None,
        mixup: Mixup | None = None,
        erasing: RandomErasing | None = None,
        flow_off_epoch: int | None = None,
        mixup_off_epoch: int | None = None,
    ):
        self.preprocess = preprocess
        self.flow_mixup, self.mixup, self.erasing = flow_mixup, mixup, erasing
        self.flow_off_epoch, self.mixup_off_epoch = flow_off_epoch, mixup_off_epoch

    def __call__(self, x: Tensor, y: Tensor, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Augment a uint8 batch (B, C, h, w) with labels (B,); after Mixup the labels are soft (B, K)."""
        x = x.float() / 255
        if self.flow_mixup is not None and _is_on(self.flow_off_epoch, epoch):
            x, y = self.flow_mixup(x, y)
        if self.mixup is not None:
            self.mixup.mixup_enabled = _is_on(self.mixup_off_epoch, epoch)
            x, y = mix_any_batch(self.mixup, x, y)
        x = self.preprocess(x)
        return (x if self.erasing is None else self.erasing(x)), y


def _is_on(off_epoch: int | None, epoch: int) -> bool:
    return off_epoch is None or epoch < off_epoch


def create_pipeline(
    preprocess: Preprocess,
    transforms: ClassifierTransformOptions,
    num_classes: int,
    device: torch.device,
    flow_mixup: FlowMixupTransform | None = None,
    flow_off_epoch: int | None = None,
) -> BatchPipeline:
    """Create the augmentation of batches on a device."""
    mixup = None
    if transforms.mixes:
        mixup = Mixup(
            transforms.mixup, transforms.cutmix, label_smoothing=transforms.smoothing, num_classes=num_classes
        )
    erasing = RandomErasing(transforms.reprob, mode="pixel", device=str(device)) if transforms.reprob else None
    return BatchPipeline(
        preprocess.to(device),
        flow_mixup,
        mixup,
        erasing,
        flow_off_epoch=flow_off_epoch,
        mixup_off_epoch=transforms.mixup_off_epoch,
    )


def loaded_size(config: DataConfig, dataset: ImageDataset | StreamDataset) -> tuple[int, int]:
    """Return the size at which training images are loaded: the classifier's input size.

    Images in memory that all share a smaller size are loaded as they are and enlarged on the device, after flow mixup.
    """
    fixed = dataset.fixed_size
    if fixed is not None and max(fixed) < min(config.size):
        return max(fixed), max(fixed)
    return config.size


def create_copies(
    dataset: ImageDataset | StreamDataset,
    flow_mixup: FlowMixupTransform,
    flow_aug: FlowAugOptions,
    transforms: ClassifierTransformOptions,
    config: DataConfig,
    seed: int,
    process_index: int = 0,
    num_processes: int = 1,
    reduce: Callable[[Tensor], Tensor] = lambda t: t,
) -> AugmentedCopies:
    """Create the offline copies of ``--flow-aug-copies``.

    With ``--flow-aug-or-aa`` images that flow mixup changed get the transform without auto-augment.
    """
    without_aa = None
    if flow_aug.flow_aug_or_aa:
        plain = dataclasses.replace(transforms, aa=None)
        size, channels = loaded_size(config, dataset), config.input_size[0]
        without_aa = train_transform(size, channels, plain, config.interpolation)
    copies = flow_aug.flow_aug_copies or 0
    return AugmentedCopies(dataset, flow_mixup, copies, seed, without_aa, process_index, num_processes, reduce)


def create_loaders(
    train_set,
    val_set,
    config: DataConfig,
    transforms: ClassifierTransformOptions,
    training: ClassifierTrainingOptions,
    workers: int,
    accelerator: Accelerator,
) -> tuple:
    """Create the loaders of uint8 images to train and to validate on."""
    size = loaded_size(config, train_set)
    process = accelerator.process_index, accelerator.num_processes
    batch_size = min(training.batch_size, len(train_set) // accelerator.num_processes)
    transform = train_transform(size, config.input_size[0], transforms, config.interpolation)
    train = create_loader(
        train_set,
        transform,
        batch_size,
        True,
        training.seed,
        workers,
        *process,
        drop_last=True,
        repeats=training.epoch_repeats,
    )
    return train, create_loader(val_set, eval_transform(config), batch_size, False, training.seed, workers, *process)


def draw_before_after(flow_mixup: FlowMixupTransform, dataset, config: DataConfig, path: Path) -> None:
    """Draw one image per class before and after flow mixup, at the size at which training images are loaded."""
    images, labels = zip(*dataset.examples(), strict=True)
    size = (config.input_size[0], *loaded_size(config, dataset))
    transform = eval_transform(dataclasses.replace(config, input_size=size))
    draw_augmented(flow_mixup, torch.stack([transform(image) for image in images]), torch.tensor(labels), path)


def seed_step(seed: int, step: int, part: int, process_index: int, flow_mixup: FlowMixupTransform | None) -> None:
    """Make the randomness of a forward pass depend on its number alone, so that a resumed run repeats it."""
    numbers = (process_index, step) if part == 0 else (process_index, step, part)
    set_seed(int(np.random.SeedSequence((seed, *numbers)).generate_state(1)[0]))
    if flow_mixup is not None:
        flow_mixup.reseed(seed, *numbers)
