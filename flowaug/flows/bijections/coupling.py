"""Coupling layers: one half of the channels is transformed, with parameters computed from the other half."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowaug.flows.activations import tanh
from flowaug.flows.bijections.base import ConditionedBijection
from flowaug.flows.bijections.expm import MAX_LOG, expm_of_pixels, from_pixels, series, taylor_terms, to_pixels
from flowaug.flows.networks import ImageConditioner

# Maximum number of activations per conditioner layer and chunk on a CPU, 2 MiB in float32. They then fit in its cache.
CACHE = 2**19
# Chunks are this much larger if all activations are saved for the backward pass: they do not fit in the cache anyway.
TRAIN_CHUNK_FACTOR = 4
MAX_FULL_CHANNELS = 24  # above it, the matrix exponential uses the low-rank form, as in MEF
RANK = 3  # rank of the low-rank form


class BoundedParameters(nn.Module):
    """Bounded transformation parameters ``rescale · tanh(raw) + reshift``, with learned ``rescale`` and ``reshift``.

    ``rescale`` is clamped to ``±0.75 · bound`` and ``reshift`` to ``±0.25 · bound``, so no optimiser step can make a
    parameter exceed ``bound``.

    Args:
        count: number of channels of ``raw``.
        bound: bound on the magnitude of the result; ``rescale`` is initialised with half of it.
        reshift: initial ``reshift`` (count,); None for 0.
    """

    def __init__(self, count: int, bound: float, reshift: Tensor | None = None):
        super().__init__()
        self.rescale = nn.Parameter(torch.full((count, 1, 1), bound / 2))
        initial = torch.zeros(count) if reshift is None else reshift
        self.reshift = nn.Parameter(initial[:, None, None].clone())
        self.bound = bound

    def _clamped(self) -> tuple[Tensor, Tensor]:
        rescale = self.rescale.clamp(-0.75 * self.bound, 0.75 * self.bound)
        reshift = self.reshift.clamp(-0.25 * self.bound, 0.25 * self.bound)
        return rescale, reshift

    def largest_norm(self) -> Tensor:
        """Return an upper bound on the Frobenius norm of the result for the current parameters, a scalar."""
        rescale, reshift = self._clamped()
        return (rescale.abs() + reshift.abs()).norm()

    def forward(self, raw: Tensor) -> Tensor:
        """Map raw conditioner outputs (B, count, H, W) to bounded parameters of the same shape."""
        rescale, reshift = self._clamped()
        return tanh(raw) * rescale + reshift


class CouplingTransform(nn.Module):
    """Base class of the transformations of a coupling, whose raw parameters are the output of its conditioner.

    Attributes:
        num_raw: number of raw parameters per pixel.
    """

    num_raw: int

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` (B, C, H, W) and ``ladj`` (B,), given the raw parameters (B, num_raw, H, W)."""
        raise NotImplementedError

    def inverse(self, y: Tensor, raw: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W)."""
        raise NotImplementedError

    def shrink_norm_bound(self) -> None:
        """Prepare for inference, where the parameters no longer change (default: nothing)."""


class AdditiveTransform(CouplingTransform):
    """Additive transformation ``y = x + t`` (NICE, Dinh et al. 2015).

    Args:
        channels: number of transformed channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.num_raw = channels

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` (B, C, H, W) and ``ladj`` (B,), which is 0."""
        return x + raw, x.new_zeros(x.shape[0])

    def inverse(self, y: Tensor, raw: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W)."""
        return y - raw


class AffineTransform(CouplingTransform):
    """Affine transformation ``y = exp(s) x + t`` with ``|s| ≤ MAX_LOG`` (RealNVP, Dinh et al. 2017).

    Args:
        channels: number of transformed channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.num_raw = 2 * channels
        self.log_scale = BoundedParameters(channels, MAX_LOG)

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` (B, C, H, W) and ``ladj`` (B,), the sum of ``s``."""
        s, t = raw.chunk(2, dim=1)
        s = self.log_scale(s)
        return s.exp() * x + t, s.sum((1, 2, 3))

    def inverse(self, y: Tensor, raw: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W)."""
        s, t = raw.chunk(2, dim=1)
        return (y - t) * (-self.log_scale(s)).exp()


class MatrixExpTransform(CouplingTransform):
    """Matrix exponential transformation ``y = exp(S) x + t``, with a full c × c matrix ``S`` per pixel.

    ``ladj`` is the sum of the traces of ``S`` (Xiao & Liu, "Generative Flows with Matrix Exponential", 2020,
    Section 3.3). The entries of ``S`` are bounded such that its norm is at most ``MAX_LOG``.

    Args:
        channels: number of transformed channels c.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.num_raw = channels * (channels + 1)
        self.matrix = BoundedParameters(channels**2, MAX_LOG / channels)
        self.norm = MAX_LOG

    def shrink_norm_bound(self) -> None:
        """Replace the bound on the matrix norm by that of the current parameters, which needs fewer series terms.

        Call it only if the parameters no longer change.
        """
        self.norm = self.matrix.largest_norm().item()

    def _matrix_and_shift(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        s, t = raw.split([self.channels**2, self.channels], dim=1)
        return self.matrix(s), t

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` (B, C, H, W) and ``ladj`` (B,), the sum of the traces of ``S``."""
        s, t = self._matrix_and_shift(raw)
        trace = s[:, :: self.channels + 1].sum((1, 2, 3))  # every (c + 1)-th entry is on the diagonal
        return expm_of_pixels(s, x, self.norm) + t, trace

    def inverse(self, y: Tensor, raw: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W), computed with ``exp(−S)``."""
        s, t = self._matrix_and_shift(raw)
        return expm_of_pixels(-s, y - t, self.norm)


class LowRankExpTransform(CouplingTransform):
    """Matrix exponential transformation with a matrix ``S = U V`` of rank 3 per pixel, for many channels.

    With ``φ(A) = (exp(A) − 1) / A`` it is ``exp(S) x = x + U φ(VU) V x``. ``ladj`` is the sum of the traces of ``VU``.

    Args:
        channels: number of transformed channels.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        self.num_raw = (2 * RANK + 1) * channels

        count = RANK * channels
        bound = (MAX_LOG / count) ** 0.5
        self.left = BoundedParameters(count, bound, reshift=torch.empty(count).uniform_(-bound / 4, bound / 4))
        self.right = BoundedParameters(count, bound)
        self.norm = MAX_LOG

    def shrink_norm_bound(self) -> None:
        """Replace the bound on the matrix norm by that of the current parameters, which needs fewer series terms.

        Call it only if the parameters no longer change.
        """
        self.norm = (self.left.largest_norm() * self.right.largest_norm()).item()

    def _factors(self, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, v, t = raw.split([RANK * self.channels, RANK * self.channels, self.channels], dim=1)
        u = to_pixels(self.left(u)).unflatten(1, (self.channels, RANK))
        v = to_pixels(self.right(v)).unflatten(1, (RANK, self.channels))
        return u, v, t

    def forward(self, x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``y`` (B, C, H, W) and ``ladj`` (B,), the sum of the traces of ``VU``."""
        u, v, t = self._factors(raw)
        vu = v @ u
        y = self._apply_exp(u, v, vu, to_pixels(x))
        trace = vu.diagonal(dim1=-2, dim2=-1).sum(-1)
        return from_pixels(y, x) + t, trace.view(x.shape[0], -1).sum(1)

    def inverse(self, y: Tensor, raw: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W), computed with ``exp(−UV)``."""
        u, v, t = self._factors(raw)
        return from_pixels(self._apply_exp(-u, v, v @ -u, to_pixels(y - t)), y)

    def _apply_exp(self, u: Tensor, v: Tensor, vu: Tensor, x: Tensor) -> Tensor:
        """Compute ``exp(UV) x`` for pixels ``x`` (N, C)."""
        x = x[..., None]
        return (x + u @ series(vu, v @ x, taylor_terms(self.norm, x.dtype), 1))[..., 0]


TRANSFORMS = {"additive": AdditiveTransform, "affine": AffineTransform, "matrix_exp": MatrixExpTransform}


def make_transform(kind: str, channels: int) -> CouplingTransform:
    """Build the transformation of a coupling.

    Args:
        kind: "additive", "affine" or "matrix_exp". Above 24 channels "matrix_exp" uses matrices of rank 3.
        channels: number of transformed channels.

    Raises:
        ValueError: for an unknown ``kind``.
    """
    if kind not in TRANSFORMS:
        raise ValueError(f"coupling is {kind!r}; expected one of {sorted(TRANSFORMS)}")
    if kind == "matrix_exp" and channels > MAX_FULL_CHANNELS:
        return LowRankExpTransform(channels)
    return TRANSFORMS[kind](channels)


class Coupling(ConditionedBijection):
    """Coupling of the two halves of the channels, ``[x1, x2] → [x1, T(x2; conditioner(x1))]``.

    On a CPU a large batch is processed in chunks whose activations fit in the cache. The examples are independent, so
    this changes the results by rounding errors only.

    Args:
        channels: number of channels, at least 2. If it is odd, the conditioning half ``x1`` is the larger one.
        kind: transformation T: "additive", "affine" or "matrix_exp".
        make_conditioner: builds the conditioner, given its numbers of input and output channels.

    Attributes:
        cache: maximum number of activations per conditioner layer and chunk on a CPU.
    """

    conditioner: ImageConditioner

    def __init__(self, channels: int, kind: str, make_conditioner: Callable[[int, int], ImageConditioner]):
        super().__init__()
        self.cache = CACHE
        self.transform = make_transform(kind, channels // 2)
        self.conditioner = make_conditioner(channels - channels // 2, self.transform.num_raw)

    def forward_chunk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, C, H, W) to the same shape."""
        x1, x2 = _split_channels(x)
        y2, ladj = self.transform(x2, self.condition(x1))
        return torch.cat([x1, y2], dim=1), ladj

    def inverse_chunk(self, z: Tensor) -> Tensor:
        """Map back to ``x``; the conditioning half is unchanged, so the parameters can be recomputed from it."""
        x1, y2 = _split_channels(z)
        x2 = self.transform.inverse(y2, self.condition(x1))
        return torch.cat([x1, x2], dim=1)

    def chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split a batch on a CPU into chunks whose activations fit in the cache; do not split on other devices.

        The chunk size is a power of two.
        """
        if x.device.type != "cpu":
            return (x,)

        saves_activations = torch.is_grad_enabled() and not self.grad_checkpointing
        budget = self.cache * (TRAIN_CHUNK_FACTOR if saves_activations else 1)
        max_size = budget // (self.conditioner.hidden * x.shape[2] * x.shape[3])
        return x.split(1 << max(0, max_size.bit_length() - 1))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Initialise the conditioner on ``x1`` and return the output on ``x``."""
        x1, x2 = _split_channels(x)
        y2, _ = self.transform(x2, self.conditioner.initialise(x1))
        return torch.cat([x1, y2], dim=1)


def _split_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    x1, x2 = x.split([x.shape[1] - x.shape[1] // 2, x.shape[1] // 2], dim=1)
    return x1, x2
