"""Transforms of images: timm's for single images, random shifts and mirrors of batches, preprocessing."""

from collections.abc import Callable

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import v2


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


def random_shift(x: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Move each image (B, C, H, W) by up to ``pixels`` in both directions; the border repeats."""
    if pixels == 0:
        return x
    b, _, h, w = x.shape
    dy, dx = torch.randint(-pixels, pixels + 1, (2, b, 1), generator=generator, device=x.device)
    rows = (torch.arange(h, device=x.device) + dy).clamp(0, h - 1)
    columns = (torch.arange(w, device=x.device) + dx).clamp(0, w - 1)
    each = torch.arange(b, device=x.device)
    return x[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_hflip(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Mirror each image (B, C, H, W) left to right with probability ``p``."""
    flip = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < p
    return torch.where(flip, x.flip(3), x)
