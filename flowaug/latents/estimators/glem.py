"""Class Gaussians learned by expectation maximisation (GLEM: Enescu & Sahbi, ECCV 2024)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowaug.latents.estimators.divergence import repulsion
from flowaug.latents.estimators.fpi import PARTS, FixedPoint, checked_parts, data_initialisation
from flowaug.latents.gaussians import GaussianParameters
from flowaug.latents.moments import ClassMoments

__all__ = ["Glem", "glem"]

_NOTHING = 1e-6  # a gradient whose entries spread less than this is rounding, not worth normalising
_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's own


class Glem:
    r"""The M-step of GLEM: Adam on the Gaussians with the flow fixed, one call of `step` per epoch.

    .. math:: L = \sum_y \overline{\mathrm{NLL}}_y - \lambda_t \sum_{y \ne y'} \mathrm{KLD}(y\|y'),
              \qquad v = \psi(s) = \frac{a}{1 + e^{-bs}} + c

    :math:`\lambda_t` falls linearly from the first to the last of `kld_weight` over `steps` calls and stays
    there. The raw KLD is unbounded: annealing, the bounds of ψ and normalised gradients keep it finite. The
    defaults are those of the authors' release; the paper's ψ is `amplitude=0.5, slope=0.2, floor=0.05`.

    Args:
        num_classes: K.
        dim: D.
        kld_weight: λ at the start and at the end; `(0, 0)` switches the divergence off.
        steps: length of both schedules.
        lr: learning rate of the first tenth of the steps; then from a tenth of it down to a hundredth,
            geometrically.
        learn: `"mean"`, `"variance"` or both.
        reparametrise: False descends on the variances themselves and clamps them to `[c, a + c]`.
        amplitude: a of ψ.
        slope: b of ψ.
        floor: c of ψ.
        normalise: divide the gradient of each loss by the spread (max − min) of its entries.
        start: `"zero"`, means 0 and variances a/2 + c; or `"random"`, means U[−1, 1] and variances
            U[(a + c)/10, a + c] clamped to ψ's range.
        generator: source of the random start.
        device: where the parameters live.

    Example:
        >>> moments = ClassMoments.of(torch.tensor([[-1.0], [1.0], [2.0], [4.0]]), torch.tensor([0, 0, 1, 1]), 2)
        >>> solver = Glem(num_classes=2, dim=1, steps=20)
        >>> for _ in range(20):
        ...     value = solver.step(moments)
        >>> bool(value.mean[1] > value.mean[0])
        True
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        kld_weight: tuple[float, float] = (50.0, 25.0),
        steps: int = 100,
        lr: float = 0.1,
        learn: tuple[str, ...] | str = PARTS,
        reparametrise: bool = True,
        amplitude: float = 1.0,
        slope: float = 1.0,
        floor: float = 0.25,
        normalise: bool = True,
        start: str = "zero",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        _check_options(kld_weight, steps, lr, amplitude, slope, floor)
        self.kld_weight, self.steps, self.lr, self.learn = kld_weight, steps, lr, checked_parts(learn)
        self.reparametrise, self.normalise = reparametrise, normalise
        self.amplitude, self.slope, self.floor = amplitude, slope, floor
        mean, variance = self._start(start, (num_classes, dim), generator)
        self._state = {"mean": mean.to(device), "raw": self._raw(variance.to(device))}
        for name in ("mean", "raw"):
            for moment in ("first", "second"):
                self._state[f"{name}_{moment}"] = torch.zeros_like(self._state[name])
        self._state["done"] = torch.zeros((), dtype=torch.int64)

    @property
    def value(self) -> GaussianParameters:
        """The current means and variances, `(K, D)` float64."""
        raw = self._state["raw"]
        variance = self.amplitude * torch.sigmoid(self.slope * raw) + self.floor if self.reparametrise else raw
        return GaussianParameters(self._state["mean"].clone(), variance.clone())

    def step(self, moments: ClassMoments) -> GaussianParameters:
        """One gradient step given the class statistics of the latents (in GLEM: of D_G), `(K, D)`.

        Raises:
            ValueError: other shapes; naming the class that is absent, has one sample or zero variance.
        """
        gradient = self._gradient(moments)
        done, (before, after) = int(self._state["done"]), _BETAS
        self._state["done"] += 1
        for name, g in gradient.items():
            first, second = self._state[f"{name}_first"], self._state[f"{name}_second"]
            first.lerp_(g, 1 - before)
            second.lerp_(g.square(), 1 - after)
            scale = (second / (1 - after ** (done + 1))).sqrt_().add_(_EPS)
            self._state[name].addcdiv_(first, scale, value=-self._rate(done) / (1 - before ** (done + 1)))
        if not self.reparametrise:
            self._state["raw"].clamp_(self.floor, self.amplitude + self.floor)
        return self.value

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters, Adam's averages and the number of steps done, all tensors."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues where `state_dict` was taken; the options must be the same."""
        for name, tensor in self._state.items():
            if name not in state or state[name].shape != tensor.shape:
                raise ValueError(f"this GLEM state lacks {name!r} of shape {tuple(tensor.shape)}")
        self._state = {name: state[name].to(tensor, copy=True) for name, tensor in self._state.items()}

    def _gradient(self, moments: ClassMoments) -> dict[str, Tensor]:
        mean, variance = self.value
        if moments.mean.shape != mean.shape:
            raise ValueError(f"these Gaussians are {tuple(mean.shape)}, the moments {tuple(moments.mean.shape)}")
        data = data_initialisation(moments) if "variance" in self.learn else moments
        weight, pairs = self._weight(int(self._state["done"])), 1 - torch.eye(len(mean)).to(mean)
        forces, gradient = repulsion(mean, variance, pairs, self.learn), {}
        if "mean" in self.learn:
            parts = (mean - data.mean) / variance, -forces.push / variance
            gradient["mean"] = self._sum(*parts, weight)
        if "variance" in self.learn:
            scatter, slope = (data.mean - mean).square() + data.variance, 0.5 * self._jacobian(variance)
            parts = variance - scatter, forces.shrink - forces.grow
            gradient["raw"] = self._sum(*(part * slope / variance.square() for part in parts), weight)
        return gradient

    def _sum(self, likelihood: Tensor, divergence: Tensor, weight: float) -> Tensor:
        if self.normalise:
            likelihood, divergence = (g / (g.max() - g.min()).clamp(min=_NOTHING) for g in (likelihood, divergence))
        return likelihood + weight * divergence

    def _jacobian(self, variance: Tensor) -> Tensor:
        """Derivative of ψ, from its value."""
        if not self.reparametrise:
            return torch.ones_like(variance)
        above = variance - self.floor
        return self.slope * above * (self.amplitude - above) / self.amplitude

    def _raw(self, variance: Tensor) -> Tensor:
        """The inverse of ψ, a hair inside its range."""
        if not self.reparametrise:
            return variance.clamp(self.floor, self.amplitude + self.floor)
        return torch.logit((variance - self.floor) / self.amplitude, eps=1e-3) / self.slope

    def _weight(self, done: int) -> float:
        share = min(1.0, done / max(1, self.steps - 1))
        return (1 - share) * self.kld_weight[0] + share * self.kld_weight[1]

    def _rate(self, done: int) -> float:
        tenth = max(1, self.steps // 10)
        if done < tenth:
            return self.lr
        return 0.1 * self.lr * 0.1 ** min(1.0, (done - tenth) / max(1, self.steps - 1 - tenth))

    def _start(self, start: str, shape: tuple[int, int], generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        top = self.amplitude + self.floor
        if start == "zero":
            mean = torch.zeros(shape, dtype=torch.float64)
            return mean, torch.full_like(mean, self.amplitude / 2 + self.floor)
        if start == "random":
            share, mean = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
            return 2 * mean - 1, top / 10 + 0.9 * top * share
        raise ValueError(f"start must be 'zero' or 'random', got {start!r}")


def glem(moments: ClassMoments, *, tol: float = 1e-2, **options) -> FixedPoint:
    """Runs every M-step of `Glem` on the same moments: what GLEM makes of a flow that no longer moves.

    Args:
        moments: class statistics of the latents, `(K, D)`.
        tol: change of the last step, relative to the norm of the parameters, that counts as settled.
        **options: keywords of `Glem`.

    Returns:
        Value and steps; `residual` is that relative change, the larger of means and variances. The annealed
        objective has no minimum to converge to: a small residual says only that the schedule came to rest.
    """
    solver = Glem(moments.num_classes, moments.dim, device=moments.device, **options)
    before = after = solver.value
    for _ in range(solver.steps):
        before, after = after, solver.step(moments)
    changes = (float((b - a).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(before, after, strict=True))
    residual = max(changes)
    return FixedPoint(after, solver.steps, residual, residual <= tol)


def _check_options(
    kld_weight: tuple[float, float], steps: int, lr: float, amplitude: float, slope: float, floor: float
) -> None:
    if len(kld_weight) != 2 or not all(0 <= weight < float("inf") for weight in kld_weight):
        raise ValueError(f"kld_weight must be two finite weights >= 0, at the start and the end; got {kld_weight}")
    if steps < 1 or not lr > 0:
        raise ValueError(f"steps must be at least 1 and lr positive, got {steps} and {lr}")
    if not min(amplitude, slope, floor) > 0:
        raise ValueError(f"amplitude, slope and floor of ψ must be positive, got {amplitude}, {slope}, {floor}")
