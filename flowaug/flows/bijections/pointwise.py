"""Elementwise bijections."""

import math

import torch
from torch import Tensor, nn

from flowaug.flows.bijections.base import Bijection

MAX_LOG_SCALE = 12.0  # keeps the scale and its inverse finite for every value of the parameter
CONSTANT = 1e-8  # variance below which an element counts as constant; that of 8-bit dequantisation noise is 1.3e-6


class ActNorm(Bijection):
    """Elementwise affine map ``z = exp(log_scale) · (x − shift)``, initialised on data (Kingma & Dhariwal 2018).

    The parameters are per element (c, h, w), as in MEF; in Glow they are per channel. MEF computes the scale with a
    softplus, where an optimiser step adds to the scale. With the logarithm a step multiplies the scale. This is faster
    at the border of an image, where the scale may have to change by a factor of a hundred.

    Args:
        shape: event shape, channels first.
        min_std: lower bound on the standard deviation at initialisation. A constant pixel, for example at a border, has
            a standard deviation of 0.001 after 8-bit dequantisation. If this were scaled to 1, a rare different value
            would be scaled by 1000 too.
        per_channel: use one scale and one shift per channel instead of per element.
    """

    def __init__(self, shape: tuple[int, ...], min_std: float = 0.02, per_channel: bool = False):
        super().__init__()
        sizes = (shape[0], *(1 for _ in shape[1:])) if per_channel else shape
        self.shift = nn.Parameter(torch.zeros(sizes))
        self.log_scale = nn.Parameter(torch.zeros(sizes))
        self.min_std = min_std
        self.repeats = math.prod(shape) // math.prod(sizes)  # elements of an event per parameter
        self._reduce_dims = [0, *range(2, len(shape) + 1)] if per_channel else [0]

    def bounded_log_scale(self) -> Tensor:
        """Return ``log_scale`` clamped to ±12, in the shape of the parameter."""
        return self.log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, *shape) to the same shape; ``ladj`` is the same for every example."""
        log_scale = self.bounded_log_scale()
        ladj = self.repeats * log_scale.sum()
        return (x - self.shift) * log_scale.exp(), ladj.expand(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Map (B, *shape) back to ``x``."""
        return z * (-self.bounded_log_scale()).exp() + self.shift

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Set scale and shift so that the elements of ``z`` have mean 0 and a variance of at most 1 over a batch.

        Constant elements keep the scale 1.

        Args:
            x: a batch of events (B, *shape).

        Returns:
            ``z`` (B, *shape) for this batch.
        """
        variance, mean = torch.var_mean(x, self._reduce_dims, correction=0)
        self.shift.copy_(mean.view_as(self.shift))
        log_scale = -0.5 * (variance + self.min_std**2).log()
        # Without this, every ActNorm of a chain would scale a constant element by another 1 / min_std.
        log_scale = torch.where(variance > CONSTANT, log_scale, 0.0)
        self.log_scale.copy_(log_scale.view_as(self.shift))
        return self(x)[0]


class FixedScale(Bijection):
    """Affine map with constants, ``z = scale · (x − shift)``.

    For example ``2 (x − ½)`` maps pixel values from [0, 1] to [−1, 1].

    Args:
        shift: value to subtract.
        scale: nonzero factor.
    """

    def __init__(self, shift: float, scale: float):
        super().__init__()
        self.shift = shift
        self.scale = scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, *x) to the same shape."""
        ladj = x[0].numel() * math.log(abs(self.scale))
        return (x - self.shift) * self.scale, x.new_full((x.shape[0],), ladj)

    def inverse(self, z: Tensor) -> Tensor:
        """Map (B, *z) back to ``x``."""
        return z / self.scale + self.shift
