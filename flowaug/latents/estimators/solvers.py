"""Solvers for the fixed-point problem: the damped iteration as published, and a quasi-Newton method."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowaug.latents.estimators.problem import Iterate, ObjectiveTerms, Problem

_TRIALS = 20  # maximum number of step lengths tried along a direction, each half of the previous one
_DECREASE = 1e-4  # required fraction of the decrease predicted by the gradient (Armijo condition)
_ROUNDING = 1e-12  # relative changes of the merit below this are rounding errors


def iterate(problem: Problem, start: Tensor, *, damp: float, tol: float, max_steps: int) -> tuple[Iterate, int]:
    """Run the plain damped iteration ``x ← x + damp · (F(x) − x)``. Stop if a state is not finite.

    Args:
        problem: problem to solve.
        start: initial state, ``(blocks, K, D)``.
        damp: fraction of each step that is applied.
        tol: residual at which to stop.
        max_steps: maximum number of steps.

    Returns:
        The last finite iterate and the number of steps.
    """
    current = problem.evaluate(start)
    for steps in range(max_steps):
        if current.residual <= tol:
            return current, steps
        updated = problem.evaluate(problem.project(current.terms.x + damp * current.step))
        if not math.isfinite(updated.residual):
            return current, steps
        current = updated
    return current, max_steps


def accelerate(
    problem: Problem, start: Tensor, *, damp: float, memory: int, tol: float, max_steps: int
) -> tuple[Iterate, int]:
    """Minimize by projected L-BFGS with a diagonal initial metric (two-metric projection: Bertsekas, 1982).

    The step of the problem is the negative gradient times a positive diagonal. For Eq. (5) and (6) this diagonal is
    roughly the inverse curvature of the data term. For an exact problem, the step leads to the minimum along each
    coordinate, which is far away where the repulsion nearly cancels the data term.

    The diagonal is the initial inverse Hessian, and the differences of the last ``memory`` steps refine it. Every step
    must decrease ``Problem.merit``. Unlike the plain iteration and its Anderson acceleration, the method therefore
    neither cycles nor is attracted by saddle points.

    Args:
        problem: problem to solve.
        start: initial state, ``(blocks, K, D)``.
        damp: fraction of the step that is applied when there is no history.
        memory: number of past steps to keep.
        tol: residual at which to stop.
        max_steps: maximum number of states to evaluate.

    Returns:
        The last accepted iterate and the number of states evaluated after the initial one.
    """
    current, steps = problem.evaluate(start), 0
    history = _History(memory, start)
    del start  # the state is large; free it as soon as it is replaced
    while current.residual > tol and steps < max_steps:
        direction = _direction(problem, current, history, damp)
        terms, trials = _search(problem, current, direction, min(_TRIALS, max_steps - steps))
        del direction  # free memory before the forces are computed
        steps += trials
        if terms is not None:
            updated = problem.forces(terms)
            history.append(current, updated, problem.free(current) & problem.free(updated))
            current = updated
        elif history.count:
            history.count = 0  # restart with the plain damped step
        else:
            break
    return current, steps


def _direction(problem: Problem, current: Iterate, history: _History, damp: float) -> Tensor:
    """Return the quasi-Newton direction, or the damped step without history or if the direction is no descent."""
    if history.count:
        direction = history.direction(current, problem.metric(current)).mul_(problem.free(current))
        slope, step_slope = _dot(current.gradient, direction), _dot(current.gradient, current.step)
        if slope <= 1e-6 * step_slope:  # both are negative; the comparison is False for NaN
            return direction
        history.count = 0
    return damp * current.step


def _search(problem: Problem, current: Iterate, direction: Tensor, trials: int) -> tuple[ObjectiveTerms | None, int]:
    """Halve the step until the merit decreases. A rejected trial does not compute forces.

    Args:
        problem: problem to solve.
        current: iterate to start from.
        direction: step of length 1, with the shape of the state.
        trials: maximum number of step lengths to try.

    Returns:
        Objective terms of the accepted state, or None, and the number of trials.
    """
    length, before = 1.0, problem.merit(current.terms, current.terms)
    for used in range(1, trials + 1):
        terms = problem.measure(problem.project(current.terms.x.clone().add_(direction, alpha=length)))
        blocks = zip(current.gradient, terms.x, current.terms.x, strict=True)
        predicted = sum(_dot(gradient, new - old) for gradient, new, old in blocks)
        limit = before + _DECREASE * predicted + _ROUNDING * abs(before)
        if problem.merit(terms, current.terms) <= limit:  # False for NaN
            return terms, used
        length *= 0.5
    return None, trials


class _History:
    """Ring buffer of the latest differences of state and gradient, two float32 tensors ``(size, blocks, K, D)``.

    Args:
        size: maximum number of differences.
        like: a state, for shape and device.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self.size, self.count, self._next = size, 0, 0
        self.dx, self.dg = like.new_empty(2, size, *like.shape, dtype=torch.float32)
        self.curvature = [0.0] * size  # dot product of dx and dg

    def append(self, current: Iterate, updated: Iterate, free: Tensor) -> None:
        """Add the differences in the ``free`` coordinates if the curvature along them is positive."""
        dx, dg = self.dx[self._next], self.dg[self._next]
        self.count = min(self.count, self.size - 1)  # drop the oldest entry if the buffer is full
        for block in range(len(dx)):
            dx[block] = (updated.terms.x[block] - current.terms.x[block]).mul_(free[block])
            dg[block] = (updated.gradient[block] - current.gradient[block]).mul_(free[block])
        curvature = _dot(dx, dg)
        if curvature > 1e-6 * float(dx.norm() * dg.norm()):
            self.curvature[self._next] = curvature
            self._next, self.count = (self._next + 1) % self.size, self.count + 1

    def direction(self, current: Iterate, metric: Tensor) -> Tensor:
        """Compute the L-BFGS direction by the two-loop recursion (Nocedal, 1980), in float32.

        Args:
            current: iterate to start from.
            metric: diagonal of the initial inverse Hessian; scaled to match the curvature of the latest entry.

        Returns:
            Direction, with the shape of the state.
        """
        newest_first = [(self._next - 1 - age) % self.size for age in range(self.count)]
        q = (-current.gradient).float()
        coefficients = {}
        for i in newest_first:
            coefficients[i] = _dot(self.dx[i], q) / self.curvature[i]
            q.sub_(self.dg[i], alpha=coefficients[i])

        newest = newest_first[0]
        scale = self.curvature[newest] / _dot(self.dg[newest] * metric, self.dg[newest])
        q.mul_(metric).mul_(min(max(scale, 0.1), 10.0))
        for i in reversed(newest_first):
            q.add_(self.dx[i], alpha=coefficients[i] - _dot(self.dg[i], q) / self.curvature[i])
        return q


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.to(a.dtype).flatten()))
