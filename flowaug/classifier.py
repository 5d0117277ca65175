"""What a classifier's training needs around its loop: transforms, the way of a batch on the device, evaluation."""

from collections.abc import Callable

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2

from flowaug.pixels import resize


class GreyThrough:
    """Run a transform for RGB images on a grey one and keep one channel: PIL's augmentations expect RGB.

    Args:
        transform: PIL RGB image to uint8 tensor (3, H, W).
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        """Map a grey PIL image to uint8 (1, H, W)."""
        return self.transform(image.convert("RGB"))[:1]


def train_transform(size: int, channels: int, options) -> Callable[[Image.Image], Tensor]:
    """Build timm's training transform without normalisation and erasing, which follow on the device.

    Args:
        size: height and width of the result.
        channels: 1 or 3.
        options: ``scale, ratio, hflip, aa, color_jitter`` as timm's ``train.py`` names them.

    Returns:
        A callable from a PIL image to uint8 (channels, size, size).
    """
    transform = create_transform(
        (3, size, size),
        is_training=True,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        auto_augment=options.aa,
        color_jitter=options.color_jitter,
        interpolation="bicubic",
        normalize=False,
    )
    return transform if channels == 3 else GreyThrough(transform)


def eval_transform(size: int) -> Callable[[Image.Image], Tensor]:
    """Resize the short side, crop the centre: PIL image to uint8 (C, size, size)."""
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.Compose([v2.Resize(size, bicubic, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])


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
