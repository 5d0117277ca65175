"""timm's Mixup and CutMix on batches that they refuse or leave to a collate function."""

import torch
from timm.data import Mixup
from torch import Tensor


class HalfMixup(Mixup):
    """Mixup in mode "half": one half of the batch is mixed into the other. timm has this as a collate function only."""

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images (B, C, H, W) with labels (B,) to images (B/2, C, H, W) and soft labels (B/2, K)."""
        x, target = super().__call__(x, target)
        return x[: len(x) // 2], target[: len(target) // 2]


def mix_any_batch(mixup: Mixup, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Apply timm's Mixup, which mixes image i with image B - 1 - i, also to an odd number B of images.

    In an odd batch the image in the middle is mixed with its own copy, so it stays as it is.
    """
    half, odd = divmod(len(x), 2)
    if not odd:
        return mixup(x, y)
    rows = torch.cat([torch.arange(half + 1), torch.arange(half, len(x))]).to(x.device)
    x, y = mixup(x[rows], y[rows])
    kept = torch.cat([torch.arange(half + 1), torch.arange(half + 2, len(x))]).to(x.device)
    return x[kept], y[kept]
