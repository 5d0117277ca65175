"""Two ways to a balance: the damped iteration as published, and a quasi-Newton method."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowaug.latents.estimators.problem import Balance, Height, Point

__all__ = ["accelerate", "iterate"]

_TRIALS = 20  # halvings of a step before its direction is given up
_DECREASE = 1e-4  # share of the decrease promised by the gradient (Armijo)
_ROUNDING = 1e-12  # of the merit: changes below it are noise


def iterate(balance: Balance, start: Tensor, *, damp: float, tol: float, max_steps: int) -> tuple[Point, int]:
    """The plain damped iteration `x ← x + damp · (F(x) − x)`; stops where it leaves the finite numbers.

    Returns:
        The last finite point and the number of steps made.
    """
    point = balance.evaluate(start)
    for steps in range(max_steps):
        if point.residual <= tol:
            return point, steps
        following = balance.evaluate(balance.project(point.height.x + damp * point.step))
        if not math.isfinite(following.residual):
            return point, steps
        point = following
    return point, max_steps


def accelerate(
    balance: Balance, start: Tensor, *, damp: float, memory: int, tol: float, max_steps: int
) -> tuple[Point, int]:
    """Projected L-BFGS whose metric is the step along each coordinate (two-metric projection: Bertsekas, 1982).

    That step is the gradient times a positive diagonal: about the data term's inverse curvature for Eq. (5) and (6); of
    a balance that is exact, the way to each coordinate's minimum, which is far where pairs nearly cancel the data term.
    The diagonal is the initial inverse Hessian, `memory` pairs of differences refine it, and every step must decrease
    `Balance.merit`: unlike the plain iteration and its Anderson acceleration it does not cycle, and it is not drawn to
    saddles.

    Returns:
        The last accepted point and the number of states tried after the first.
    """
    point, steps, pairs = balance.evaluate(start), 0, _Memory(memory, start)
    del start
    while point.residual > tol and steps < max_steps:
        direction = _direction(balance, point, pairs, damp)
        height, used = _search(balance, point, direction, min(_TRIALS, max_steps - steps))
        del direction  # room for the forces
        steps += used
        if height is not None:
            following = balance.forces(height)
            pairs.remember(point, following, balance.free(point) & balance.free(following))
            point = following
        elif pairs.held:
            pairs.held = 0
        else:
            break
    return point, steps


def _direction(balance: Balance, point: Point, pairs: _Memory, damp: float) -> Tensor:
    """The quasi-Newton direction, or the damped step where there is no memory or no descent."""
    if pairs.held:
        direction = pairs.direction(point, balance.metric(point)).mul_(balance.free(point))
        slope, least = _dot(point.gradient, direction), _dot(point.gradient, point.step)
        if slope <= 1e-6 * least:  # both negative; False for NaN
            return direction
        pairs.held = 0
    return damp * point.step


def _search(balance: Balance, point: Point, direction: Tensor, trials: int) -> tuple[Height | None, int]:
    """Halves the step until the merit falls; None if it never does. A refused trial costs no forces."""
    length, before = 1.0, balance.merit(point.height, point.height)
    for used in range(1, trials + 1):
        height = balance.measure(balance.project(point.height.x.clone().add_(direction, alpha=length)))
        blocks = zip(point.gradient, height.x, point.height.x, strict=True)
        promised = sum(_dot(gradient, there - here) for gradient, there, here in blocks)
        enough = before + _DECREASE * promised + _ROUNDING * abs(before)
        if balance.merit(height, point.height) <= enough:  # False for NaN
            return height, used
        length *= 0.5
    return None, trials


class _Memory:
    """The latest differences of state and gradient, float32, in a ring: `(size, blocks, K, D)` twice.

    Args:
        size: pairs kept.
        like: a state.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self.size, self.held, self._next = size, 0, 0
        self.moved, self.changed = like.new_empty(2, size, *like.shape, dtype=torch.float32)
        self.curvature = [0.0] * size

    def remember(self, point: Point, following: Point, free: Tensor) -> None:
        """Adds the differences over the `free` coordinates, if the curvature along them is positive."""
        moved, changed = self.moved[self._next], self.changed[self._next]
        self.held = min(self.held, self.size - 1)  # the oldest makes room
        for block in range(len(moved)):
            moved[block] = (following.height.x[block] - point.height.x[block]).mul_(free[block])
            changed[block] = (following.gradient[block] - point.gradient[block]).mul_(free[block])
        curvature = _dot(moved, changed)
        if curvature > 1e-6 * float(moved.norm() * changed.norm()):
            self.curvature[self._next] = curvature
            self._next, self.held = (self._next + 1) % self.size, self.held + 1

    def direction(self, point: Point, metric: Tensor) -> Tensor:
        """L-BFGS two-loop recursion (Nocedal, 1980) in float32: a direction needs no more.

        Args:
            point: where to go from.
            metric: initial inverse Hessian, a diagonal; stretched to fit the newest pair.
        """
        latest = [(self._next - 1 - age) % self.size for age in range(self.held)]
        q, shares = (-point.gradient).float(), {}
        for i in latest:
            shares[i] = _dot(self.moved[i], q) / self.curvature[i]
            q.sub_(self.changed[i], alpha=shares[i])
        newest = latest[0]
        stretch = self.curvature[newest] / _dot(self.changed[newest] * metric, self.changed[newest])
        q.mul_(metric).mul_(min(max(stretch, 0.1), 10.0))
        for i in reversed(latest):
            q.add_(self.moved[i], alpha=shares[i] - _dot(self.changed[i], q) / self.curvature[i])
        return q


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.to(a.dtype).flatten()))
