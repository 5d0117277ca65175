"""The contract of a bijection, and the one place that fixes the sign of log-determinants.

``ladj`` is ``log|det ∂z/∂x|`` of the *forward* (encoding) direction, one number in nats per example.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Bijection(nn.Module):
    """An invertible map between batches of events. Examples of a batch never influence each other."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x`` (B, *x) to ``z`` (B, *z) and ``ladj`` (B,) = log|det ∂z/∂x| in nats."""
        raise NotImplementedError

    def inverse(self, z: Tensor) -> Tensor:
        """Map ``z`` (B, *z) back to ``x`` (B, *x)."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Set data-dependent parameters from a batch ``x``; returns ``forward(x)[0]``. No-op where there are none."""
        return self(x)[0]


class Piecewise(Bijection):
    """A bijection that may take a batch in parts, one after the other."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x`` (B, *x) to the same shape, piece by piece."""
        pieces = [self.encode_piece(piece) for piece in self.pieces(x)]
        return pieces[0] if len(pieces) == 1 else tuple(map(torch.cat, zip(*pieces, strict=True)))

    def inverse(self, z: Tensor) -> Tensor:
        """Undo, piece by piece."""
        pieces = [self.inverse_piece(piece) for piece in self.pieces(z)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """The batch in parts: one part, unless a class knows better."""
        return (x,)

    def encode_piece(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``forward_piece``, unless a class has another way for training."""
        return self.forward_piece(x)

    def forward_piece(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``forward`` of one part."""
        raise NotImplementedError

    def inverse_piece(self, z: Tensor) -> Tensor:
        """``inverse`` of one part."""
        raise NotImplementedError


class Conditioned(Piecewise):
    """A bijection with a network in it, which takes nearly all of its time and memory.

    Attributes:
        conditioner: the network, set by the class; computes in the dtype of its input.
        conditioner_dtype: dtype to run the network in, None for that of the events.
        recompute: keep only the events for the backward pass and run the network again there.
    """

    conditioner: nn.Module

    def __init__(self):
        super().__init__()
        self.conditioner_dtype: torch.dtype | None = None
        self.recompute = False

    def condition(self, x: Tensor) -> Tensor:
        """Raw parameters from the conditioning part ``x``, in the dtype of ``x``."""
        if self.conditioner_dtype is None:
            return self.conditioner(x)
        return self.conditioner(x.to(self.conditioner_dtype)).to(x.dtype)

    def encode_piece(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``forward_piece``, which the backward pass runs again where ``recompute`` is set."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.forward_piece, x, use_reentrant=False, preserve_rng_state=False)
        return self.forward_piece(x)


class Chain(Bijection):
    """Bijections one after another; log-determinants add up.

    Args:
        bijections: in the order of the forward direction.
    """

    def __init__(self, bijections: Iterable[Bijection]):
        super().__init__()
        self.bijections = nn.ModuleList(bijections)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Apply every bijection in order."""
        total = x.new_zeros(x.shape[0])
        for bijection in self.bijections:
            x, ladj = bijection(x)
            total = total + ladj
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        """Undo every bijection in the opposite order."""
        for bijection in reversed(self.bijections):
            z = bijection.inverse(z)
        return z

    def initialise(self, x: Tensor) -> Tensor:
        """Initialise each bijection on what the ones before it make of ``x``."""
        for bijection in self.bijections:
            x = bijection.initialise(x)
        return x


class MultiScale(Bijection):
    """Levels that each hand half of their channels to the output; all outputs are re-packed into one vector.

    Unlike Glow there are no split priors: every one of the ``D`` dimensions carries the class Gaussian.

    Args:
        levels: bijections between images; each gets the first half of the channels of the one before.
        shapes: output shape (C, H, W) of each level, before its split.
    """

    def __init__(self, levels: Iterable[Bijection], shapes: Iterable[tuple[int, int, int]]):
        super().__init__()
        self.levels = nn.ModuleList(levels)
        shapes = list(shapes)
        self.out_shapes = [(c - c // 2, h, w) for c, h, w in shapes[:-1]] + [shapes[-1]]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map an image (B, C, H, W) to a vector (B, C·H·W)."""
        total, outs = x.new_zeros(x.shape[0]), []
        for level, shape in zip(self.levels, self.out_shapes, strict=True):
            x, ladj = level(x)
            total = total + ladj
            x, out = x.split([x.shape[1] - shape[0], shape[0]], dim=1)
            outs.append(out.flatten(1))
        return torch.cat(outs, dim=1), total

    def inverse(self, z: Tensor) -> Tensor:
        """Map a vector (B, C·H·W) back to an image (B, C, H, W)."""
        sizes = [c * h * w for c, h, w in self.out_shapes]
        outs = [part.unflatten(1, shape) for part, shape in zip(z.split(sizes, 1), self.out_shapes, strict=True)]
        x = self.levels[-1].inverse(outs[-1])
        for level, out in zip(self.levels[-2::-1], outs[-2::-1], strict=True):
            x = level.inverse(torch.cat([x, out], dim=1))
        return x

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Initialise every level in turn."""
        for level, shape in zip(self.levels, self.out_shapes, strict=True):
            x = level.initialise(x)
            x = x[:, : x.shape[1] - shape[0]]
        return x
