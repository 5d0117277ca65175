"""Pairwise divergences of the class Gaussians and the objective of Enescu & Sahbi (BMVC 2024) built on them.

Equation numbers are the paper's. `λ'` is its `λ / (K (K − 1))`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flowaug.latents.gaussians import GaussianParameters
from flowaug.latents.moments import ClassMoments

__all__ = ["Forces", "column_blocks", "kernel", "objective", "pair_scale", "pairwise_kld", "repulsion"]

_BLOCK = 2**19  # entries of a (K, columns) block


def pairwise_kld(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Kullback-Leibler divergences of every ordered pair of diagonal Gaussians, in nats.

    .. math:: \mathrm{KLD}(y \| y') = \tfrac12 \Big[\sum_d \frac{v_{yd}}{v_{y'd}}
              + \sum_d \frac{(\mu_{yd}-\mu_{y'd})^2}{v_{y'd}} - D + \sum_d \log\frac{v_{y'd}}{v_{yd}}\Big]

    Two matrix products: `O(K²D)` time, `O(KD + K²)` memory, never a `K×K×D` tensor. The means are centred
    first, which keeps the terms that cancel as small as the spread of the classes. Differentiable.

    Args:
        mean: `(K, D)`.
        variance: `(K, D)`, positive.

    Returns:
        `(K, K)`, row `y`, column `y'`; zero diagonal.

    Example:
        >>> pairwise_kld(torch.tensor([[0.0], [2.0]]), torch.ones(2, 1)).tolist()
        [[0.0, 2.0], [2.0, 0.0]]
    """
    twice = mean.new_zeros(len(mean), len(mean))
    for m, v in column_blocks(mean, variance):
        centred, precision, log_det = m - m.mean(0), v.reciprocal(), v.log().sum(1)
        scaled = centred * precision
        own = (centred * scaled).sum(1) + log_det - m.shape[1]
        twice = torch.addmm(twice + own - log_det[:, None], centred.square() + v, precision.T)
        twice = torch.addmm(twice, centred, scaled.T, alpha=-2.0)
    return 0.5 * twice * _off_diagonal(twice)


def column_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same columns of several `(K, D)` matrices, some at a time: temporaries stay small and in cache."""
    width = max(1, _BLOCK // len(matrices[0]))
    return zip(*(matrix.split(width, dim=-1) for matrix in matrices), strict=True)


def pair_scale(kld: Tensor, pi: str) -> Tensor:
    """π of Eq. (9), one per pair `(K, K)`, or of Eq. (10), a scalar; a constant: no gradient flows through it.

    The floor keeps the 0/0 of two classes that coincide finite.
    """
    if pi not in ("pair", "mean"):
        raise ValueError(f"pi must be 'pair' (Eq. 9) or 'mean' (Eq. 10), got {pi!r}")
    constant, floor = kld.detach(), torch.finfo(kld.dtype).tiny ** 0.5
    if pi == "mean":
        constant = constant.sum() / max(1, len(kld) * (len(kld) - 1))
    return constant.clamp(min=floor)


def kernel(kld: Tensor, kld_weight: float, alpha: float, pi: str) -> Tensor:
    r"""Weights :math:`\lambda' K_{yy'} = \lambda' \exp(-\mathrm{KLD}/(\pi\alpha)) / (\pi\alpha)`, `(K, K)`.

    Args:
        kld: pairwise divergences, `(K, K)`.
        kld_weight: :math:`\lambda'`, already divided by K(K−1).
        alpha: the scale :math:`\alpha`.
        pi: `"pair"` (Eq. 9) or `"mean"` (Eq. 10).
    """
    scale = alpha * pair_scale(kld, pi)
    weights = torch.exp(-kld.clamp(min=0) / scale) / scale
    return weights.mul_(kld_weight).fill_diagonal_(0.0)


def objective(
    value: GaussianParameters, moments: ClassMoments, *, kld_weight: float, alpha: float = 10.0, pi: str = "pair"
) -> Tensor:
    r"""The loss that `fpi` makes stationary, Eq. (3) and (4) up to a constant; differentiable in `value`.

    .. math:: L(\Psi) = \sum_y \overline{\mathrm{NLL}}_y
              + \lambda' \sum_{y \ne y'} \exp(-\mathrm{KLD}(y\|y') / (\pi\alpha)), \quad \pi \text{ held constant}

    Args:
        value: means and variances, `(K, D)` each.
        moments: class statistics of the latents.
        kld_weight: :math:`\lambda'`, already divided by K(K−1).
        alpha: the scale :math:`\alpha`.
        pi: `"pair"` or `"mean"`.

    Returns:
        A scalar.
    """
    scatter = moments.variance + (moments.mean - value.mean).square()
    likelihood = 0.5 * (value.variance.log() + scatter / value.variance).sum()
    kld = pairwise_kld(value.mean, value.variance)
    decay = torch.exp(-kld / (alpha * pair_scale(kld, pi)))
    return likelihood + kld_weight * (decay * _off_diagonal(decay)).sum()


class Forces(NamedTuple):
    r"""What all pairs together do to each parameter, `(K, D)` each; None for what is not learned.

    Attributes:
        push: :math:`\lambda' \Sigma_y \sum_{y'} (K_{yy'} \Sigma_{y'}^{-1} + K_{y'y} \Sigma_y^{-1}) \delta`,
            the displacement of the mean from the data's (Eq. 5).
        shrink: the pairs' share of :math:`\Sigma_y A^+ \Sigma_y` (Eq. 6 and 7, positive split).
        grow: the pairs' share of :math:`B^+`.
    """

    push: Tensor | None = None
    shrink: Tensor | None = None
    grow: Tensor | None = None


def repulsion(mean: Tensor, variance: Tensor, weights: Tensor, learn: tuple[str, ...]) -> Forces:
    r"""All pairwise sums of Eq. (5) to (7), by at most four products of a `(K, K)` with a `(K, D)` matrix.

    Args:
        mean: `(K, D)`.
        variance: `(K, D)`.
        weights: :math:`\lambda' K_{yy'}`, `(K, K)` with zero diagonal.
        learn: `"mean"`, `"variance"` or both; the other's sums are not computed.
    """
    mean, precision = mean - mean.mean(0), variance.reciprocal()  # only differences of means enter
    given, taken = weights.sum(1)[:, None], weights.sum(0)[:, None]  # λ'ΣK_yy' and λ'ΣK_y'y
    spread, drawn = weights @ precision, weights.T @ mean  # λ'ΣK_yy'/v' and λ'ΣK_y'y μ'
    push = shrink = grow = None
    if "mean" in learn:  # Eq. (5), δ = μ − μ' multiplied out
        push = (mean * spread).sub_(weights @ precision.mul_(mean)).mul_(variance)
        push.addcmul_(mean, taken).sub_(drawn)
    if "variance" in learn:  # Eq. (7): λ'ΣK_y'y (δ² + v') + v λ'ΣK_yy', and v² λ'ΣK_yy'/v' + v λ'ΣK_y'y
        shrink = weights.T @ torch.addcmul(variance, mean, mean)
        shrink.addcmul_(mean, (mean * taken).sub_(drawn, alpha=2)).addcmul_(variance, given)
        grow = spread.mul_(variance).add_(taken).mul_(variance)
    return Forces(push, shrink, grow)


def _off_diagonal(square: Tensor) -> Tensor:
    return 1 - torch.eye(len(square), dtype=square.dtype, device=square.device)
