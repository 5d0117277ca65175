"""Element-wise bijections."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowaug.bijections.base import Bijection

MIN_SCALE = 1e-4  # keeps the inverse finite however far an optimiser drives the raw scale


def inverse_softplus(y: Tensor) -> Tensor:
    """Return ``log(exp(y) − 1)`` without overflow: ``y + log(1 − exp(−y))``."""
    return y + torch.log(-torch.expm1(-y))


class ActNorm(Bijection):
    """``z = scale · (x − shift)`` with a scale and a shift per element, initialised on data (Kingma & Dhariwal 2018).

    As in MEF the parameters are per element (c, h, w) and the scale is a softplus.

    Args:
        shape: event shape.
        min_std: floor on the standard deviation at initialisation. A pixel that never changes (a border) has a standard
            deviation of 0.001 after 8-bit dequantisation; scaled to 1, the rare exception would grow a thousandfold.
    """

    def __init__(self, shape: tuple[int, ...], min_std: float = 0.02):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(shape))
        self.raw_scale = nn.Parameter(inverse_softplus(torch.full(shape, 1 - MIN_SCALE)))
        self.min_std = min_std

    def scale(self) -> Tensor:
        """Positive scale of every element."""
        return F.softplus(self.raw_scale) + MIN_SCALE

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift; ``ladj`` is the same for every example."""
        scale = self.scale()
        return (x - self.shift) * scale, scale.log().sum().expand(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Undo scale and shift."""
        return z / self.scale() + self.shift

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Make every element of ``z`` on the batch ``x`` have mean 0 and variance (at most) 1."""
        variance, mean = torch.var_mean(x, 0, correction=0)
        self.shift.copy_(mean)
        scale = (variance + self.min_std**2).rsqrt()
        self.raw_scale.copy_(inverse_softplus((scale - MIN_SCALE).clamp_min(MIN_SCALE)))
        return self(x)[0]
