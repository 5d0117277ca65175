"""Pairwise KL divergences of the class Gaussians, and the objective of Enescu & Sahbi (BMVC 2024).

Equation numbers refer to that paper. The weight ``λ'`` is its ``λ / (K (K − 1))``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flowaug.latents.gaussians import GaussianParameters
from flowaug.latents.moments import ClassMoments

_BLOCK = 2**19  # number of entries in a block of columns


def pairwise_kld(mean: Tensor, variance: Tensor) -> Tensor:
    r"""Compute the KL divergence of every ordered pair of diagonal Gaussians, in nats.

    .. math:: \mathrm{KLD}(y \| y') = \tfrac12 \Big[\sum_d \frac{v_{yd}}{v_{y'd}}
              + \sum_d \frac{(\mu_{yd}-\mu_{y'd})^2}{v_{y'd}} - D + \sum_d \log\frac{v_{y'd}}{v_{yd}}\Big]

    The sums are expanded into two matrix products, with ``O(K²D)`` time and ``O(KD + K²)`` memory; no ``(K, K, D)``
    tensor is created. The means are centered first, which reduces cancellation. Differentiable.

    Args:
        mean: class means, ``(K, D)``.
        variance: class variances, ``(K, D)``, positive.

    Returns:
        ``(K, K)``, with the divergence of ``y`` from ``y'`` in row ``y`` and column ``y'``; the diagonal is 0.

    Example:
        >>> pairwise_kld(torch.tensor([[0.0], [2.0]]), torch.ones(2, 1)).tolist()
        [[0.0, 2.0], [2.0, 0.0]]
    """
    doubled = mean.new_zeros(len(mean), len(mean))  # 2 · KLD
    for m, v in column_blocks(mean, variance):
        centered, precision, log_det = m - m.mean(0), v.reciprocal(), v.log().sum(1)
        scaled = centered * precision
        column_terms = (centered * scaled).sum(1) + log_det - m.shape[1]
        doubled = torch.addmm(doubled + column_terms - log_det[:, None], centered.square() + v, precision.T)
        doubled = torch.addmm(doubled, centered, scaled.T, alpha=-2.0)
    return 0.5 * doubled * _off_diagonal(doubled)


def column_blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Iterate over blocks of columns of several ``(K, D)`` matrices, so that temporaries stay small and in cache.

    Args:
        *matrices: tensors with the same last dimension D. Leading dimensions are kept.

    Returns:
        Iterator of tuples with the same columns of each matrix.
    """
    width = max(1, _BLOCK // len(matrices[0]))
    return zip(*(matrix.split(width, dim=-1) for matrix in matrices), strict=True)


def pair_scale(kld: Tensor, pi: str) -> Tensor:
    """Compute the normalizer π of the divergences. It is a constant: gradients do not flow through it.

    Args:
        kld: pairwise divergences, ``(K, K)``.
        pi: ``"pair"`` for the divergence of each pair (Eq. 9) or ``"mean"`` for their mean (Eq. 10).

    Returns:
        ``(K, K)`` for ``"pair"``, a scalar for ``"mean"``.

    Raises:
        ValueError: if ``pi`` is neither ``"pair"`` nor ``"mean"``.
    """
    if pi not in ("pair", "mean"):
        raise ValueError(f"pi must be 'pair' (Eq. 9) or 'mean' (Eq. 10), got {pi!r}")
    constant = kld.detach()
    floor = torch.finfo(kld.dtype).tiny ** 0.5  # avoids 0/0 for two identical classes
    if pi == "mean":
        constant = constant.sum() / max(1, len(kld) * (len(kld) - 1))
    return constant.clamp(min=floor)


def kernel(kld: Tensor, kld_weight: float, alpha: float, pi: str) -> Tensor:
    r"""Compute the pair weights :math:`\lambda' K_{yy'} = \lambda' \exp(-\mathrm{KLD}/(\pi\alpha)) / (\pi\alpha)`.

    Args:
        kld: pairwise divergences, ``(K, K)``.
        kld_weight: weight :math:`\lambda'`, already divided by K(K−1).
        alpha: scale :math:`\alpha`.
        pi: ``"pair"`` (Eq. 9) or ``"mean"`` (Eq. 10).

    Returns:
        ``(K, K)``, with zero diagonal.
    """
    scale = alpha * pair_scale(kld, pi)
    weights = torch.exp(-kld.clamp(min=0) / scale) / scale
    return weights.mul_(kld_weight).fill_diagonal_(0.0)


def objective(
    value: GaussianParameters, moments: ClassMoments, *, kld_weight: float, alpha: float = 10.0, pi: str = "pair"
) -> Tensor:
    r"""Compute the loss of Eq. (3) and (4), up to a constant. ``fpi`` finds a stationary point of it.

    .. math:: L(\Psi) = \sum_y \overline{\mathrm{NLL}}_y
              + \lambda' \sum_{y \ne y'} \exp(-\mathrm{KLD}(y\|y') / (\pi\alpha)), \quad \pi \text{ held constant}

    Differentiable with respect to ``value``.

    Args:
        value: means and variances, ``(K, D)`` each.
        moments: class moments of the latents.
        kld_weight: weight :math:`\lambda'`, already divided by K(K−1).
        alpha: scale :math:`\alpha`.
        pi: ``"pair"`` (Eq. 9) or ``"mean"`` (Eq. 10).

    Returns:
        A scalar.
    """
    scatter = moments.variance + (moments.mean - value.mean).square()
    likelihood = 0.5 * (value.variance.log() + scatter / value.variance).sum()
    kld = pairwise_kld(value.mean, value.variance)
    decay = torch.exp(-kld / (alpha * pair_scale(kld, pi)))
    return likelihood + kld_weight * (decay * _off_diagonal(decay)).sum()


class Forces(NamedTuple):
    r"""Contribution of the pairwise repulsion to each parameter, ``(K, D)`` each; None if it is not learned.

    Attributes:
        push: :math:`\lambda' \Sigma_y \sum_{y'} (K_{yy'} \Sigma_{y'}^{-1} + K_{y'y} \Sigma_y^{-1}) \delta`, the
            displacement of the means from the class means of the data (Eq. 5).
        shrink: contribution of the pairs to :math:`\Sigma_y A^+ \Sigma_y` (Eq. 6 and 7). The superscript + marks
            the split of A and B in which all terms are positive; it has the same fixed points.
        grow: contribution of the pairs to :math:`B^+`.
    """

    push: Tensor | None = None
    shrink: Tensor | None = None
    grow: Tensor | None = None


def repulsion(mean: Tensor, variance: Tensor, weights: Tensor, learn: tuple[str, ...]) -> Forces:
    r"""Compute the pairwise sums of Eq. (5) to (7), by at most four products of a ``(K, K)`` and a ``(K, D)`` matrix.

    Args:
        mean: class means, ``(K, D)``.
        variance: class variances, ``(K, D)``.
        weights: pair weights :math:`\lambda' K_{yy'}`, ``(K, K)`` with zero diagonal.
        learn: ``"mean"``, ``"variance"`` or both; sums of other parameters are not computed.
    """
    mean, precision = mean - mean.mean(0), variance.reciprocal()  # only differences of means matter
    row_sum = weights.sum(1)[:, None]  # λ'ΣK_yy'
    column_sum = weights.sum(0)[:, None]  # λ'ΣK_y'y
    weighted_precision = weights @ precision  # λ'ΣK_yy'/v'
    weighted_mean = weights.T @ mean  # λ'ΣK_y'y μ'

    push = shrink = grow = None
    if "mean" in learn:  # Eq. (5), expanded with δ = μ − μ'
        push = (mean * weighted_precision).sub_(weights @ precision.mul_(mean)).mul_(variance)
        push.addcmul_(mean, column_sum).sub_(weighted_mean)
    if "variance" in learn:
        # Eq. (7), shrink: λ'ΣK_y'y (δ² + v') + v λ'ΣK_yy'
        shrink = weights.T @ torch.addcmul(variance, mean, mean)
        shrink.addcmul_(mean, (mean * column_sum).sub_(weighted_mean, alpha=2)).addcmul_(variance, row_sum)
        # Eq. (7), grow: v² λ'ΣK_yy'/v' + v λ'ΣK_y'y
        grow = weighted_precision.mul_(variance).add_(column_sum).mul_(variance)
    return Forces(push, shrink, grow)


def _off_diagonal(square: Tensor) -> Tensor:
    """Return a matrix of ones with zero diagonal, of the size, dtype and device of ``square``."""
    return 1 - torch.eye(len(square), dtype=square.dtype, device=square.device)
