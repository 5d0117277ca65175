"""Class Gaussians by fixed-point iteration (NFPI: Enescu & Sahbi, BMVC 2024), and what it starts from."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowaug.latents.estimators.divergence import pairwise_kld
from flowaug.latents.estimators.problem import Balance
from flowaug.latents.estimators.solvers import accelerate, iterate
from flowaug.latents.gaussians import GaussianParameters
from flowaug.latents.moments import ClassMoments

__all__ = [
    "PARTS",
    "VARIANCE_BOUNDS",
    "FixedPoint",
    "checked_parts",
    "data_initialisation",
    "fpi",
    "make_balance",
    "unit_gaussian",
]

VARIANCE_BOUNDS = (0.25, 1.25)  # GLEM's c and a + c
PARTS = ("mean", "variance")


class FixedPoint(NamedTuple):
    """What an iterative estimator found and why it stopped.

    Attributes:
        value: means and variances, `(K, D)` float64.
        steps: states tried after the first, refused ones included.
        residual: imbalance at `value`: norm of the objective's gradient, what a bound holds left out, over the
            norm of the larger of its two opposing parts, the likelihood's and the repulsion's. Means count in
            standard deviations, variances by their logarithm; the worse of the two.
        converged: whether `residual` came down to the tolerance.
    """

    value: GaussianParameters
    steps: int
    residual: float
    converged: bool


def data_initialisation(moments: ClassMoments) -> GaussianParameters:
    """Means and variances of the latents themselves: the likelihood's optimum, baseline 1 of the paper (λ = 0).

    Raises:
        ValueError: naming the class that is absent, has one sample or a variance of 0.
    """
    mean, variance = _finite_statistics(moments)
    way_out = "use unit variances: learn=('mean',), variance='unit'"
    single = torch.nonzero(moments.count < 2).flatten().tolist()
    if single:
        raise ValueError(f"class {single[0]} has one sample: no variance to estimate; add samples or {way_out}")
    flat = torch.nonzero(~(variance > 0).all(1)).flatten().tolist()
    if flat:
        dims = int((variance[flat[0]] <= 0).sum())
        raise ValueError(f"class {flat[0]} has zero variance in {dims} of {moments.dim} dimensions; {way_out}")
    return GaussianParameters(mean, variance)


def unit_gaussian(num_classes: int, dim: int, device: torch.device | str | None = None) -> GaussianParameters:
    """N(0, I) for every class: the monomodal flow."""
    shape = (num_classes, dim)
    return GaussianParameters(torch.zeros(shape, device=device).double(), torch.ones(shape, device=device).double())


def fpi(
    moments: ClassMoments,
    *,
    kld_weight: float,
    alpha: float = 10.0,
    pi: str = "pair",
    learn: tuple[str, ...] | str = PARTS,
    variance: str | Tensor = "data",
    variance_bounds: tuple[float, float] | None = VARIANCE_BOUNDS,
    isotropic: bool = False,
    damp: float = 0.5,
    memory: int = 4,
    tol: float = 1e-4,
    max_steps: int = 500,
) -> FixedPoint:
    r"""Solves for the Gaussians at which likelihood and repulsion balance, Eq. (5) and (6), from moments alone.

    .. math:: L(\Psi) = \sum_y \overline{\mathrm{NLL}}_y
              + \lambda' \sum_{y \ne y'} \exp(-\mathrm{KLD}(y\|y') / (\pi\alpha)), \quad \pi \text{ held constant}

    `O(K²D)` time per step by matrix products, `O(K² + memory · KD)` memory. With π the pair's divergence the
    objective is unbounded below in the variances once :math:`\lambda' c (K-1) > 1/2`,
    :math:`c = e^{-1/\alpha}/\alpha`: hence the bounds.

    Args:
        moments: class statistics of the latents, `(K, D)`.
        kld_weight: :math:`\lambda'`, the weight of one ordered pair. It *is* the paper's λ/(K(K−1)), and the
            10…500 of its Table 2: do not divide again.
        alpha: the scale α of the exponential, 0.1…10 in the paper.
        pi: `"pair"`, the pair's own divergence (Eq. 9), or `"mean"`, the mean of all of them (Eq. 10).
        learn: `"mean"`, `"variance"` or both; the rest stays at its initial value.
        variance: initial variances: `"data"`, `"unit"` (the paper's means-only setting #2) or `(K, D)`.
        variance_bounds: bounds of *learned* variances; None for none.
        isotropic: one variance per class, the mean over its dimensions.
        damp: share of the update taken: the plain iteration's, and the first step of the accelerated one.
        memory: difference pairs kept by the accelerated solver; 0 for the plain damped iteration, which may
            cycle.
        tol: residual to reach, see `FixedPoint`.
        max_steps: states tried at most.

    Returns:
        Value, steps, residual and whether it converged.

    Raises:
        ValueError: naming the class that is absent, has one sample or zero variance, or the argument that is
            out of range.

    Example:
        >>> moments = ClassMoments.of(torch.tensor([[-1.0], [1.0], [2.0], [4.0]]), torch.tensor([0, 0, 1, 1]), 2)
        >>> result = fpi(moments, kld_weight=10.0, learn="mean", variance="unit")
        >>> result.converged, bool(result.value.mean.diff(dim=0) > 3)
        (True, True)
    """
    learn = checked_parts(learn)
    _check_iteration(damp, memory, tol, max_steps)
    balance, *start = make_balance(
        moments,
        kld_weight=kld_weight,
        alpha=alpha,
        pi=pi,
        learn=learn,
        variance=variance,
        variance_bounds=variance_bounds,
        isotropic=isotropic,
        exact=memory > 0,
        dtype=torch.float32 if memory and tol >= 1e-5 else torch.float64,
    )
    options = {"damp": damp, "tol": tol, "max_steps": max_steps}
    if memory:  # the solver gets the only reference to the initial state: its memory is needed
        point, steps = accelerate(balance, start.pop(), memory=memory, **options)
    else:
        point, steps = iterate(balance, start.pop(), **options)
    return FixedPoint(balance.value(point.height.x), steps, point.residual, point.residual <= tol)


def make_balance(
    moments: ClassMoments,
    *,
    kld_weight: float,
    alpha: float,
    pi: str,
    learn: tuple[str, ...],
    variance: str | Tensor,
    variance_bounds: tuple[float, float] | None,
    isotropic: bool = False,
    exact: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Balance, Tensor]:
    """Checks the arguments of an estimator (see `fpi`), sets up its equations and its initial state."""
    _check_objective(kld_weight, alpha)
    bounds = _checked_bounds(variance_bounds)
    learned = "variance" in learn
    data = data_initialisation(moments) if learned else _finite_statistics(moments)
    start = GaussianParameters(data.mean, _initial_variance(moments, variance, isotropic))
    if pi == "pair" and kld_weight > 0:
        _check_distinct(start)
    balance = Balance(
        data,
        None if len(learn) == 2 else start.mean if learned else start.variance,
        kld_weight=kld_weight,
        alpha=alpha,
        pi=pi,
        learn=learn,
        bounds=bounds,
        isotropic=isotropic,
        exact=exact,
        dtype=dtype,
    )
    blocks = {"mean": start.mean, "variance": start.variance.log()}
    return balance, balance.project(torch.stack([blocks[name] for name in learn]))


def _finite_statistics(moments: ClassMoments) -> GaussianParameters:
    mean, variance = moments.mean, moments.variance
    broken = torch.nonzero(~(torch.isfinite(mean) & torch.isfinite(variance)).all(1)).flatten().tolist()
    if broken:
        raise ValueError(f"the moments of class {broken[0]} are not finite: the flow has diverged; train it again")
    return GaussianParameters(mean, variance)


def _initial_variance(moments: ClassMoments, variance: str | Tensor, isotropic: bool) -> Tensor:
    if isinstance(variance, Tensor):
        initial = variance.to(moments.mean, copy=True)
        if initial.shape != moments.mean.shape or not bool((torch.isfinite(initial) & (initial > 0)).all()):
            shape = tuple(moments.mean.shape)
            raise ValueError(f"initial variances must be {shape}, finite and positive; got {tuple(initial.shape)}")
    elif variance == "data":
        initial = data_initialisation(moments).variance
    elif variance == "unit":
        initial = torch.ones_like(moments.mean)
    else:
        raise ValueError(f"variance must be 'data', 'unit' or a (K, D) tensor, got {variance!r}")
    return initial.mean(1, keepdim=True).expand_as(initial).contiguous() if isotropic else initial


def _check_distinct(start: GaussianParameters) -> None:
    kld = pairwise_kld(*start).fill_diagonal_(math.inf)
    pair = int(kld.argmin())
    first, second = sorted(divmod(pair, len(kld)))
    if float(kld.flatten()[pair]) < 1e-9:
        raise ValueError(
            f"classes {first} and {second} have the same Gaussian: their repulsion has no direction; merge them, "
            "or use pi='mean'"
        )


def checked_parts(learn: tuple[str, ...] | str) -> tuple[str, ...]:
    """The parts to learn, in order; a single name will do."""
    chosen = (learn,) if isinstance(learn, str) else tuple(learn)
    if not chosen or set(chosen) - set(PARTS):
        raise ValueError(f"learn must hold 'mean', 'variance' or both, got {learn!r}")
    return tuple(part for part in PARTS if part in chosen)


def _checked_bounds(bounds: tuple[float, float] | None) -> tuple[float, float]:
    low, high = (0.0, math.inf) if bounds is None else bounds
    if not 0 <= low < high:
        raise ValueError(f"variance_bounds must satisfy 0 <= low < high, got {bounds}")
    return low, high


def _check_objective(kld_weight: float, alpha: float) -> None:
    if not 0 <= kld_weight < math.inf:
        raise ValueError(f"kld_weight (λ') must be finite and >= 0, got {kld_weight}; 0 is the plain likelihood")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be finite and > 0, got {alpha}; the paper uses 0.1 to 10")


def _check_iteration(damp: float, memory: int, tol: float, max_steps: int) -> None:
    if not 0 < damp <= 1:
        raise ValueError(f"damp must be in (0, 1], got {damp}")
    if memory < 0 or max_steps < 0 or not tol >= 0:
        raise ValueError(f"memory, max_steps and tol must be >= 0, got {memory}, {max_steps} and {tol}")
