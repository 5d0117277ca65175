"""Invertible 1×1 convolutions: by the matrix exponential (MEF) and by a PLU factorisation (Glow)."""

import math

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


def random_rotation(n: int) -> Tensor:
    """Rotation matrix (n, n) in float64, drawn uniformly (from torch's current RNG)."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    q = q * r.diagonal().sign()
    if torch.linalg.det(q) < 0:
        q[0] = -q[0]
    return q


def random_log_rotation(n: int) -> Tensor:
    """Skew-symmetric logarithm (n, n) of a random rotation."""
    angles, vectors = torch.linalg.eig(random_rotation(n))  # of a rotation: unit eigenvalues, orthonormal eigenvectors
    log = ((vectors * (1j * angles.angle())) @ vectors.mH).real
    return ((log - log.T) / 2).float()


def apply_matrix(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply the channels of every pixel of ``x`` (B, C, H, W) by ``matrix`` (C, C), in the dtype of ``x``."""
    return F.conv2d(x, matrix.to(x.dtype)[:, :, None, None])


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
        return apply_matrix(expm(self.log_weight), x), ladj.expand(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Apply ``exp(−M)``."""
        return apply_matrix(expm(-self.log_weight), z)


class PLUConv1x1(Bijection):
    """``z = P L (U + diag(s)) x`` per pixel; ``ladj = H·W·Σ log|s|`` (Kingma & Dhariwal, "Glow", 2018, Section 3.2).

    Args:
        channels: number of channels; the product starts as a random rotation. The permutation ``P`` and the signs of
            ``s`` stay what they were at the start, as buffers.
    """

    order: Tensor
    sign: Tensor

    def __init__(self, channels: int):
        super().__init__()
        permutation, lower, upper = torch.linalg.lu(random_rotation(channels))
        diagonal = upper.diagonal()
        self.register_buffer("order", permutation.argmax(1))
        self.register_buffer("sign", diagonal.sign().float())
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())

    def _factors(self) -> tuple[Tensor, Tensor]:
        lower, upper = self.lower.double().tril(-1), self.upper.double().triu(1)
        eye = torch.eye(len(lower), dtype=torch.float64, device=lower.device)
        return lower + eye, upper + torch.diag(self.sign.double() * self.log_diagonal.double().exp())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the same shape."""
        lower, upper = self._factors()
        ladj = self.log_diagonal.sum() * math.prod(x.shape[2:])
        return apply_matrix((lower @ upper).index_select(0, self.order), x), ladj.expand(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Apply ``U⁻¹ L⁻¹ Pᵀ``, by two triangular solves in float64 (which, unlike a general inverse, never sync)."""
        lower, upper = self._factors()
        eye = torch.eye(len(lower), dtype=torch.float64, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, eye[self.order].T, upper=False, unitriangular=True)
        return apply_matrix(torch.linalg.solve_triangular(upper, inverse, upper=True), z)
