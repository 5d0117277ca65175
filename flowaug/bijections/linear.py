"""Invertible 1×1 convolution by the matrix exponential."""

import math

import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowaug.bijections.base import Bijection

SQUARINGS, TERMS = 8, 12  # exact to float64 rounding for every matrix of norm up to 2^8 / 2


def expm(matrix: Tensor) -> Tensor:
    """Matrix exponential in float64 with a fixed number of operations: no norm is read back, so nothing syncs.

    Args:
        matrix: (..., n, n), of norm up to about 100.

    Returns:
        ``exp(matrix)`` (..., n, n) in float64.
    """
    scaled = matrix.double() * 2.0**-SQUARINGS
    eye = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    result = eye + scaled / TERMS
    for k in range(TERMS - 1, 0, -1):
        result = eye + scaled @ result / k
    for _ in range(SQUARINGS):
        result = result @ result
    return result


def random_log_rotation(n: int) -> Tensor:
    """Skew-symmetric logarithm (n, n) of a rotation drawn uniformly (from torch's current RNG)."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    q = q * r.diagonal().sign()
    if torch.linalg.det(q) < 0:
        q[0] = -q[0]
    log = torch.from_numpy(scipy.linalg.logm(q.numpy()).real)
    return ((log - log.T) / 2).float()


class InvertibleConv1x1(Bijection):
    """``z = W x`` per pixel with ``W = exp(M)``; ``ladj = H·W·tr M`` (Xiao & Liu 2020, Section 3.2).

    Args:
        channels: number of channels; ``M`` starts as the logarithm of a random rotation.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_weight = nn.Parameter(random_log_rotation(channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the same shape."""
        ladj = self.log_weight.trace() * math.prod(x.shape[2:])
        return self._apply_matrix(expm(self.log_weight), x), ladj.expand(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Apply ``exp(−M)``."""
        return self._apply_matrix(expm(-self.log_weight), z)

    @staticmethod
    def _apply_matrix(matrix: Tensor, x: Tensor) -> Tensor:
        return F.conv2d(x, matrix.to(x.dtype)[:, :, None, None])
