"""Grey levels: the only file that knows how many there are, how wide the noise is and what a bit per dimension means.

Batches are resized here too, by the filter of a flow's training images.

An image ``x`` lives in [0, 1] on the grid ``k / (levels - 1)``, ``k = 0 … levels - 1``. A cell of that grid is
``1 / (levels - 1)`` wide; dequantisation spreads a pixel uniformly over its cell, so a dequantised image may leave
[0, 1] by half a cell. The centre of the cell is the image itself: augmentation adds no noise and encodes ``x`` as is.
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
    """Round an image in [0, 1] to its nearest grey level, back in [0, 1].

    Args:
        x: image of any shape, floating point, in [0, 1].
        levels: number of grey levels (256 = 8 bit, 32 = 5 bit).

    Returns:
        An image of the same shape on the grid ``k / (levels - 1)``.
    """
    _check_levels(levels)
    return (x.clamp(0, 1) * (levels - 1)).round() / (levels - 1)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Images at another size, by the filter that makes a flow's training images of files.

    Args:
        x: images (B, C, H, W) in [0, 1].
        size: ``(h, w)``.

    Returns:
        Images (B, C, h, w) in [0, 1], antialiased bicubic, the aspect ratio not kept; ``x`` itself if it has the size.
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def dequantise(x: Tensor, levels: int = 256, generator: torch.Generator | None = None) -> Tensor:
    """Add uniform noise inside each pixel's cell (Theis et al., "A note on the evaluation of generative models", 2016).

    Args:
        x: image of any shape in [0, 1].
        levels: number of grey levels.
        generator: source of the noise, on the device of ``x``.

    Returns:
        ``quantise(x) + u``, ``u`` uniform in ±½ cell.
    """
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return quantise(x, levels) + (noise - 0.5) / (levels - 1)


def bits_per_dim(log_prob: Tensor, dim: int, levels: int = 256) -> Tensor:
    """Convert a log-density in nats into bits per dimension of the discrete image.

    A cell of ``(1 / (levels - 1)) ** dim`` volume carries the probability of one image, hence the constant.

    Args:
        log_prob: log-density of dequantised images, in nats.
        dim: number of dimensions ``C·H·W`` of an image.
        levels: number of grey levels.
    """
    _check_levels(levels)
    return -log_prob / (dim * math.log(2)) + math.log2(levels - 1)
