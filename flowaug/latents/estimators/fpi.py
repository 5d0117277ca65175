"""Class Gaussians by fixed-point iteration (NFPI: Enescu & Sahbi, BMVC 2024), and their initialization."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowaug.latents.estimators.divergence import pairwise_kld
from flowaug.latents.estimators.problem import Problem
from flowaug.latents.estimators.solvers import accelerate, iterate
from flowaug.latents.gaussians import GaussianParameters
from flowaug.latents.moments import ClassMoments

VARIANCE_BOUNDS = (0.25, 1.25)  # c and a + c in GLEM
PARTS = ("mean", "variance")


class FixedPoint(NamedTuple):
    """Result of an iterative estimator.

    Attributes:
        value: means and variances, ``(K, D)`` float64.
        steps: number of states evaluated after the initial one, including rejected steps.
        residual: relative norm of the gradient at ``value``. The gradient is the difference of two opposing parts,
            the likelihood and the repulsion; its norm is divided by that of the larger part. Means are measured in
            standard deviations and variances by their logarithm, and the larger of the two residuals is reported.
            Gradients that point beyond an active bound are excluded.
        converged: whether ``residual`` reached the tolerance.
    """

    value: GaussianParameters
    steps: int
    residual: float
    converged: bool


def data_initialisation(moments: ClassMoments) -> GaussianParameters:
    """Return the means and variances of the latents, which maximize the likelihood.

    This is the first baseline of Enescu & Sahbi (BMVC 2024), with λ = 0.

    Args:
        moments: class moments of the latents.

    Returns:
        Means and variances, ``(K, D)`` float64 each.

    Raises:
        ValueError: if a class has fewer than two samples or zero variance in a dimension; the message names it.
    """
    mean, variance = _finite_statistics(moments)
    hint = "use unit variances: learn=('mean',), variance='unit'"
    single = torch.nonzero(moments.count < 2).flatten().tolist()
    if single:
        raise ValueError(
            f"class {single[0]} has only one sample, so its variance cannot be estimated; add samples or {hint}"
        )
    constant = torch.nonzero(~(variance > 0).all(1)).flatten().tolist()
    if constant:
        dims = int((variance[constant[0]] <= 0).sum())
        raise ValueError(f"class {constant[0]} has zero variance in {dims} of {moments.dim} dimensions; {hint}")
    return GaussianParameters(mean, variance)


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
    r"""Compute the class Gaussians at which likelihood and repulsion are in balance (Eq. 5 and 6), from moments alone.

    The solution is a stationary point of

    .. math:: L(\Psi) = \sum_y \overline{\mathrm{NLL}}_y
              + \lambda' \sum_{y \ne y'} \exp(-\mathrm{KLD}(y\|y') / (\pi\alpha)), \quad \pi \text{ held constant}

    A step takes ``O(K²D)`` time (matrix products) and ``O(K² + memory · KD)`` memory.

    If π is the pair's own divergence, the objective has no lower bound in the variances for
    :math:`\lambda' c (K-1) > 1/2` with :math:`c = e^{-1/\alpha}/\alpha`. The variances are therefore bounded.

    Args:
        moments: class moments of the latents, with K classes and D dimensions.
        kld_weight: weight :math:`\lambda'` of the repulsion of one ordered pair. It equals λ/(K(K−1)) in the paper,
            and the values 10 to 500 in Table 2 of the paper: do not divide it by K(K−1) again.
        alpha: scale α of the exponential; 0.1 to 10 in the paper.
        pi: normalizer of the divergences: ``"pair"``, the pair's own divergence (Eq. 9), or ``"mean"``, the mean over
            all pairs (Eq. 10).
        learn: ``"mean"``, ``"variance"`` or both. Other parameters keep their initial value.
        variance: initial variances: ``"data"``, ``"unit"`` (setting 2 of the paper, which learns the means only) or a
            tensor ``(K, D)``.
        variance_bounds: lower and upper bound of *learned* variances; None for no bounds.
        isotropic: use one variance per class, the mean over its dimensions.
        damp: fraction of each update that is applied. The accelerated solver uses it only for the first step and
            after a restart.
        memory: number of past steps used by the accelerated solver. 0 selects the plain damped iteration of the
            paper, which may cycle.
        tol: residual at which to stop, see ``FixedPoint``.
        max_steps: maximum number of states to evaluate.

    Returns:
        Parameters, number of steps, residual and whether the iteration converged.

    Raises:
        ValueError: if a class has fewer than two samples or zero variance, if two classes are identical or if an
            argument is out of range. The message names the class or the argument.

    Example:
        >>> moments = ClassMoments.of(torch.tensor([[-1.0], [1.0], [2.0], [4.0]]), torch.tensor([0, 0, 1, 1]), 2)
        >>> result = fpi(moments, kld_weight=10.0, learn="mean", variance="unit")
        >>> result.converged, bool(result.value.mean.diff(dim=0) > 3)
        (True, True)
    """
    learn = checked_parts(learn)
    _check_iteration(damp, memory, tol, max_steps)
    problem, *start = make_problem(
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
    # ``pop`` leaves the solver the only reference to the initial state, so that it can free its memory
    if memory:
        last, steps = accelerate(problem, start.pop(), memory=memory, **options)
    else:
        last, steps = iterate(problem, start.pop(), **options)
    return FixedPoint(problem.value(last.terms.x), steps, last.residual, last.residual <= tol)


def make_problem(
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
) -> tuple[Problem, Tensor]:
    """Check the arguments of an estimator and create its problem and initial state.

    Args:
        moments: class moments of the latents.
        kld_weight: see ``fpi``.
        alpha: see ``fpi``.
        pi: see ``fpi``.
        learn: see ``fpi``.
        variance: see ``fpi``.
        variance_bounds: see ``fpi``.
        isotropic: see ``fpi``.
        exact: see ``Problem``.
        dtype: see ``Problem``.

    Returns:
        The problem and its initial state, ``(blocks, K, D)``.

    Raises:
        ValueError: see ``fpi``.
    """
    _check_objective(kld_weight, alpha)
    bounds = _checked_bounds(variance_bounds)

    learn_variance = "variance" in learn
    data = data_initialisation(moments) if learn_variance else _finite_statistics(moments)
    start = GaussianParameters(data.mean, _initial_variance(moments, variance, isotropic))
    if pi == "pair" and kld_weight > 0:
        _check_distinct(start)

    problem = Problem(
        data,
        None if len(learn) == 2 else start.mean if learn_variance else start.variance,
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
    return problem, problem.project(torch.stack([blocks[name] for name in learn]))


def _finite_statistics(moments: ClassMoments) -> GaussianParameters:
    mean, variance = moments.mean, moments.variance
    invalid = torch.nonzero(~(torch.isfinite(mean) & torch.isfinite(variance)).all(1)).flatten().tolist()
    if invalid:
        raise ValueError(
            f"the moments of class {invalid[0]} are not finite: the flow has diverged; train it again with a lower "
            "learning rate"
        )
    return GaussianParameters(mean, variance)


def _initial_variance(moments: ClassMoments, variance: str | Tensor, isotropic: bool) -> Tensor:
    if isinstance(variance, Tensor):
        initial = variance.to(moments.mean, copy=True)
        if initial.shape != moments.mean.shape or not bool((torch.isfinite(initial) & (initial > 0)).all()):
            expected, found = tuple(moments.mean.shape), tuple(initial.shape)
            raise ValueError(f"initial variances must be {expected}, finite and positive; got shape {found}")
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
            f"classes {first} and {second} have identical Gaussians, so their repulsion has no direction; merge the "
            "two classes or use pi='mean'"
        )


def checked_parts(learn: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return the parameters to learn as a tuple in the order of ``PARTS``.

    Args:
        learn: ``"mean"``, ``"variance"`` or a tuple of them.

    Raises:
        ValueError: if ``learn`` is empty or holds another name.
    """
    chosen = (learn,) if isinstance(learn, str) else tuple(learn)
    if not chosen or set(chosen) - set(PARTS):
        raise ValueError(f"learn must be 'mean', 'variance' or a tuple of both, got {learn!r}")
    return tuple(part for part in PARTS if part in chosen)


def _checked_bounds(bounds: tuple[float, float] | None) -> tuple[float, float]:
    low, high = (0.0, math.inf) if bounds is None else bounds
    if not 0 <= low < high:
        raise ValueError(f"variance_bounds must satisfy 0 <= low < high, got {bounds}")
    return low, high


def _check_objective(kld_weight: float, alpha: float) -> None:
    if not 0 <= kld_weight < math.inf:
        raise ValueError(f"kld_weight (λ') must be finite and >= 0, got {kld_weight}; use 0 for maximum likelihood")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be finite and > 0, got {alpha}; the paper uses 0.1 to 10")


def _check_iteration(damp: float, memory: int, tol: float, max_steps: int) -> None:
    if not 0 < damp <= 1:
        raise ValueError(f"damp must be in (0, 1], got {damp}")
    if memory < 0 or max_steps < 0 or not tol >= 0:
        raise ValueError(f"memory, max_steps and tol must be >= 0, got {memory}, {max_steps} and {tol}")
