"""Bijections that reshape or permute the entries of an event. Their log-determinant is 0."""

import torch
import torch.nn.functional as F
from torch import Tensor

from flowaug.flows.bijections.base import Bijection


class Squeeze(Bijection):
    """Space-to-depth: move each 2×2 patch of pixels into channels, (C, H, W) to (4C, H/2, W/2)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to (B, 4C, H/2, W/2)."""
        return F.pixel_unshuffle(x, 2), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Map (B, 4C, H/2, W/2) back to (B, C, H, W)."""
        return F.pixel_shuffle(z, 2)


class Patchify(Bijection):
    """Split of an image into patches, (C, H, W) to (n, k).

    The n = H/p · W/p tokens are in row-major order. Each has the k = C·p² entries of a p×p patch.

    Args:
        event_shape: (C, H, W), H and W multiples of ``patch``.
        patch: side p of a patch in pixels.
    """

    def __init__(self, event_shape: tuple[int, int, int], patch: int):
        super().__init__()
        _, height, width = event_shape
        self.patch = patch
        self.grid = (height // patch, width // patch)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to (B, n, k)."""
        return F.pixel_unshuffle(x, self.patch).flatten(2).transpose(1, 2), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Map (B, n, k) back to (B, C, H, W)."""
        return F.pixel_shuffle(z.transpose(1, 2).unflatten(2, self.grid), self.patch)


class Reshape(Bijection):
    """Change of the event shape.

    Args:
        before: event shape of ``x``.
        after: event shape of ``z``, with the same number of entries.
    """

    def __init__(self, before: tuple[int, ...], after: tuple[int, ...]):
        super().__init__()
        self.before = tuple(before)
        self.after = tuple(after)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, *before) to (B, *after)."""
        return x.reshape(-1, *self.after), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Map (B, *after) back to (B, *before)."""
        return z.reshape(-1, *self.before)


class Permute(Bijection):
    """Fixed permutation of the first event dimension, ``z[:, i] = x[:, order[i]]``.

    Args:
        order: permutation (C,) of 0 … C−1. It is a buffer: saved with the flow, not learned.
    """

    order: Tensor
    restore: Tensor

    def __init__(self, order: Tensor):
        super().__init__()
        self.register_buffer("order", order.clone())
        self.register_buffer("restore", torch.argsort(order))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, ...) to the same shape."""
        return x.index_select(1, self.order), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Map (B, C, ...) back with the inverse permutation."""
        return z.index_select(1, self.restore)
