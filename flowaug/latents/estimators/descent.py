"""Class Gaussians by gradient descent, the second baseline of Enescu & Sahbi (BMVC 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowaug.latents.estimators.fpi import PARTS, VARIANCE_BOUNDS, FixedPoint, checked_parts, make_problem
from flowaug.latents.moments import ClassMoments

LR_POLICIES = {"sublinear": 0.5, "linear": 1.0, "superlinear": 2.0}  # exponent of the learning rate decay


def gradient_descent(
    moments: ClassMoments,
    *,
    kld_weight: float,
    alpha: float = 10.0,
    pi: str = "pair",
    learn: tuple[str, ...] | str = PARTS,
    variance: str | Tensor = "data",
    variance_bounds: tuple[float, float] = VARIANCE_BOUNDS,
    policy: str = "linear",
    lr: float = 0.1,
    tol: float = 1e-4,
    max_steps: int = 200,
) -> FixedPoint:
    r"""Minimize the objective of ``fpi`` by plain gradient descent.

    Variances are parametrized as :math:`v = l + (h - l)\,\sigma(s)` with lower bound ``l`` and upper bound ``h``;
    gradient descent updates ``s``. After a fraction ``t`` of the steps the learning rate is
    :math:`lr\,(1-t)^p`, with ``p`` = 1/2 (sublinear), 1 (linear) or 2 (superlinear).

    Args:
        moments: class moments of the latents, with K classes and D dimensions.
        kld_weight: weight :math:`\lambda'` of the repulsion, see ``fpi``.
        alpha: scale α of the exponential, see ``fpi``.
        pi: ``"pair"`` or ``"mean"``, see ``fpi``.
        learn: ``"mean"``, ``"variance"`` or both, see ``fpi``.
        variance: initial variances, see ``fpi``.
        variance_bounds: lower and upper bound of the variances, the range of the sigmoid.
        policy: decay of the learning rate, ``"sublinear"``, ``"linear"`` or ``"superlinear"``.
        lr: initial learning rate.
        tol: residual at which to stop, see ``FixedPoint``.
        max_steps: maximum number of steps, and the length of the learning rate schedule.

    Returns:
        Parameters, number of steps, residual and whether the iteration converged.

    Raises:
        ValueError: see ``fpi``; also if ``variance_bounds`` are not finite or ``policy`` is unknown.
    """
    power = _decay_exponent(policy)
    low, high = _finite_bounds(variance_bounds)
    problem, x = make_problem(
        moments,
        kld_weight=kld_weight,
        alpha=alpha,
        pi=pi,
        learn=checked_parts(learn),
        variance=variance,
        variance_bounds=(low, high),
    )
    if "variance" in problem.learn:
        margin = 1e-3 * (high - low)  # the logit is infinite at the bounds
        x[-1].clamp_(math.log(low + margin), math.log(high - margin))

    current = problem.evaluate(x)
    for steps in range(max_steps):
        if current.residual <= tol:
            return FixedPoint(problem.value(current.terms.x), steps, current.residual, True)
        rate = lr * (1 - steps / max_steps) ** power
        updated = problem.evaluate(_descend(current.terms.x, current.gradient, rate, problem.learn, low, high))
        if not math.isfinite(updated.residual):
            return FixedPoint(problem.value(current.terms.x), steps, current.residual, False)
        current = updated
    return FixedPoint(problem.value(current.terms.x), max_steps, current.residual, current.residual <= tol)


def _descend(x: Tensor, gradient: Tensor, rate: float, learn: tuple[str, ...], low: float, high: float) -> Tensor:
    """Return the state after one step on the means and on the sigmoid parameters of the variances.

    Args:
        x: state, ``(blocks, K, D)``: means, then log-variances.
        gradient: gradient with respect to ``x``.
        rate: learning rate.
        learn: ``"mean"``, ``"variance"`` or both.
        low: lower bound of the variances.
        high: upper bound of the variances.
    """
    x = x.clone()
    if "mean" in learn:
        x[0] -= rate * gradient[0]
    if "variance" in learn:
        sigmoid = (x[-1].exp() - low) / (high - low)
        slope = (high - low) * sigmoid * (1 - sigmoid)  # dv/ds
        s = torch.logit(sigmoid) - rate * gradient[-1] * slope / x[-1].exp()
        x[-1] = (low + (high - low) * s.clamp(-30, 30).sigmoid()).log()
    return x


def _decay_exponent(policy: str) -> float:
    if policy not in LR_POLICIES:
        raise ValueError(f"policy must be one of {', '.join(LR_POLICIES)}, got {policy!r}")
    return LR_POLICIES[policy]


def _finite_bounds(bounds: tuple[float, float] | None) -> tuple[float, float]:
    if bounds is None or not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(
            f"gradient descent requires finite variance_bounds with 0 < low < high, got {bounds}; use the default "
            f"{VARIANCE_BOUNDS} or the estimator fpi"
        )
    return bounds
