"""Class Gaussians by gradient descent: baseline 2 of Enescu & Sahbi (BMVC 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowaug.latents.estimators.fpi import PARTS, VARIANCE_BOUNDS, FixedPoint, checked_parts, make_balance
from flowaug.latents.moments import ClassMoments

__all__ = ["LR_POLICIES", "gradient_descent"]

LR_POLICIES = {"sublinear": 0.5, "linear": 1.0, "superlinear": 2.0}


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
    r"""Minimises the objective of `fpi` by plain gradient descent.

    Variances are :math:`v = l + (h - l)\,\sigma(s)` between the bounds `l` and `h`, and it is `s` that descends.
    The learning rate after a share `t` of the steps is :math:`lr\,(1-t)^p`, with `p` = 1/2 (sublinear),
    1 (linear) or 2 (superlinear).

    Args:
        moments: class statistics of the latents, `(K, D)`.
        kld_weight: :math:`\lambda'`, see `fpi`.
        alpha: see `fpi`.
        pi: see `fpi`.
        learn: see `fpi`.
        variance: initial variances, see `fpi`.
        variance_bounds: the range of the sigmoid.
        policy: `"sublinear"`, `"linear"` or `"superlinear"` decay of the learning rate.
        lr: initial learning rate.
        tol: residual at which to stop, see `FixedPoint`.
        max_steps: steps, and the length of the learning-rate policy.

    Returns:
        Value, steps, residual and whether it converged.

    Raises:
        ValueError: as `fpi`; no finite bounds; an unknown policy.
    """
    power, (low, high) = _power(policy), _finite(variance_bounds)
    balance, x = make_balance(
        moments,
        kld_weight=kld_weight,
        alpha=alpha,
        pi=pi,
        learn=checked_parts(learn),
        variance=variance,
        variance_bounds=(low, high),
    )
    margin = 1e-3 * (high - low)  # the sigmoid never gets to its bounds
    if "variance" in balance.learn:
        x[-1].clamp_(math.log(low + margin), math.log(high - margin))
    point = balance.evaluate(x)
    for steps in range(max_steps):
        if point.residual <= tol:
            return FixedPoint(balance.value(point.height.x), steps, point.residual, True)
        rate = lr * (1 - steps / max_steps) ** power
        following = balance.evaluate(_descend(point.height.x, point.gradient, rate, balance.learn, low, high))
        if not math.isfinite(following.residual):
            return FixedPoint(balance.value(point.height.x), steps, point.residual, False)
        point = following
    return FixedPoint(balance.value(point.height.x), max_steps, point.residual, point.residual <= tol)


def _descend(x: Tensor, gradient: Tensor, rate: float, learn: tuple[str, ...], low: float, high: float) -> Tensor:
    """One step: of the means as they are, of the variances through the sigmoid."""
    x = x.clone()
    if "mean" in learn:
        x[0] -= rate * gradient[0]
    if "variance" in learn:
        share = (x[-1].exp() - low) / (high - low)  # σ(s)
        slope = (high - low) * share * (1 - share)  # dv/ds
        s = torch.logit(share) - rate * gradient[-1] * slope / x[-1].exp()
        x[-1] = (low + (high - low) * s.clamp(-30, 30).sigmoid()).log()
    return x


def _power(policy: str) -> float:
    if policy not in LR_POLICIES:
        raise ValueError(f"policy must be one of {', '.join(LR_POLICIES)}, got {policy!r}")
    return LR_POLICIES[policy]


def _finite(bounds: tuple[float, float] | None) -> tuple[float, float]:
    if bounds is None or not 0 < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"the sigmoid needs finite variance_bounds 0 < low < high, got {bounds}")
    return bounds
