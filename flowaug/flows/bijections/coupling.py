"""Coupling: one half of the channels is transformed under the guidance of the other half."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowaug.flows.activations import tanh
from flowaug.flows.bijections.base import Conditioned
from flowaug.flows.bijections.expm import MAX_LOG, expm_of_pixels, from_pixels, series, taylor_terms, to_pixels

CACHE = 2**19  # activations that one layer of a conditioner may have at a time on a CPU: 2 MiB in float32
KEEP = 4  # times as many where all activations are kept for a backward pass, and the cache is lost anyway
RANK = 3  # rank of the matrix form where c × c matrices would be too large
MAX_FULL_CHANNELS = 24  # beyond it the rank-3 form is used, as in MEF


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

    def _clamped(self) -> tuple[Tensor, Tensor]:
        limits = 0.75 * self.bound, 0.25 * self.bound
        return tuple(p.clamp(-limit, limit) for p, limit in zip((self.rescale, self.reshift), limits, strict=True))

    def largest_norm(self) -> Tensor:
        """The Frobenius norm that no result exceeds with the present parameters."""
        rescale, reshift = self._clamped()
        return (rescale.abs() + reshift.abs()).norm()

    def forward(self, raw: Tensor) -> Tensor:
        """Map raw conditioner outputs (B, count, H, W) to bounded parameters of the same shape."""
        rescale, reshift = self._clamped()
        return tanh(raw) * rescale + reshift


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


class MatrixExpTransform(nn.Module):
    """``y = exp(S) x + t``, ``S`` a full c × c matrix per pixel, ``ladj = Σ tr S`` (Xiao & Liu 2020, Section 3.3)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.num_raw = channels * (channels + 1)
        self.matrix = BoundedParameters(channels**2, MAX_LOG / channels)
        self.norm = MAX_LOG

    def tighten(self) -> None:
        """Take no more terms of the series than the present parameters need; for a transform that stays as it is."""
        self.norm = self.matrix.largest_norm().item()

    def _matrix_and_shift(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        s, t = raw.split([self.channels**2, self.channels], dim=1)
        return self.matrix(s), t

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` (B, C, H, W) and the sum of the traces."""
        s, t = self._matrix_and_shift(raw)
        return expm_of_pixels(s, x, self.norm) + t, s[:, :: self.channels + 1].sum((1, 2, 3))

    def inverse(self, y: Tensor, raw: Tensor) -> Tensor:
        """Return ``x`` by ``exp(−S)``."""
        s, t = self._matrix_and_shift(raw)
        return expm_of_pixels(-s, y - t, self.norm)


class LowRankExpTransform(nn.Module):
    """The matrix form with ``S = U V`` of rank 3: ``exp(S) x = x + U φ(VU) V x``, ``φ(A) = (exp(A) − 1)/A``."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.num_raw = (2 * RANK + 1) * channels
        count, bound = RANK * channels, (MAX_LOG / (RANK * channels)) ** 0.5
        self.left = BoundedParameters(count, bound, reshift=torch.empty(count).uniform_(-bound / 4, bound / 4))
        self.right = BoundedParameters(count, bound)
        self.norm = MAX_LOG

    def tighten(self) -> None:
        """Take no more terms of the series than the present parameters need; for a transform that stays as it is."""
        self.norm = (self.left.largest_norm() * self.right.largest_norm()).item()

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

    def _act(self, u: Tensor, v: Tensor, vu: Tensor, x: Tensor) -> Tensor:
        x = x[..., None]
        return (x + u @ series(vu, v @ x, taylor_terms(self.norm, x.dtype), 1))[..., 0]


TRANSFORMS = {"additive": AdditiveTransform, "affine": AffineTransform, "matrix_exp": MatrixExpTransform}


def make_transform(kind: str, channels: int) -> nn.Module:
    """Build the transformation of a coupling; ``matrix_exp`` turns to its rank-3 form above 24 channels."""
    if kind not in TRANSFORMS:
        raise ValueError(f"coupling is {kind!r}; expected one of {sorted(TRANSFORMS)}")
    if kind == "matrix_exp" and channels > MAX_FULL_CHANNELS:
        return LowRankExpTransform(channels)
    return TRANSFORMS[kind](channels)


class Coupling(Conditioned):
    """``[x1, x2] → [x1, T(x2; conditioner(x1))]``, halves of the channels.

    On a CPU a large batch goes through in pieces whose activations stay in the cache; examples do not meet, so that
    changes no value beyond rounding.

    Args:
        channels: number of channels, at least 2; of an odd number the larger half conditions.
        kind: "additive", "affine" or "matrix_exp".
        make_conditioner: builds the network, given its numbers of input and output channels.

    Attributes:
        cache: activations that one layer of the conditioner may have at a time on a CPU.
    """

    def __init__(self, channels: int, kind: str, make_conditioner: Callable[[int, int], nn.Module]):
        super().__init__()
        self.cache = CACHE
        self.transform = make_transform(kind, channels // 2)
        self.conditioner = make_conditioner(channels - channels // 2, self.transform.num_raw)

    def forward_piece(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the same shape."""
        x1, x2 = _halves(x)
        y2, ladj = self.transform(x2, self.condition(x1))
        return torch.cat([x1, y2], dim=1), ladj

    def inverse_piece(self, z: Tensor) -> Tensor:
        """Undo: the conditioning half came through unchanged."""
        x1, y2 = _halves(z)
        return torch.cat([x1, self.transform.inverse(y2, self.condition(x1))], dim=1)

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """As many images at a time as fit in the cache of a CPU."""
        if x.device.type != "cpu":
            return (x,)
        keep = torch.is_grad_enabled() and not self.recompute
        fit = self.cache * (KEEP if keep else 1) // (self.conditioner.hidden * x.shape[2] * x.shape[3])
        return x.split(1 << max(0, fit.bit_length() - 1))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Initialise the conditioner on ``x1``."""
        x1, x2 = _halves(x)
        return torch.cat([x1, self.transform(x2, self.conditioner.initialise(x1))[0]], dim=1)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.split([x.shape[1] - x.shape[1] // 2, x.shape[1] // 2], dim=1)
