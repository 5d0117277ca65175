"""Pixel values: quantisation, dequantisation, bits per dimension and resizing.

Image ``x`` has values in [0, 1] on the grid ``k / (levels - 1)``, ``k = 0 … levels - 1``. One cell of the grid is
``1 / (levels - 1)`` wide. Dequantisation adds uniform noise within the cell of each pixel, so a dequantised image can
leave [0, 1] by half a cell. Augmentation adds no noise: it encodes ``x``, the centre of the cell.

This module is the only one that defines the number of levels, the noise width and the bits/dim constant.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _check_levels(levels: int) -> None:
    if not isinstance(levels, int) or levels < 2:
        raise ValueError(
            f"levels is {levels!r}; expected an integer of at least 2 (256 for 8-bit, 32 for 5-bit images)"
        )


def quantise(x: Tensor, levels: int = 256) -> Tensor:
    """Round pixel values, such as a flow's samples, to the nearest grey level.

    Args:
        x: image of any shape, floating point, in [0, 1].
        levels: number of grey levels (256 for 8 bit, 32 for 5 bit).

    Returns:
        An image of the same shape in [0, 1], on the grid ``k / (levels - 1)``.

    Raises:
        ValueError: if ``levels`` is not an integer of at least 2.
    """
    _check_levels(levels)
    return (x.clamp(0, 1) * (levels - 1)).round() / (levels - 1)


def reduce_levels(x: Tensor, levels: int = 256) -> Tensor:
    """Reduce an 8-bit image to fewer grey levels.

    Fewer bits keep the leading bits of each value, as in Glow and its successors: of the 256 values each of 32 levels
    gets 8. Numbers of levels that are no power of 2 below 256 belong to images that have only these: they are rounded.

    Args:
        x: image of any shape, floating point, in [0, 1].
        levels: number of grey levels.

    Returns:
        An image of the same shape in [0, 1], on the grid ``k / (levels - 1)``.

    Raises:
        ValueError: if ``levels`` is not an integer of at least 2.
    """
    _check_levels(levels)
    if levels >= 256 or 256 % levels:
        return quantise(x, levels)
    value = (x.clamp(0, 1) * 255).round()
    return (value * levels / 256).floor() / (levels - 1)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize a batch of images with the same filter that is applied to image files for training.

    The filter is antialiased bicubic. The aspect ratio is not preserved.

    Args:
        x: images (B, C, H, W) in [0, 1].
        size: target size ``(h, w)``.

    Returns:
        Images (B, C, h, w) in [0, 1]; ``x`` itself if it already has this size.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def enlarge(change: Tensor, size: Sequence[int]) -> Tensor:
    """Resize the change of images (B, C, h, w) to ``size`` (H, W) by bicubic interpolation."""
    if tuple(change.shape[2:]) == tuple(size):
        return change
    return F.interpolate(change, tuple(size), mode="bicubic", align_corners=False)


def dequantise(x: Tensor, levels: int = 256, generator: torch.Generator | None = None) -> Tensor:
    """Add uniform noise within the cell of each pixel.

    Source: Theis et al., "A note on the evaluation of generative models", 2016.

    Args:
        x: image of any shape in [0, 1].
        levels: number of grey levels.
        generator: random generator for the noise, on the device of ``x``; None uses the global one.

    Returns:
        ``reduce_levels(x) + u``, with ``u`` uniform within ±½ cell.

    Raises:
        ValueError: if ``levels`` is not an integer of at least 2.
    """
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return reduce_levels(x, levels) + (noise - 0.5) / (levels - 1)


def bits_per_dim(log_prob: Tensor, dim: int, levels: int = 256) -> Tensor:
    """Convert a log-density in nats to bits per dimension of the discrete image.

    The probability of a discrete image is its density times the volume of its cell, ``(1 / (levels - 1)) ** dim``.
    The volume is the constant ``log2(levels - 1)``.

    Args:
        log_prob: log-density of dequantised images, in nats, any shape.
        dim: number of dimensions ``C·H·W`` of an image.
        levels: number of grey levels.

    Returns:
        Bits per dimension, in the shape of ``log_prob``.

    Raises:
        ValueError: if ``levels`` is not an integer of at least 2.
    """
    _check_levels(levels)
    return -log_prob / (dim * math.log(2)) + math.log2(levels - 1)
