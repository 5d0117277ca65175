"""Invertible 1×1 convolutions, parametrised by a matrix exponential (MEF) or a PLU factorisation (Glow)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowaug.flows.bijections.base import Bijection
from flowaug.flows.bijections.expm import expm


def random_rotation(n: int) -> Tensor:
    """Draw a rotation matrix (n, n) uniformly, in float64, with the global RNG of torch."""
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    q = q * r.diagonal().sign()
    if torch.linalg.det(q) < 0:
        q[0] = -q[0]
    return q


def random_log_rotation(n: int) -> Tensor:
    """Draw a random rotation and return its logarithm, a skew-symmetric matrix (n, n) in float32."""
    if torch.get_default_device().type == "meta":
        return torch.empty(n, n)  # only the shape counts, and a decomposition on the meta device is slow
    # The eigenvalues of a rotation have absolute value 1 and its eigenvectors are orthonormal.
    eigenvalues, vectors = torch.linalg.eig(random_rotation(n))
    log = ((vectors * (1j * eigenvalues.angle())) @ vectors.mH).real
    return ((log - log.T) / 2).float()


def apply_matrix(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply the channels of every pixel of ``x`` (B, C, H, W) by ``matrix`` (C, C), in the dtype of ``x``."""
    return F.conv2d(x, matrix.to(x.dtype)[:, :, None, None])


def _random_factors(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a random rotation and return its PLU factors, each (n, n) in float64."""
    if torch.get_default_device().type == "meta":
        empty = torch.empty(n, n, dtype=torch.float64)
        return empty, empty, empty
    return torch.linalg.lu(random_rotation(n))


class Conv1x1(Bijection):
    """Base class of invertible 1×1 convolutions: ``z = W x`` per pixel, ``ladj = H·W·log|det W|``."""

    def matrix(self) -> Tensor:
        """Return ``W`` (C, C) in float64."""
        raise NotImplementedError

    def inverse_matrix(self) -> Tensor:
        """Return ``W⁻¹`` (C, C) in float64."""
        raise NotImplementedError

    def log_det(self) -> Tensor:
        """Return ``log|det W|``, a scalar in the dtype of the parameters."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the same shape."""
        ladj = self.log_det() * math.prod(x.shape[2:])
        return apply_matrix(self.matrix(), x), ladj.expand(x.shape[0])

    def inverse(self, z: Tensor) -> Tensor:
        """Map (B, C, H, W) back with the inverse matrix."""
        return apply_matrix(self.inverse_matrix(), z)


class InvertibleConv1x1(Conv1x1):
    """Invertible 1×1 convolution with ``W = exp(M)`` and ``log|det W| = tr M`` (Xiao & Liu 2020, Section 3.2).

    ``M`` is initialised with the logarithm of a random rotation.

    Args:
        channels: number of channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.log_weight = nn.Parameter(random_log_rotation(channels))

    def matrix(self) -> Tensor:
        """Return ``exp(M)`` (C, C) in float64."""
        return expm(self.log_weight)

    def inverse_matrix(self) -> Tensor:
        """Return ``exp(−M)`` (C, C) in float64."""
        return expm(-self.log_weight)

    def log_det(self) -> Tensor:
        """Return ``tr M``, a scalar."""
        return self.log_weight.trace()


class PLUConv1x1(Conv1x1):
    """Invertible 1×1 convolution with ``W = P L (U + diag(s))`` and ``log|det W| = Σ log|s|``.

    ``W`` is initialised with a random rotation. The permutation ``P`` and the signs of ``s`` are not learned (Kingma &
    Dhariwal, "Glow", 2018, Section 3.2).

    Args:
        channels: number of channels.
    """

    order: Tensor
    sign: Tensor

    def __init__(self, channels: int):
        super().__init__()
        permutation, lower, upper = _random_factors(channels)
        diagonal = upper.diagonal()
        self.register_buffer("order", permutation.argmax(1))
        self.register_buffer("sign", diagonal.sign().float())
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return ``L`` and ``U + diag(s)``, both (C, C) in float64."""
        lower = self.lower.double().tril(-1)
        upper = self.upper.double().triu(1)
        diagonal = self.sign.double() * self.log_diagonal.double().exp()
        eye = torch.eye(len(lower), dtype=torch.float64, device=lower.device)
        return lower + eye, upper + torch.diag(diagonal)

    def matrix(self) -> Tensor:
        """Return ``P L (U + diag(s))`` (C, C) in float64."""
        lower, upper = self._factors()
        return (lower @ upper).index_select(0, self.order)

    def inverse_matrix(self) -> Tensor:
        """Return ``(U + diag(s))⁻¹ L⁻¹ Pᵀ`` (C, C) in float64.

        It is computed with two triangular solves. Unlike a general inverse, these do not synchronise a GPU.
        """
        lower, upper = self._factors()
        eye = torch.eye(len(lower), dtype=torch.float64, device=lower.device)
        inverse = torch.linalg.solve_triangular(lower, eye[self.order].T, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, inverse, upper=True)

    def log_det(self) -> Tensor:
        """Return ``Σ log|s|``, a scalar."""
        return self.log_diagonal.sum()
