"""What a classifier's training needs around its loop: transforms, the way of a batch on the device, evaluation."""

import argparse
from collections.abc import Callable

import torch
from accelerate import Accelerator
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from flowaug.data import ImageDataset, create_loader
from flowaug.data.transforms import eval_transform, train_transform
from flowaug.mixup.offline import AugmentedCopies
from flowaug.pixels import resize


class BatchPipeline:
    """uint8 batches to the classifier's input, on the device, in the one order that keeps labels right.

    Flow mixup (hard labels, [0, 1]) → Mixup/CutMix (soft labels) → resize → normalise → RandomErasing.

    Args:
        input_size: (C, H, W) of the classifier.
        mean: normalisation per channel.
        std: normalisation per channel.
        flow_mixup: the flow augmentation or None.
        mixup: timm's Mixup or None.
        erasing: timm's RandomErasing or None.
        flow_off_epoch: epoch from which there is no flow augmentation, None for never.
        mixup_off_epoch: epoch from which Mixup gives plain labels (one-hot, smoothed), None for never.
    """

    def __init__(
        self,
        input_size: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        flow_mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        mixup: Mixup | None = None,
        erasing: RandomErasing | None = None,
        flow_off_epoch: int | None = None,
        mixup_off_epoch: int | None = None,
    ):
        self.input_size = input_size
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (mean, std))
        self.flow_mixup, self.mixup, self.erasing = flow_mixup, mixup, erasing
        self.off_epochs = flow_off_epoch, mixup_off_epoch

    def to(self, device: torch.device) -> "BatchPipeline":
        """Move the constants to a device, in place."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def train(self, x: Tensor, y: Tensor, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Augment a uint8 batch (B, C, h, w) with labels (B,); labels come back soft (B, K) after Mixup."""
        flow_on, mixup_on = (off is None or epoch < off for off in self.off_epochs)
        x = x.float() / 255
        if self.flow_mixup is not None and flow_on:
            x, y = self.flow_mixup(x, y)
        if self.mixup is not None:
            self.mixup.mixup_enabled = mixup_on
            x, y = self.mixup(x, y)
        x = self.normalise(x)
        return (x if self.erasing is None else self.erasing(x)), y

    def evaluate(self, x: Tensor) -> Tensor:
        """Map a uint8 batch (B, C, h, w) to the classifier's input."""
        return self.normalise(x.float() / 255)

    def normalise(self, x: Tensor) -> Tensor:
        """Resize images in [0, 1] to the input size and normalise them."""
        return (resize(x, self.input_size[1:]) - self.mean) / self.std


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """Memory format of the classifier and its input."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


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
