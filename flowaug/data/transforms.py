"""Transforms: timm's for single images, random shifts and flips of batches, and a classifier's preprocessing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from PIL import Image
from timm.data import create_transform, str_to_interp_mode
from torch import Tensor
from torchvision.transforms import Compose, v2

from flowaug.pixels import resize

WHOLE = (1.0, 1.0)


@dataclass(frozen=True)
class DataConfig:
    """What a classifier expects of its input, as timm's ``resolve_data_config`` returns it.

    Attributes:
        input_size: (C, H, W).
        mean: mean per channel.
        std: standard deviation per channel.
        interpolation: filter that resizes images, for example "bicubic".
        crop_pct: fraction of the resized image that the crop of an evaluation keeps, per side.
        crop_mode: crop of an evaluation: "center", "squash" (resize without keeping the aspect ratio) or "border".
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        return self.input_size[1], self.input_size[2]


class TransformSettings(Protocol):
    """Settings of an image transform, named as in timm's ``train.py``; without scale and ratio nothing is cropped."""

    @property
    def scale(self) -> tuple[float, float] | None: ...  # noqa: D102
    @property
    def ratio(self) -> tuple[float, float] | None: ...  # noqa: D102
    @property
    def hflip(self) -> float: ...  # noqa: D102
    @property
    def aa(self) -> str | None: ...  # noqa: D102
    @property
    def color_jitter(self) -> float | None: ...  # noqa: D102


class GreyscaleTransform:
    """A transform of greyscale images that converts them to RGB, transforms them and keeps one channel.

    The conversion is necessary because timm's augmentations expect RGB images.

    Args:
        transform: callable from a PIL RGB image to a uint8 tensor (3, H, W).
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]):
        self.transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the transformed image as uint8 (1, H, W)."""
        return self.transform(image.convert("RGB"))[:1]


def train_transform(
    size: tuple[int, int], channels: int, settings: TransformSettings, interpolation: str = "bicubic"
) -> Callable[[Image.Image], Tensor]:
    """Create timm's training transform without normalisation and random erasing, which run later, on the device.

    Args:
        size: height and width of the result.
        channels: 1 or 3.
        settings: settings of the transform; without ``scale`` and ``ratio`` the whole image is resized.
        interpolation: filter that resizes images.

    Returns:
        A callable from a PIL image to uint8 (channels, H, W).
    """
    created = create_transform(
        (3, *size),
        is_training=True,
        scale=settings.scale or WHOLE,
        ratio=settings.ratio or WHOLE,
        hflip=settings.hflip,
        auto_augment=settings.aa,
        color_jitter=cast(float, settings.color_jitter),
        interpolation=interpolation,
        normalize=False,
    )
    transform = cast(Compose, created)
    if settings.scale is None and settings.ratio is None:
        transform.transforms[0] = v2.Resize(size, str_to_interp_mode(interpolation), antialias=True)
    return transform if channels == 3 else GreyscaleTransform(transform)


def eval_transform(config: DataConfig) -> Callable[[Image.Image], Tensor]:
    """Create timm's evaluation transform without normalisation, which runs on the device.

    Returns:
        A callable from a PIL image to uint8 (C, H, W).
    """
    created = create_transform(
        config.input_size,
        interpolation=config.interpolation,
        mean=config.mean,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
        normalize=False,
    )
    return cast(Compose, created)


class Preprocess:
    """The preprocessing of a classifier: resize images in [0, 1] to its input size and normalise them.

    Args:
        input_size: (C, H, W) of the classifier's input.
        mean: mean per channel.
        std: standard deviation per channel.
    """

    def __init__(self, input_size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]):
        self.input_size = input_size
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (mean, std))

    def to(self, device: torch.device | str) -> "Preprocess":
        """Move the constants to a device in place, and return self."""
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """Return the classifier's input (B, C, H, W) for images (B, C, h, w) in [0, 1]."""
        return (resize(x, self.input_size[1:]) - self.mean) / self.std


def random_shift(x: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each image (B, C, H, W) by up to ``pixels`` vertically and horizontally, with repeated border pixels."""
    if pixels == 0:
        return x

    b, _, h, w = x.shape
    dy, dx = torch.randint(-pixels, pixels + 1, (2, b, 1), generator=generator, device=x.device)
    rows = (torch.arange(h, device=x.device) + dy).clamp(0, h - 1)
    columns = (torch.arange(w, device=x.device) + dx).clamp(0, w - 1)
    batch = torch.arange(b, device=x.device)
    return x[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_hflip(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Flip each image (B, C, H, W) horizontally with probability ``p``."""
    flip = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < p
    return torch.where(flip, x.flip(3), x)
