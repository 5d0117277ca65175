"""Class Gaussians by an EM-like procedure (GLEM: Enescu & Sahbi, ECCV 2024)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowaug.latents.estimators.divergence import repulsion
from flowaug.latents.estimators.fpi import PARTS, FixedPoint, checked_parts, data_initialisation
from flowaug.latents.gaussians import GaussianParameters
from flowaug.latents.moments import ClassMoments

_MIN_SPREAD = 1e-6  # lower bound of the divisor in gradient normalization; a smaller spread is rounding error
_BETAS, _EPS = (0.9, 0.999), 1e-8  # defaults of torch.optim.Adam


class Glem:
    r"""M-step of GLEM: Adam on the class Gaussians with the flow fixed.

    Call ``step`` once per epoch. The loss is

    .. math:: L = \sum_y \overline{\mathrm{NLL}}_y - \lambda_t \sum_{y \ne y'} \mathrm{KLD}(y\|y'),
              \qquad v = \psi(s) = \frac{a}{1 + e^{-bs}} + c

    :math:`\lambda_t` changes linearly from the first to the second value of ``kld_weight`` over ``steps`` calls and
    then stays constant. The sum of KL divergences has no upper bound; annealing, the bounds of ψ and normalized
    gradients keep it finite. The defaults are those of the authors' code. For ψ as in the paper, use
    ``amplitude=0.5, slope=0.2, floor=0.05``.

    Args:
        num_classes: number of classes K.
        dim: dimension D of the latents.
        kld_weight: λ at the start and at the end; ``(0, 0)`` disables the divergence.
        steps: length of the schedules of λ and the learning rate.
        lr: learning rate in the first tenth of the steps. After that it decays geometrically from ``0.1 * lr`` to
            ``0.01 * lr``.
        learn: ``"mean"``, ``"variance"`` or both.
        reparametrise: optimize ``s``, with variances ψ(s). If False, optimize the variances directly and clamp them
            to ``[c, a + c]``.
        amplitude: ``a`` of ψ.
        slope: ``b`` of ψ.
        floor: ``c`` of ψ.
        normalise: divide the gradient of each loss term by the range (max − min) of its entries.
        start: ``"zero"`` for means 0 and variances a/2 + c, or ``"random"`` for means from U[−1, 1] and variances from
            U[(a + c)/10, a + c], clamped to the range of ψ.
        generator: random number generator for ``start="random"``. Defaults to the global one.
        device: device of the parameters.

    Raises:
        ValueError: if an argument is out of range.

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
        self.kld_weight, self.steps, self.lr = kld_weight, steps, lr
        self.learn = checked_parts(learn)
        self.reparametrise, self.normalise = reparametrise, normalise
        self.amplitude, self.slope, self.floor = amplitude, slope, floor

        mean, variance = self._initial_parameters(start, (num_classes, dim), generator)
        self._state = {"mean": mean.to(device), "raw": self._inverse_psi(variance.to(device))}
        for name in ("mean", "raw"):
            for moment in ("first", "second"):
                self._state[f"{name}_{moment}"] = torch.zeros_like(self._state[name])
        self._state["done"] = torch.zeros((), dtype=torch.int64)

    @property
    def value(self) -> GaussianParameters:
        """Current means and variances, ``(K, D)`` float64."""
        raw = self._state["raw"]
        variance = self.amplitude * torch.sigmoid(self.slope * raw) + self.floor if self.reparametrise else raw
        return GaussianParameters(self._state["mean"].clone(), variance.clone())

    def step(self, moments: ClassMoments) -> GaussianParameters:
        """Do one step of Adam.

        Args:
            moments: class moments of the latents, with the same K and D. GLEM computes them on the subset of the
                training set that is reserved for the Gaussians (D_G in the paper).

        Returns:
            The new means and variances, ``(K, D)`` float64.

        Raises:
            ValueError: if the shapes differ, or a class has fewer than two samples or zero variance.
        """
        gradient = self._gradient(moments)
        done = int(self._state["done"])
        beta1, beta2 = _BETAS
        self._state["done"] += 1
        for name, g in gradient.items():
            first, second = self._state[f"{name}_first"], self._state[f"{name}_second"]
            first.lerp_(g, 1 - beta1)
            second.lerp_(g.square(), 1 - beta2)
            scale = (second / (1 - beta2 ** (done + 1))).sqrt_().add_(_EPS)
            self._state[name].addcdiv_(first, scale, value=-self._learning_rate(done) / (1 - beta1 ** (done + 1)))
        if not self.reparametrise:
            self._state["raw"].clamp_(self.floor, self.amplitude + self.floor)
        return self.value

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the parameters, the moment estimates of Adam and the number of steps done."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the output of ``state_dict``. The options must be the same as when it was saved.

        Args:
            state: output of ``state_dict``.

        Raises:
            ValueError: if a tensor is missing or has another shape.
        """
        for name, tensor in self._state.items():
            if name not in state or state[name].shape != tensor.shape:
                found = f"shape {tuple(state[name].shape)}" if name in state else "no such entry"
                raise ValueError(
                    f"invalid GLEM state: expected {name!r} of shape {tuple(tensor.shape)}, got {found}; load a state "
                    "saved with the same number of classes and dimensions"
                )
        self._state = {name: state[name].to(tensor, copy=True) for name, tensor in self._state.items()}

    def _gradient(self, moments: ClassMoments) -> dict[str, Tensor]:
        """Compute the gradient of the loss with respect to the learned entries of the state."""
        mean, variance = self.value
        if moments.mean.shape != mean.shape:
            expected, found = tuple(mean.shape), tuple(moments.mean.shape)
            raise ValueError(f"expected moments of shape (K, D) = {expected}, got {found}")

        data = data_initialisation(moments) if "variance" in self.learn else moments
        weight = self._annealed_weight(int(self._state["done"]))
        pairs = 1 - torch.eye(len(mean)).to(mean)  # each ordered pair has weight 1
        forces = repulsion(mean, variance, pairs, self.learn)

        gradient = {}
        if forces.push is not None:
            parts = (mean - data.mean) / variance, -forces.push / variance
            gradient["mean"] = self._combine(*parts, weight)
        if forces.shrink is not None and forces.grow is not None:
            scatter = (data.mean - mean).square() + data.variance
            slope = 0.5 * self._psi_derivative(variance)
            parts = variance - scatter, forces.shrink - forces.grow
            likelihood, divergence = (part * slope / variance.square() for part in parts)
            gradient["raw"] = self._combine(likelihood, divergence, weight)
        return gradient

    def _combine(self, likelihood: Tensor, divergence: Tensor, weight: float) -> Tensor:
        """Add the gradients of both loss terms, normalized if requested."""
        if self.normalise:
            likelihood, divergence = (g / (g.max() - g.min()).clamp(min=_MIN_SPREAD) for g in (likelihood, divergence))
        return likelihood + weight * divergence

    def _psi_derivative(self, variance: Tensor) -> Tensor:
        """Compute the derivative of ψ, given its value."""
        if not self.reparametrise:
            return torch.ones_like(variance)
        above = variance - self.floor
        return self.slope * above * (self.amplitude - above) / self.amplitude

    def _inverse_psi(self, variance: Tensor) -> Tensor:
        """Compute the inverse of ψ, with variances clamped to the interior of its range."""
        if not self.reparametrise:
            return variance.clamp(self.floor, self.amplitude + self.floor)
        return torch.logit((variance - self.floor) / self.amplitude, eps=1e-3) / self.slope

    def _annealed_weight(self, done: int) -> float:
        """Return λ after ``done`` steps."""
        progress = min(1.0, done / max(1, self.steps - 1))
        return (1 - progress) * self.kld_weight[0] + progress * self.kld_weight[1]

    def _learning_rate(self, done: int) -> float:
        """Return the learning rate after ``done`` steps."""
        tenth = max(1, self.steps // 10)
        if done < tenth:
            return self.lr
        return 0.1 * self.lr * 0.1 ** min(1.0, (done - tenth) / max(1, self.steps - 1 - tenth))

    def _initial_parameters(
        self, start: str, shape: tuple[int, int], generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        top = self.amplitude + self.floor
        if start == "zero":
            mean = torch.zeros(shape, dtype=torch.float64)
            return mean, torch.full_like(mean, self.amplitude / 2 + self.floor)
        if start == "random":
            u_variance, u_mean = torch.rand(2, *shape, generator=generator, dtype=torch.float64)
            return 2 * u_mean - 1, top / 10 + 0.9 * top * u_variance
        raise ValueError(f"start must be 'zero' or 'random', got {start!r}")


def glem(moments: ClassMoments, *, tol: float = 1e-2, **options) -> FixedPoint:
    """Run all M-steps of ``Glem`` on the same moments, as for a flow that is no longer trained.

    Args:
        moments: class moments of the latents, with K classes and D dimensions.
        tol: residual below which the result counts as converged.
        **options: keyword arguments of ``Glem``.

    Returns:
        Parameters, number of steps, residual and whether it is below ``tol``. The residual is the change in the last
        step relative to the norm of the parameters, the larger of means and variances. The annealed objective has no
        minimum to converge to; a small residual only means that the parameters have stopped changing.

    Raises:
        ValueError: see ``Glem``.
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
        raise ValueError(f"kld_weight must be two finite weights >= 0, for the start and the end; got {kld_weight}")
    if steps < 1 or not lr > 0:
        raise ValueError(f"steps must be at least 1 and lr positive, got {steps} and {lr}")
    if not min(amplitude, slope, floor) > 0:
        raise ValueError(f"amplitude, slope and floor of ψ must be positive, got {amplitude}, {slope}, {floor}")
