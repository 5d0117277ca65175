"""Element-wise bijections."""

import math

import torch
from torch import Tensor, nn

from flowaug.flows.bijections.base import Bijection

MAX_LOG_SCALE = 12.0  # keeps scale and inverse finite however far an optimiser drives the logarithm
CONSTANT = 1e-8  # variance below which an element is constant: dequantisation alone gives a hundred times as much


class ActNorm(Bijection):
    """``z = exp(log_scale) · (x − shift)``, per element and initialised on data (Kingma & Dhariwal 2018).

    As in MEF the parameters are per element (c, h, w); Glow's are per channel. MEF has a softplus, which an optimiser
    moves by small additions; its logarithm moves by factors, and the border of an image needs factors of a hundred.

    Args:
        shape: event shape, channels first.
        min_std: floor on the standard deviation at initialisation. A pixel that never changes (a border) has a standard
            deviation of 0.001 after 8-bit dequantisation; scaled to 1, the rare exception would grow a thousandfold.
        per_channel: one scale and shift per channel instead of per element.
    """

    def __init__(self, shape: tuple[int, ...], min_std: float = 0.02, per_channel: bool = False):
        super().__init__()
        sizes = (shape[0], *(1 for _ in shape[1:])) if per_channel else shape
        self.shift = nn.Parameter(torch.zeros(sizes))
        self.log_scale = nn.Parameter(torch.zeros(sizes))
        self.min_std = min_std
        self.repeats = math.prod(shape) // math.prod(sizes)
        self._shared = [0, *range(2, len(shape) + 1)] if per_channel else [0]

    def bounded_log_scale(self) -> Tensor:
        """Logarithm of the scale of every element, within ±12."""
        return self.log_scale.clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift; ``ladj`` is the same for every example."""
        log_scale = self.bounded_log_scale()
        return (x - self.shift) * log_scale.exp(), (self.repeats * log_scale.sum()).expand(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Undo scale and shift."""
        return z * (-self.bounded_log_scale()).exp() + self.shift

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Make every element of ``z`` on the batch ``x`` have mean 0 and variance (at most) 1."""
        variance, mean = torch.var_mean(x, self._shared, correction=0)
        self.shift.copy_(mean.view_as(self.shift))
        log_scale = -0.5 * (variance + self.min_std**2).log()
        log_scale = torch.where(variance > CONSTANT, log_scale, 0.0)  # else each ActNorm of a chain adds ×50
        self.log_scale.copy_(log_scale.view_as(self.shift))
        return self(x)[0]


class FixedScale(Bijection):
    """``z = scale · (x − shift)`` with constants: ``2 (x − ½)`` turns pixels of [0, 1] into [−1, 1].

    Args:
        shift: subtracted first.
        scale: factor, not 0.
    """

    def __init__(self, shift: float, scale: float):
        super().__init__()
        self.shift, self.scale = shift, scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, *x) to the same shape."""
        return (x - self.shift) * self.scale, x.new_full((x.shape[0],), x[0].numel() * math.log(abs(self.scale)))

    def inverse(self, z: Tensor) -> Tensor:
        """Undo."""
        return z / self.scale + self.shift
