"""The balance of forces that Eq. (5) and (6) ask for: gradient, fixed-point step and residual at a point."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowaug.latents.estimators.divergence import column_blocks, kernel, pair_scale, pairwise_kld, repulsion
from flowaug.latents.gaussians import GaussianParameters

__all__ = ["Balance", "Height", "Point"]

_NOTHING = 1e-9  # a displacement of this many standard deviations counts as none
_FLATTEST = 0.05  # share of the data term's curvature below which a mean's is not trusted
_FARTHEST = 2.0  # factor by which a variance changes at most on the way to its minimum


class Height(NamedTuple):
    """What decides whether a step is taken: the state and the two terms of the objective.

    Attributes:
        x: the state, `(blocks, K, D)` float64: learned means, then learned log-variances.
        kld: pairwise divergences, `(K, K)`.
        likelihood: the data term.
    """

    x: Tensor
    kld: Tensor
    likelihood: float


class Point(NamedTuple):
    """A state and the forces there.

    Attributes:
        height: the state and the terms of the objective.
        gradient: of the objective with respect to the state; 0 where a bound holds a variance.
        step: what one undamped sweep of Eq. (5) and (6) would add to the state, or, of a `Balance` that is exact,
            the way to the minimum along each coordinate.
        residual: norm of the gradient over that of the larger of its two opposing parts, see `FixedPoint`.
    """

    height: Height
    gradient: Tensor
    step: Tensor
    residual: float


class Balance:
    """Evaluates Eq. (5) and (6) for fixed class statistics.

    Args:
        data: class statistics `m_y`, `S_y` of the latents, `(K, D)` float64.
        fixed: what is not learned: the means, the variances or, when both are learned, None.
        kld_weight: λ', already divided by K(K−1).
        alpha: the scale α.
        pi: `"pair"` or `"mean"`.
        learn: `"mean"`, `"variance"` or both.
        bounds: lower and upper bound of learned variances.
        isotropic: one variance per class.
        exact: let each step lead to the minimum of the objective along its coordinate, the others and the weights
            of the pairs held, where variances are learned; else it is the published sweep.
        dtype: of the forces. The state, the divergences and the data term are float64.
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
        """Clamps the log-variances of a state to the bounds, in place."""
        if "variance" in self.learn:
            x[-1].clamp_(*self.log_bounds)
        return x

    def value(self, x: Tensor) -> GaussianParameters:
        """Means and variances of a state (the means are a view of it)."""
        variance = x[-1].exp().clamp_(*self.bounds) if "variance" in self.learn else self.fixed
        return GaussianParameters(x[0] if "mean" in self.learn else self.fixed, variance)

    def evaluate(self, x: Tensor) -> Point:
        """Everything about one state."""
        return self.forces(self.measure(x))

    def measure(self, x: Tensor) -> Height:
        """The terms of the objective, by two matrix products."""
        value, likelihood = self.value(x), x.new_zeros(())
        for mean, variance, m, s in column_blocks(*value, *self.data):
            likelihood += 0.5 * (variance.log() + (m - mean).square_().add_(s).div_(variance)).sum()
        return Height(x, pairwise_kld(*value), float(likelihood))

    def forces(self, height: Height) -> Point:
        """Gradient, step and residual, by at most four matrix products; a block of dimensions at a time."""
        x, weights = height.x, kernel(height.kld, self.kld_weight, self.alpha, self.pi).to(self.dtype)
        gradient, step = x.new_empty(2, *x.shape, dtype=self.dtype)
        value = self.value(x)
        sums = {part: x.new_zeros(3) for part in self.learn}  # squared attraction, repulsion, gradient
        sides = x.new_zeros(3, len(x[0]), 1)
        for block in column_blocks(*value, *self.data, x, gradient, step):
            self._fill(block, weights, sums, sides)
        if self.isotropic and "variance" in self.learn:
            wide = (side.div_(x.shape[2]).expand_as(x[0]) for side in sides)
            sums["variance"] += self._balance_variance(value.variance, *wide, weights, x[-1], gradient[-1], step[-1])
        residuals = [_residual(*part.sqrt(), size=x[0].numel()) for part in sums.values()]
        return Point(height, gradient, step, float(torch.stack(residuals).max()))  # NaN stays NaN

    def _fill(self, block: tuple[Tensor, ...], weights: Tensor, sums: dict[str, Tensor], sides: Tensor) -> None:
        mean, variance, m, s, x, gradient, step = block
        pull = mean - m
        scatter, pull = pull.square().add_(s).to(self.dtype), pull.to(self.dtype)
        mean, variance = (mean - mean.mean(0)).to(self.dtype), variance.to(self.dtype)
        push, shrink, grow = repulsion(mean, variance, weights, self.learn)
        if "mean" in self.learn:
            sums["mean"] += _balance_mean(pull, variance, push, gradient[0], step[0])
            if self.exact and grow is not None:  # the pairs take grow / v of the data term's curvature away
                step[0].div_((1 - grow / variance).clamp_(min=_FLATTEST))
        if "variance" in self.learn:
            terms = scatter, shrink.add_(variance), grow.add_(scatter)  # then Σ A⁺ Σ and B⁺
            if self.isotropic:
                sides += torch.stack(terms).sum(2, keepdim=True)
            else:
                sums["variance"] += self._balance_variance(variance, *terms, weights, x[-1], gradient[-1], step[-1])

    def free(self, point: Point) -> Tensor:
        """Which coordinates of a state no bound holds; a gradient inside the bounds may round to 0."""
        free = torch.ones_like(point.gradient, dtype=torch.bool)
        if "variance" in self.learn:
            x, (low, high) = point.height.x[-1], self.log_bounds
            free[-1] = (point.gradient[-1] != 0) | ((x > low) & (x < high))
        return free

    def metric(self, point: Point) -> Tensor:
        """The positive diagonal, float32, that turns minus the gradient into the step."""
        ratio = torch.div(point.step, point.gradient).neg_()
        return ratio.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(min=0.0).float()

    def merit(self, height: Height, reference: Height) -> float:
        r"""What a step away from `reference` must decrease.

        With π the pair's own divergence the gradient is that of
        :math:`\mathrm{NLL} - \lambda' c \sum \log \mathrm{KLD}`, :math:`c = e^{-1/\alpha}/\alpha`; with the mean
        it is that of the objective with π as at `reference`.
        """
        kld = height.kld.clamp(min=torch.finfo(height.kld.dtype).tiny)
        if self.pi == "pair":
            terms = -math.exp(-1 / self.alpha) / self.alpha * kld.log()
        else:
            terms = torch.exp(-kld / (self.alpha * pair_scale(reference.kld, "mean")))
        return height.likelihood + self.kld_weight * float(terms.fill_diagonal_(0.0).sum())

    def _balance_variance(
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
        """Fills gradient and step of the log-variances from both sides of Σ A⁺ Σ = B⁺."""
        low, high = self.log_bounds
        force, attraction = (shrink - grow).div_(variance), (variance - scatter).div_(variance)
        sums = [attraction.square().sum(), attraction.sub_(force).square_().sum()]
        held = ((log_variance <= low) & (force > 0)) | ((log_variance >= high) & (force < 0))
        force.masked_fill_(held, 0.0)
        gradient.copy_(force).mul_(0.5)
        if self.exact:
            change = _way_to_minimum(variance, scatter, shrink, grow, weights)
        else:
            change = (grow / shrink).log_().mul_(0.5)  # Eq. (6): Σ √(B / Σ A Σ)
        step.copy_(change.masked_fill_(held, 0.0))
        return torch.stack([*sums, force.square_().sum()])


def _balance_mean(pull: Tensor, variance: Tensor, push: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
    """Fills gradient and step of the means; sums are in standard deviations."""
    change = push - pull  # Eq. (5): μ ← m + push
    step.copy_(change)
    gradient.copy_(change.div_(variance)).neg_()
    parts = (pull.square_().div_(variance), push.square_().div_(variance), change.square_().mul_(variance))
    return torch.stack([part.sum() for part in parts])


def _way_to_minimum(variance: Tensor, scatter: Tensor, shrink: Tensor, grow: Tensor, weights: Tensor) -> Tensor:
    r"""Change of each log-variance to the minimum of the objective along it.

    With :math:`r = v' / v` the gradient is :math:`\tfrac12 (a - p r - c / r)`, :math:`p` from the pairs whose
    divergence grows with the variance and :math:`c` from data and the other pairs. The smaller root is the minimum.
    Without one, or beyond the larger root, the objective falls without end.
    """
    given, taken = weights.sum(1)[:, None], weights.sum(0)[:, None]
    a = 1 + given - taken
    p = (grow - scatter).div_(variance).sub_(taken)
    c = (scatter - shrink).div_(variance).add_(1 + given)
    square = a.square() - 4 * p * c
    sides = square.clamp(min=0.0).sqrt_().add_(a)  # twice the distance of the middle from either root
    ratio = (2 * c).div_(sides).clamp_(1 / _FARTHEST, _FARTHEST)
    return ratio.masked_fill_((square < 0) | (sides <= 2 * p), _FARTHEST).log_()


def _residual(attraction: Tensor, repulsion: Tensor, total: Tensor, size: int) -> Tensor:
    return total / (torch.maximum(attraction, repulsion) + _NOTHING * math.sqrt(size))
