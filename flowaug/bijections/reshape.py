"""Bijections that only move entries; their log-determinant is 0."""

import torch.nn.functional as F
from torch import Tensor

from flowaug.bijections.base import Bijection


class Squeeze(Bijection):
    """Move each 2×2 patch of space into channels: (C, H, W) to (4C, H/2, W/2)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to (B, 4C, H/2, W/2)."""
        return F.pixel_unshuffle(x, 2), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Map (B, 4C, H/2, W/2) back to (B, C, H, W)."""
        return F.pixel_shuffle(z, 2)
