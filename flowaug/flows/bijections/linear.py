"""Invertible 1×1 convolutions: by the matrix exponential (MEF) and by a PLU factorisation (Glow)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowaug.flows.bijections.base import Bijection
from flowaug.flows.bijections.expm import expm


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


class Conv1x1(Bijection):
    """``z = W x`` per pixel; ``ladj = H·W·log|det W|``."""

    def matrix(self) -> Tensor:
        """``W`` (C, C) in float64."""
        raise NotImplementedError

    def inverse_matrix(self) -> Tensor:
        """``W⁻¹`` (C, C) in float64."""
        raise NotImplementedError

    def log_det(self) -> Tensor:
        """``log|det W|``, a scalar in the dtype of the parameters."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the same shape."""
        ladj = self.log_det() * math.prod(x.shape[2:])
        return apply_matrix(self.matrix(), x), ladj.expand(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Undo, by the inverse matrix."""
        return apply_matrix(self.inverse_matrix(), z)


class InvertibleConv1x1(Conv1x1):
    """``W = exp(M)``, ``log|det W| = tr M`` (Xiao & Liu 2020, Section 3.2).

    Args:
        channels: number of channels; ``M`` starts as the logarithm of a random rotation.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_weight = nn.Parameter(random_log_rotation(channels))

    def matrix(self) -> Tensor:
        """``exp(M)`` (C, C) in float64."""
        return expm(self.log_weight)

    def inverse_matrix(self) -> Tensor:
        """``exp(−M)`` (C, C) in float64."""
        return expm(-self.log_weight)

    def log_det(self) -> Tensor:
        """``tr M``."""
        return self.log_weight.trace()


class PLUConv1x1(Conv1x1):
    """``W = P L (U + diag(s))``, ``log|det W| = Σ log|s|`` (Kingma & Dhariwal, "Glow", 2018, Section 3.2).

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

    def matrix(self) -> Tensor:
        """``P L (U + diag(s))`` (C, C) in float64."""
        lower, upper = self._factors()
        return (lower @ upper).index_select(0, self.order)

    def inverse_matrix(self) -> Tensor:
        """``U⁻¹ L⁻¹ Pᵀ`` by two triangular solves in float64 (which, unlike a general inverse, never sync)."""
        lower, upper = self._factors()
        eye = torch.eye(len(lower), dtype=torch.float64, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, eye[self.order].T, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, inverse, upper=True)

    def log_det(self) -> Tensor:
        """``Σ log|s|``."""
        return self.log_diagonal.sum()
