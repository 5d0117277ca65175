"""Base classes of bijections and the sign convention of log-determinants.

``ladj`` ("log absolute determinant of the Jacobian") is ``log|det ∂z/∂x|`` of the *forward* (encoding) direction, one
value per example, in nats.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Bijection(nn.Module):
    """Invertible map between batches of events.

    The examples of a batch are mapped independently of each other.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map events to latents.

        Args:
            x: events (B, *x).

        Returns:
            ``z`` (B, *z) and ``ladj`` (B,), which is ``log|det ∂z/∂x|`` in nats.
        """
        raise NotImplementedError

    def inverse(self, z: Tensor) -> Tensor:
        """Map latents (B, *z) back to events (B, *x)."""
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Initialise the data-dependent parameters, if there are any.

        Args:
            x: a batch of events (B, *x).

        Returns:
            ``forward(x)[0]`` with the new parameters.
        """
        return self(x)[0]


class Chunked(Bijection):
    """Bijection that can process a batch in chunks, one after another, to limit the number of activations at a time.

    A subclass implements ``forward_chunk`` and ``inverse_chunk``, and overrides ``chunks`` to split the batch.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``x`` (B, *x) to the same shape, chunk by chunk."""
        outputs = [self.encode_chunk(chunk) for chunk in self.chunks(x)]
        if len(outputs) == 1:
            return outputs[0]
        z, ladj = zip(*outputs, strict=True)
        return torch.cat(z), torch.cat(ladj)

    def inverse(self, z: Tensor) -> Tensor:
        """Map ``z`` (B, *z) back to ``x``, chunk by chunk."""
        outputs = [self.inverse_chunk(chunk) for chunk in self.chunks(z)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split a batch into chunks (default: no split)."""
        return (x,)

    def encode_chunk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run ``forward_chunk``; a subclass can override how it is run in training."""
        return self.forward_chunk(x)

    def forward_chunk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``forward`` of one chunk."""
        raise NotImplementedError

    def inverse_chunk(self, z: Tensor) -> Tensor:
        """Compute ``inverse`` of one chunk."""
        raise NotImplementedError


class ConditionedBijection(Chunked):
    """Bijection whose parameters are the output of a network, the conditioner.

    The conditioner accounts for nearly all of the time and memory of the bijection.

    Attributes:
        conditioner: the network, set by the subclass; computes in the dtype of its input.
        conditioner_dtype: dtype in which the conditioner runs; None for the dtype of the events.
        grad_checkpointing: save only the events for the backward pass and recompute the activations there.
    """

    conditioner: nn.Module

    def __init__(self):
        super().__init__()
        self.conditioner_dtype: torch.dtype | None = None
        self.grad_checkpointing = False

    def condition(self, x: Tensor) -> Tensor:
        """Compute the raw parameters from the conditioning half ``x``, in the dtype of ``x``."""
        if self.conditioner_dtype is None:
            return self.conditioner(x)
        return self.conditioner(x.to(self.conditioner_dtype)).to(x.dtype)

    def encode_chunk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Run ``forward_chunk``, with activation checkpointing if ``grad_checkpointing`` is set."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.forward_chunk, x, use_reentrant=False, preserve_rng_state=False)
        return self.forward_chunk(x)


class Chain(Bijection):
    """Composition of bijections.

    Args:
        bijections: the bijections, in the order of the forward direction.
    """

    bijections: Sequence[Bijection]

    def __init__(self, bijections: Iterable[Bijection]):
        super().__init__()
        self.bijections = cast(Sequence[Bijection], nn.ModuleList(bijections))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Apply all bijections in order and sum their log-determinants."""
        total = x.new_zeros(x.shape[0])
        for bijection in self.bijections:
            x, ladj = bijection(x)
            total = total + ladj
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        """Apply the inverses in reverse order."""
        for bijection in reversed(self.bijections):
            z = bijection.inverse(z)
        return z

    def initialise(self, x: Tensor) -> Tensor:
        """Initialise each bijection on the output of the previous ones."""
        for bijection in self.bijections:
            x = bijection.initialise(x)
        return x


class MultiScale(Bijection):
    """Multi-scale flow: each level passes half of its channels to the output, the rest to the next level.

    The outputs of all levels are concatenated to one vector. Unlike in Glow there are no split priors: the class
    Gaussian covers all ``D`` dimensions.

    Args:
        levels: bijections between images; each takes the first half of the output channels of the previous one.
        shapes: output shape (C, H, W) of each level, before its split.
    """

    levels: Sequence[Bijection]

    def __init__(self, levels: Iterable[Bijection], shapes: Iterable[tuple[int, int, int]]):
        super().__init__()
        self.levels = cast(Sequence[Bijection], nn.ModuleList(levels))
        shapes = list(shapes)
        self.out_shapes = [(c - c // 2, h, w) for c, h, w in shapes[:-1]] + [shapes[-1]]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, C, H, W) to vectors (B, C·H·W)."""
        total = x.new_zeros(x.shape[0])
        outs = []
        for level, shape in zip(self.levels, self.out_shapes, strict=True):
            x, ladj = level(x)
            total = total + ladj
            x, out = x.split([x.shape[1] - shape[0], shape[0]], dim=1)
            outs.append(out.flatten(1))
        return torch.cat(outs, dim=1), total

    def inverse(self, z: Tensor) -> Tensor:
        """Map vectors (B, C·H·W) back to images (B, C, H, W)."""
        sizes = [c * h * w for c, h, w in self.out_shapes]
        outs = [part.unflatten(1, shape) for part, shape in zip(z.split(sizes, 1), self.out_shapes, strict=True)]

        x = self.levels[-1].inverse(outs[-1])
        for level, out in zip(self.levels[-2::-1], outs[-2::-1], strict=True):
            x = level.inverse(torch.cat([x, out], dim=1))
        return x

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Initialise the levels one after another.

        Unlike for other bijections, the returned tensor is empty: the last level passes all channels to the output.
        """
        for level, shape in zip(self.levels, self.out_shapes, strict=True):
            x = level.initialise(x)
            x = x[:, : x.shape[1] - shape[0]]
        return x
