"""When and how the class Gaussians of a flow are set during its training.

Fixed-point iteration, gradient descent and the data's own statistics solve once, after a warm-up. GLEM takes a step
every epoch, on images that the flow does not train on. "unit" leaves N(0, I) for all classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flowaug.flows.flow import Flow
from flowaug.flows.passes import ImageTable, class_moments
from flowaug.latents.estimators import FixedPoint, Glem, data_initialisation, fpi, gradient_descent
from flowaug.latents.moments import ClassMoments
from flowaug.training.options import GaussianOptions
from flowaug.training.options.gaussians import SOLVED_ONCE

PARTS = {"means": ("mean",), "variances": ("variance",), "both": ("mean", "variance")}


class GaussianSchedule:
    """Sets the class Gaussians of a flow in training.

    Args:
        options: options of the Gaussians.
        steps: optimizer steps of the flow.
        seed: seed of GLEM's split and random start.
        table: the training images.
        reduce: sums a tensor over the processes.
        flow: the flow; GLEM sets its Gaussians to the initial ones.
    """

    def __init__(
        self,
        options: GaussianOptions,
        steps: int,
        seed: int,
        table: ImageTable,
        reduce: Callable[[Tensor], Tensor],
        flow: Flow,
    ):
        self.options, self.steps, self.seed = options, steps, seed
        self.merge_step, self.glem_interval = options.merge_step(steps), options.glem_interval(steps)
        self.held, self.reduce = table, reduce
        self.glem: Glem | None = None
        self.first: Tensor | None = None
        if options.estimator == "glem":
            held = split_by_class(table, options.glem_fraction, seed)
            self.first, self.held = torch.nonzero(~held)[:, 0], table.subset(held)
            self.glem = _create_glem(options, seed, flow)
            flow.gaussians.assign_(self.glem.value)

    def phases(self) -> list[tuple[Tensor | None, int]]:
        """Return the images (None: all) that the flow trains on and the number of steps, phase by phase."""
        if self.glem is None:
            return [(None, self.steps)]
        return [(self.first, self.merge_step), (None, self.steps - self.merge_step)]

    def after(self, step: int, flow: Flow) -> dict | None:
        """Set the Gaussians if they are due after ``step`` steps; return what to note about it, or None."""
        if not self._due(step):
            return None
        moments = class_moments(flow, self.held, flow.gaussians.mean.device, self.reduce, self.seed)
        if self.glem is not None:
            flow.gaussians.assign_(self.glem.step(moments))
            return {"glem_step": step}
        point = solve(moments, self.options)
        flow.gaussians.assign_(point.value)
        return {"steps": point.steps, "residual": float(point.residual), "converged": bool(point.converged)}

    def _due(self, step: int) -> bool:
        if self.glem is not None:
            return step % self.glem_interval == 0 and 0 < step <= self.merge_step
        return self.options.estimator in SOLVED_ONCE and step == self.options.solve_step(self.steps)

    def state_dict(self) -> dict:
        """Return the state of GLEM's optimizer; empty for estimators that solve once."""
        return self.glem.state_dict() if self.glem is not None else {}

    def load_state_dict(self, state: dict) -> None:
        """Restore what ``state_dict`` returned."""
        if self.glem is not None:
            self.glem.load_state_dict(state)


def _create_glem(options: GaussianOptions, seed: int, flow: Flow) -> Glem:
    return Glem(
        flow.gaussians.num_classes,
        flow.dim,
        kld_weight=(options.kld_weight, options.final_kld_weight),
        steps=options.glem_steps,
        lr=options.gaussian_lr,
        learn=PARTS[options.learn],
        reparametrise=not options.clamp_variances,
        start=options.glem_start,
        generator=torch.Generator().manual_seed(seed),
        device=flow.gaussians.mean.device,
    )


def solve(moments: ClassMoments, options: GaussianOptions) -> FixedPoint:
    """Solve for the class Gaussians, given the class moments of the latents."""
    if options.estimator == "data":
        return FixedPoint(data_initialisation(moments), 0, 0.0, True)
    common = {"kld_weight": options.kld_weight, "alpha": options.kld_alpha, "pi": options.kld_pi}
    common |= {"learn": PARTS[options.learn], "variance": options.initial_variance}
    if options.estimator == "gradient":
        return gradient_descent(moments, policy=options.lr_policy, lr=options.gaussian_lr, **common)
    return fpi(moments, isotropic=options.isotropic, **common)


def split_by_class(table: ImageTable, fraction: float, seed: int) -> Tensor:
    """Select a fraction of the images of every class, at least two, leaving at least two: bool (N,).

    Raises:
        ValueError: a class has too few images for two on either side.
    """
    generator, held = torch.Generator().manual_seed(seed), torch.zeros(len(table), dtype=torch.bool)
    for label in range(table.num_classes):
        rows = torch.nonzero(table.targets == label)[:, 0]
        if len(rows) < 4:
            raise ValueError(
                f"class {label} has {len(rows)} images; GLEM needs at least 4 per class, to estimate the Gaussians on "
                "some and train the flow on the others. Add images or use --estimator fpi"
            )
        count = min(max(2, round(fraction * len(rows))), len(rows) - 2)
        held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return held
