"""Coupling layers on tokens, as in Jet (Kolesnikov et al. 2024)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowaug.flows.bijections.base import ConditionedBijection

MIN_RAW = -4.0  # lower bound on the raw scale s: the inverse of one coupling scales by at most 1/(2σ(−4)) = 27.8
PATTERNS = ("checkerboard", "columns", "rows")


def pattern_mask(grid: tuple[int, int], pattern: str) -> Tensor:
    """Return the mask of the tokens on which a spatial coupling conditions.

    Args:
        grid: number of rows and columns of tokens.
        pattern: "checkerboard", "columns" (vertical stripes) or "rows" (horizontal stripes).

    Returns:
        Boolean mask (n,) over the tokens in row-major order; half of its entries are True.
    """
    row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    index = {"checkerboard": row + column, "columns": column, "rows": row}[pattern]
    return (index % 2 == 0).flatten()


def halves_first(mask: Tensor) -> Tensor:
    """Return the permutation (n,) that moves the entries in ``mask`` (n,) to the front; the sort is stable."""
    return torch.argsort((~mask).int(), stable=True)


class TokenCoupling(ConditionedBijection):
    """Affine coupling of two halves of the tokens, ``y2 = (x2 + b(x1)) · 2σ(s(x1))``.

    ``ladj`` is the sum of ``log σ(s) + log 2`` (Kolesnikov et al., "Jet: A Modern Transformer-Based Normalizing Flow",
    2024, Section 3).

    ``x1`` and ``x2`` are the halves of the permuted tokens (n, k). With ``dim=2`` the channels of every token are
    split, with ``dim=1`` the set of tokens. In both cases ``x1`` is reshaped to (n, k/2), so that both use the same
    network sizes.

    Args:
        order: permutation of the k channels or of the n tokens; its first half selects ``x1``. It is a buffer: saved
            with the flow, not learned.
        dim: dimension that is split: 1 for tokens, 2 for channels.
        make_conditioner: builds the conditioner, given its numbers of input and output channels.
        tokens: event shape (n, k), both even.
    """

    order: Tensor
    restore: Tensor

    def __init__(
        self, order: Tensor, dim: int, make_conditioner: Callable[[int, int], nn.Module], tokens: tuple[int, int]
    ):
        super().__init__()
        self.register_buffer("order", order.clone())
        self.register_buffer("restore", torch.argsort(order))
        self.dim = dim
        self.half_shape = (tokens[0], tokens[1] // 2)
        self.conditioner = make_conditioner(tokens[1] // 2, tokens[1])

    def forward_chunk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens (B, n, k) to the same shape."""
        x1, x2 = x.index_select(self.dim, self.order).chunk(2, self.dim)
        shift, raw = self._shift_and_raw(x1, x2.shape)
        ladj = F.logsigmoid(raw).flatten(1).sum(1) + math.prod(self.half_shape) * math.log(2)
        return self._merge(x1, (x2 + shift) * (2 * torch.sigmoid(raw))), ladj

    def inverse_chunk(self, z: Tensor) -> Tensor:
        """Map back to ``x``; the conditioning half is unchanged, so ``b`` and ``s`` can be recomputed from it."""
        x1, y2 = z.index_select(self.dim, self.order).chunk(2, self.dim)
        shift, raw = self._shift_and_raw(x1, y2.shape)
        return self._merge(x1, y2 / (2 * torch.sigmoid(raw)) - shift)

    def _shift_and_raw(self, x1: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Compute ``b(x1)`` and the bounded ``s(x1)``, both of the given shape."""
        shift, raw = self.condition(x1.reshape(-1, *self.half_shape)).chunk(2, dim=2)
        return shift.reshape(shape), raw.clamp_min(MIN_RAW).reshape(shape)

    def _merge(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Concatenate the halves and restore the order of the tokens and channels."""
        return torch.cat([x1, x2], self.dim).index_select(self.dim, self.restore)
