"""Coupling: one half of the channels is transformed under the guidance of the other half."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowaug.bijections.base import Bijection

MAX_LOG = 2.0  # bound on every log-scale, and on the norm of every matrix that is exponentiated
RANK = 3  # rank of the matrix form where c × c matrices would be too large
MAX_FULL_CHANNELS = 24  # beyond it the rank-3 form is used, as in MEF


def taylor_terms(dtype: torch.dtype) -> int:
    """Terms of the exponential series that reach rounding error for matrices of norm up to ``MAX_LOG``."""
    return 26 if dtype == torch.float64 else 16


class BoundedParameters(nn.Module):
    """``rescale · tanh(raw) + reshift``, each entry within ``bound`` whatever the optimiser does (SPEC §2).

    Args:
        count: number of raw channels.
        bound: bound on the magnitude of the result; ``rescale`` starts at half of it.
        reshift: start of ``reshift``, (count,) or None for 0.
    """

    def __init__(self, count: int, bound: float, reshift: Tensor | None = None):
        super().__init__()
        self.rescale = nn.Parameter(torch.full((count, 1, 1), bound / 2))
        start = torch.zeros(count) if reshift is None else reshift
        self.reshift = nn.Parameter(start[:, None, None].clone())
        self.bound = bound

    def forward(self, raw: Tensor) -> Tensor:
        """Map raw conditioner outputs (B, count, H, W) to bounded parameters of the same shape."""
        rescale = self.rescale.clamp(-0.75 * self.bound, 0.75 * self.bound)
        return torch.tanh(raw) * rescale + self.reshift.clamp(-0.25 * self.bound, 0.25 * self.bound)


class AdditiveTransform(nn.Module):
    """``y = x + t`` (NICE, Dinh et al. 2015)."""

    def __init__(self, channels: int):
        super().__init__()
        self.num_raw = channels

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` (B, C, H, W) and a log-determinant of 0."""
        return x + raw, x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor, raw: Tensor) -> Tensor:
        """Return ``x``."""
        return y - raw


class AffineTransform(nn.Module):
    """``y = exp(s) x + t`` with ``|s| ≤ MAX_LOG`` (RealNVP, Dinh et al. 2017)."""

    def __init__(self, channels: int):
        super().__init__()
        self.num_raw = 2 * channels
        self.log_scale = BoundedParameters(channels, MAX_LOG)

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` (B, C, H, W) and ``Σ s``."""
        s, t = raw.chunk(2, dim=1)
        s = self.log_scale(s)
        return s.exp() * x + t, s.sum((1, 2, 3))

    def inverse(self, y: Tensor, raw: Tensor) -> Tensor:
        """Return ``x``."""
        s, t = raw.chunk(2, dim=1)
        return (y - t) * (-self.log_scale(s)).exp()


def expm_action(s: Tensor, x: Tensor) -> Tensor:
    """``exp(S) x`` by the series of the action: matrix times vector only, a fixed number of terms.

    Args:
        s: matrices (..., c, c) of norm at most ``MAX_LOG``.
        x: vectors (..., c, 1).
    """
    total = term = x
    for k in range(1, taylor_terms(x.dtype) + 1):
        term = (s @ term) / k
        total = total + term
    return total


def to_pixels(x: Tensor) -> Tensor:
    """Reshape (B, C, H, W) to (B·H·W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def from_pixels(pixels: Tensor, like: Tensor) -> Tensor:
    """Reshape (B·H·W, C) to the shape (B, C, H, W) of ``like``."""
    b, _, h, w = like.shape
    return pixels.view(b, h, w, -1).permute(0, 3, 1, 2)


class MatrixExpTransform(nn.Module):
    """``y = exp(S) x + t``, ``S`` a full c × c matrix per pixel, ``ladj = Σ tr S`` (Xiao & Liu 2020, Section 3.3)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.num_raw = channels * (channels + 1)
        self.matrix = BoundedParameters(channels**2, MAX_LOG / channels)

    def _matrix_and_shift(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        s, t = raw.split([self.channels**2, self.channels], dim=1)
        return to_pixels(self.matrix(s)).unflatten(1, (self.channels, self.channels)), t

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` (B, C, H, W) and the sum of the traces."""
        s, t = self._matrix_and_shift(raw)
        y = expm_action(s, to_pixels(x)[..., None])[..., 0]
        trace = s.diagonal(dim1=-2, dim2=-1).sum(-1)
        return from_pixels(y, x) + t, trace.view(x.shape[0], -1).sum(1)

    def inverse(self, y: Tensor, raw: Tensor) -> Tensor:
        """Return ``x`` by ``exp(−S)``."""
        s, t = self._matrix_and_shift(raw)
        return from_pixels(expm_action(-s, to_pixels(y - t)[..., None])[..., 0], y)


class LowRankExpTransform(nn.Module):
    """The matrix form with ``S = U V`` of rank 3: ``exp(S) x = x + U φ(VU) V x``, ``φ(A) = (exp(A) − 1)/A``."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.num_raw = (2 * RANK + 1) * channels
        count, bound = RANK * channels, (MAX_LOG / (RANK * channels)) ** 0.5
        self.left = BoundedParameters(count, bound, reshift=torch.empty(count).uniform_(-bound / 4, bound / 4))
        self.right = BoundedParameters(count, bound)

    def _factors(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, v, t = raw.split([RANK * self.channels, RANK * self.channels, self.channels], dim=1)
        u = to_pixels(self.left(u)).unflatten(1, (self.channels, RANK))
        return u, to_pixels(self.right(v)).unflatten(1, (RANK, self.channels)), t

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` (B, C, H, W) and the sum of the traces of ``VU``."""
        u, v, t = self._factors(raw)
        vu = v @ u
        y = self._act(u, v, vu, to_pixels(x))
        trace = vu.diagonal(dim1=-2, dim2=-1).sum(-1)
        return from_pixels(y, x) + t, trace.view(x.shape[0], -1).sum(1)

    def inverse(self, y: Tensor, raw: Tensor) -> Tensor:
        """Return ``x`` by ``exp(−UV)``."""
        u, v, t = self._factors(raw)
        return from_pixels(self._act(-u, v, v @ -u, to_pixels(y - t)), y)

    @staticmethod
    def _act(u: Tensor, v: Tensor, vu: Tensor, x: Tensor) -> Tensor:
        x = x[..., None]
        total = term = v @ x
        for k in range(2, taylor_terms(x.dtype) + 1):
            term = (vu @ term) / k
            total = total + term
        return (x + u @ total)[..., 0]


TRANSFORMS = {"additive": AdditiveTransform, "affine": AffineTransform, "matrix_exp": MatrixExpTransform}


def make_transform(kind: str, channels: int) -> nn.Module:
    """Build the transformation of a coupling; ``matrix_exp`` turns to its rank-3 form above 24 channels."""
    if kind not in TRANSFORMS:
        raise ValueError(f"coupling is {kind!r}; expected one of {sorted(TRANSFORMS)}")
    if kind == "matrix_exp" and channels > MAX_FULL_CHANNELS:
        return LowRankExpTransform(channels)
    return TRANSFORMS[kind](channels)


class Coupling(Bijection):
    """``[x1, x2] → [x1, T(x2; conditioner(x1))]``, halves of the channels.

    Args:
        channels: number of channels, at least 2; of an odd number the larger half conditions.
        kind: "additive", "affine" or "matrix_exp".
        make_conditioner: builds the network, given its numbers of input and output channels.
    """

    def __init__(self, channels: int, kind: str, make_conditioner: Callable[[int, int], nn.Module]):
        super().__init__()
        self.transform = make_transform(kind, channels // 2)
        self.conditioner = make_conditioner(channels - channels // 2, self.transform.num_raw)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the same shape."""
        x1, x2 = self._halves(x)
        y2, ladj = self.transform(x2, self.conditioner(x1))
        return torch.cat([x1, y2], dim=1), ladj

    def inverse(self, z: Tensor) -> Tensor:
        """Undo: the conditioning half came through unchanged."""
        x1, y2 = self._halves(z)
        return torch.cat([x1, self.transform.inverse(y2, self.conditioner(x1))], dim=1)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Initialise the conditioner on ``x1``."""
        x1, x2 = self._halves(x)
        return torch.cat([x1, self.transform(x2, self.conditioner.initialise(x1))[0]], dim=1)

    @staticmethod
    def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.split([x.shape[1] - x.shape[1] // 2, x.shape[1] // 2], dim=1)
