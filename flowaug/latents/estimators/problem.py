"""The fixed-point problem of Eq. (5) and (6) of Enescu & Sahbi (BMVC 2024): objective, gradient, step and residual."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowaug.latents.estimators.divergence import column_blocks, kernel, pair_scale, pairwise_kld, repulsion
from flowaug.latents.gaussians import GaussianParameters

_EPS = 1e-9  # absolute term in the denominator of the residual, in standard deviations per coordinate
_MIN_CURVATURE = 0.05  # lower bound of the curvature along a mean, relative to that of the data term
_MAX_VARIANCE_STEP = 2.0  # largest factor by which an exact step changes a variance


class ObjectiveTerms(NamedTuple):
    """A state and the terms of the objective there, which decide whether a step is accepted.

    Attributes:
        x: state, ``(blocks, K, D)`` float64: the learned means, then the learned log-variances.
        kld: pairwise divergences, ``(K, K)``.
        likelihood: negative log-likelihood (data term), up to a constant.
    """

    x: Tensor
    kld: Tensor
    likelihood: float


class Iterate(NamedTuple):
    """A state with its objective terms, gradient and step.

    Attributes:
        terms: the state and the terms of the objective.
        gradient: gradient of the objective with respect to the state, ``(blocks, K, D)``. It is 0 for variances at a
            bound beyond which the objective would decrease.
        step: undamped update, ``(blocks, K, D)``. It is one sweep of Eq. (5) and (6) or, for an exact problem, the
            step to the minimum along each coordinate.
        residual: relative norm of the gradient, see ``FixedPoint``.
    """

    terms: ObjectiveTerms
    gradient: Tensor
    step: Tensor
    residual: float


class Problem:
    """Evaluate Eq. (5) and (6) for given class statistics.

    Args:
        data: means and variances of the latents, ``(K, D)`` float64.
        fixed: the parameter that is not learned (means or variances); None if both are learned.
        kld_weight: weight λ', already divided by K(K−1).
        alpha: scale α of the exponential.
        pi: ``"pair"`` or ``"mean"``.
        learn: ``"mean"``, ``"variance"`` or both.
        bounds: lower and upper bound of learned variances.
        isotropic: use one variance per class.
        exact: if variances are learned, let each step lead to the minimum of the objective along its coordinate, with
            the other coordinates and the pair weights fixed. Otherwise a step is one sweep of Eq. (5) and (6) as
            published.
        dtype: dtype of gradient and step. The state, the divergences and the data term are float64.
    """

    def __init__(
        self,
        data: GaussianParameters,
        fixed: Tensor | None,
        *,
        kld_weight: float,
        alpha: float,
        pi: str,
        learn: tuple[str, ...],
        bounds: tuple[float, float] = (0.0, math.inf),
        isotropic: bool = False,
        exact: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.data, self.fixed, self.learn, self.isotropic, self.bounds = data, fixed, learn, isotropic, bounds
        self.kld_weight, self.alpha, self.pi, self.exact, self.dtype = kld_weight, alpha, pi, exact, dtype
        low, high = bounds
        self.log_bounds = (math.log(low) if low > 0 else -math.inf, math.log(high))

    def project(self, x: Tensor) -> Tensor:
        """Clamp the log-variances of a state to the bounds, in place, and return the state."""
        if "variance" in self.learn:
            x[-1].clamp_(*self.log_bounds)
        return x

    def value(self, x: Tensor) -> GaussianParameters:
        """Return the means and variances of a state. The means are a view of it."""
        fixed = self.fixed
        variance = x[-1].exp().clamp_(*self.bounds) if fixed is None or "variance" in self.learn else fixed
        return GaussianParameters(x[0] if fixed is None or "mean" in self.learn else fixed, variance)

    def evaluate(self, x: Tensor) -> Iterate:
        """Compute objective terms, gradient, step and residual of a state."""
        return self.forces(self.measure(x))

    def measure(self, x: Tensor) -> ObjectiveTerms:
        """Compute the terms of the objective, by two matrix products."""
        value, likelihood = self.value(x), x.new_zeros(())
        for mean, variance, m, s in column_blocks(*value, *self.data):
            likelihood += 0.5 * (variance.log() + (m - mean).square_().add_(s).div_(variance)).sum()
        return ObjectiveTerms(x, pairwise_kld(*value), float(likelihood))

    def forces(self, terms: ObjectiveTerms) -> Iterate:
        """Compute gradient, step and residual, by at most four matrix products per block of dimensions."""
        x = terms.x
        weights = kernel(terms.kld, self.kld_weight, self.alpha, self.pi).to(self.dtype)
        gradient, step = x.new_empty(2, *x.shape, dtype=self.dtype)
        value = self.value(x)

        norms = {part: x.new_zeros(3) for part in self.learn}  # squared norms of attraction, repulsion, gradient
        class_sums = x.new_zeros(3, len(x[0]), 1)  # scatter, shrink and grow summed over dimensions, if isotropic
        for block in column_blocks(*value, *self.data, x, gradient, step):
            self._fill_block(block, weights, norms, class_sums)
        if self.isotropic and "variance" in self.learn:
            scatter, shrink, grow = (total.div_(x.shape[2]).expand_as(x[0]) for total in class_sums)
            norms["variance"] += self._fill_variance(
                value.variance, scatter, shrink, grow, weights, x[-1], gradient[-1], step[-1]
            )

        residuals = [_residual(*squared.sqrt(), size=x[0].numel()) for squared in norms.values()]
        return Iterate(terms, gradient, step, float(torch.stack(residuals).max()))  # unlike Python's max, keeps NaN

    def _fill_block(
        self, block: tuple[Tensor, ...], weights: Tensor, norms: dict[str, Tensor], class_sums: Tensor
    ) -> None:
        """Fill gradient and step for a block of dimensions and add to ``norms`` and ``class_sums``."""
        mean, variance, m, s, x, gradient, step = block
        pull = mean - m
        scatter, pull = pull.square().add_(s).to(self.dtype), pull.to(self.dtype)
        mean, variance = (mean - mean.mean(0)).to(self.dtype), variance.to(self.dtype)
        push, shrink, grow = repulsion(mean, variance, weights, self.learn)

        if push is not None:
            norms["mean"] += _fill_mean(pull, variance, push, gradient[0], step[0])
            if self.exact and grow is not None:
                # with the repulsion, the curvature is (1 - grow / variance) times that of the data term
                step[0].div_((1 - grow / variance).clamp_(min=_MIN_CURVATURE))
        if shrink is not None and grow is not None:
            sides = scatter, shrink.add_(variance), grow.add_(scatter)  # the last two: Σ A⁺ Σ and B⁺
            if self.isotropic:
                class_sums += torch.stack(sides).sum(2, keepdim=True)
            else:
                norms["variance"] += self._fill_variance(variance, *sides, weights, x[-1], gradient[-1], step[-1])

    def free(self, current: Iterate) -> Tensor:
        """Return a mask of the coordinates that are not held at a bound, with the shape of the state."""
        free = torch.ones_like(current.gradient, dtype=torch.bool)
        if "variance" in self.learn:
            x, (low, high) = current.terms.x[-1], self.log_bounds
            # inside the bounds a gradient may be 0 by rounding, so the gradient alone does not decide
            free[-1] = (current.gradient[-1] != 0) | ((x > low) & (x < high))
        return free

    def metric(self, current: Iterate) -> Tensor:
        """Return the positive diagonal, float32, by which the negative gradient is multiplied to give the step."""
        ratio = torch.div(current.step, current.gradient).neg_()
        return ratio.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(min=0.0).float()

    def merit(self, terms: ObjectiveTerms, reference: ObjectiveTerms) -> float:
        r"""Compute the function that a step from ``reference`` must decrease.

        If π is the pair's own divergence, the gradient is that of
        :math:`\mathrm{NLL} - \lambda' c \sum \log \mathrm{KLD}` with :math:`c = e^{-1/\alpha}/\alpha`. If π is the
        mean divergence, it is that of the objective with π evaluated at ``reference``.

        Args:
            terms: objective terms of the state to evaluate.
            reference: objective terms of the state from which the step starts.
        """
        kld = terms.kld.clamp(min=torch.finfo(terms.kld.dtype).tiny)
        if self.pi == "pair":
            penalty = -math.exp(-1 / self.alpha) / self.alpha * kld.log()
        else:
            penalty = torch.exp(-kld / (self.alpha * pair_scale(reference.kld, "mean")))
        return terms.likelihood + self.kld_weight * float(penalty.fill_diagonal_(0.0).sum())

    def _fill_variance(
        self,
        variance: Tensor,
        scatter: Tensor,
        shrink: Tensor,
        grow: Tensor,
        weights: Tensor,
        log_variance: Tensor,
        gradient: Tensor,
        step: Tensor,
    ) -> Tensor:
        """Fill gradient and step of the log-variances from both sides of Σ A⁺ Σ = B⁺.

        Returns:
            Squared norms of attraction, repulsion and gradient, ``(3,)``.
        """
        low, high = self.log_bounds
        force, attraction = (shrink - grow).div_(variance), (variance - scatter).div_(variance)
        norms = [attraction.square().sum(), attraction.sub_(force).square_().sum()]

        held = ((log_variance <= low) & (force > 0)) | ((log_variance >= high) & (force < 0))
        force.masked_fill_(held, 0.0)
        gradient.copy_(force).mul_(0.5)
        if self.exact:
            change = _minimiser_step(variance, scatter, shrink, grow, weights)
        else:
            change = (grow / shrink).log_().mul_(0.5)  # Eq. (6): Σ √(B / Σ A Σ)
        step.copy_(change.masked_fill_(held, 0.0))
        return torch.stack([*norms, force.square_().sum()])


def _fill_mean(pull: Tensor, variance: Tensor, push: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
    """Fill gradient and step of the means.

    Returns:
        Squared norms of attraction, repulsion and gradient, ``(3,)``, with means in standard deviations.
    """
    change = push - pull  # Eq. (5): μ ← m + push
    step.copy_(change)
    gradient.copy_(change.div_(variance)).neg_()
    parts = (pull.square_().div_(variance), push.square_().div_(variance), change.square_().mul_(variance))
    return torch.stack([part.sum() for part in parts])


def _minimiser_step(variance: Tensor, scatter: Tensor, shrink: Tensor, grow: Tensor, weights: Tensor) -> Tensor:
    r"""Compute the change of each log-variance that minimizes the objective along this coordinate.

    Let :math:`r = v' / v` be the ratio of the new to the current variance. The gradient along the coordinate is
    :math:`\tfrac12 (a - p r - c / r)`, where :math:`p` comes from the pairs whose divergence grows with the variance
    and :math:`c` from the data and the other pairs. The minimum is the smaller root :math:`r` of the gradient. If
    there is no real root, or if the current variance lies beyond the larger root, the objective decreases without
    bound as the variance grows; the largest step is taken.
    """
    row_sum, column_sum = weights.sum(1)[:, None], weights.sum(0)[:, None]
    a = 1 + row_sum - column_sum
    p = (grow - scatter).div_(variance).sub_(column_sum)
    c = (scatter - shrink).div_(variance).add_(1 + row_sum)

    discriminant = a.square() - 4 * p * c
    denominator = discriminant.clamp(min=0.0).sqrt_().add_(a)  # the roots are 2c / denominator, denominator / 2p
    ratio = (2 * c).div_(denominator).clamp_(1 / _MAX_VARIANCE_STEP, _MAX_VARIANCE_STEP)
    unbounded = (discriminant < 0) | (denominator <= 2 * p)
    return ratio.masked_fill_(unbounded, _MAX_VARIANCE_STEP).log_()


def _residual(attraction: Tensor, repulsion: Tensor, total: Tensor, size: int) -> Tensor:
    return total / (torch.maximum(attraction, repulsion) + _EPS * math.sqrt(size))
