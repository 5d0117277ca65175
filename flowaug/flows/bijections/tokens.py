"""Coupling between tokens, as in Jet."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowaug.flows.bijections.base import Conditioned

MIN_RAW = -4.0  # smallest raw scale: one coupling stretches at most 1/(2σ(−4)) = 27.8 times when it decodes
PATTERNS = ("checkerboard", "columns", "rows")


def pattern_mask(grid: tuple[int, int], pattern: str) -> Tensor:
    """Which of the tokens of a grid (rows, columns) a spatial coupling conditions on: bool (n,), one half of them.

    Args:
        grid: rows and columns of tokens.
        pattern: "checkerboard", "columns" (vertical stripes) or "rows" (horizontal stripes).
    """
    row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    number = {"checkerboard": row + column, "columns": column, "rows": row}[pattern]
    return (number % 2 == 0).flatten()


def halves_first(mask: Tensor) -> Tensor:
    """Order (n,) that brings the entries in ``mask`` (n,) to the front and keeps the order otherwise."""
    return torch.cat([mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]])


class TokenCoupling(Conditioned):
    """``y2 = (x2 + b(x1)) · 2σ(s(x1))``, ``ladj = Σ (log σ(s) + log 2)`` (Kolesnikov et al., "Jet", 2024, Section 3).

    ``x1, x2`` are the halves of the tokens (n, k) in a fixed order, of the entries of every token (``dim=2``) or of the
    tokens (``dim=1``). Either half goes to and from the network as (n, k/2), so that one network shape serves both.

    Args:
        order: permutation of the k entries or of the n tokens; the first half conditions. A buffer, never learned.
        dim: 1 for tokens, 2 for entries.
        make_conditioner: builds the network, given its numbers of input and output channels.
        tokens: shape (n, k), both even.
    """

    order: Tensor
    restore: Tensor

    def __init__(
        self, order: Tensor, dim: int, make_conditioner: Callable[[int, int], nn.Module], tokens: tuple[int, int]
    ):
        super().__init__()
        self.register_buffer("order", order.clone())
        self.register_buffer("restore", torch.argsort(order))
        self.dim, self.half_shape = dim, (tokens[0], tokens[1] // 2)
        self.conditioner = make_conditioner(tokens[1] // 2, tokens[1])

    def forward_piece(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens (B, n, k) to the same shape."""
        x1, x2 = x.index_select(self.dim, self.order).chunk(2, self.dim)
        shift, raw = self._shift_and_raw(x1, x2)
        ladj = F.logsigmoid(raw).flatten(1).sum(1) + math.prod(self.half_shape) * math.log(2)
        return self._merge(x1, (x2 + shift) * (2 * torch.sigmoid(raw))), ladj

    def inverse_piece(self, z: Tensor) -> Tensor:
        """Undo: the conditioning half came through unchanged, and ``σ(s)`` is at least ``σ(MIN_RAW)``."""
        x1, y2 = z.index_select(self.dim, self.order).chunk(2, self.dim)
        shift, raw = self._shift_and_raw(x1, y2)
        return self._merge(x1, y2 / (2 * torch.sigmoid(raw)) - shift)

    def _shift_and_raw(self, x1: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = self.condition(x1.reshape(-1, *self.half_shape)).chunk(2, dim=2)
        return shift.reshape(like.shape), raw.clamp_min(MIN_RAW).reshape(like.shape)

    def _merge(self, x1: Tensor, x2: Tensor) -> Tensor:
        return torch.cat([x1, x2], self.dim).index_select(self.dim, self.restore)
