"""How and when the class Gaussians of a flow are set during its training, from the options of ``train_flow.py``.

Fixed-point iteration, gradient descent and the data's own statistics are one solve, after a warm-up; GLEM takes a step
every epoch on images that the flow does not train on; "unit" leaves N(0, I) for all classes, the monomodal flow.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from flowaug.flows.flow import Flow
from flowaug.flows.passes import ImageTable, class_moments
from flowaug.latents.estimators import LR_POLICIES, FixedPoint, Glem, data_initialisation, fpi, gradient_descent

PARTS = {"means": ("mean",), "variances": ("variance",), "both": ("mean", "variance")}
USES = {  # which options each estimator reads; any other that is given is an error
    "fpi": {"kld_weight", "kld_alpha", "kld_pi", "learn", "variance", "isotropic", "solve_at"},
    "gradient": {"kld_weight", "kld_alpha", "kld_pi", "learn", "variance", "lr_policy", "gaussian_lr", "solve_at"},
    "data": {"solve_at"},
    "glem": {"kld_weight", "kld_weight_end", "learn", "gaussian_lr", "clamp_variances", "glem_start", "glem_share"}
    | {"glem_every", "glem_steps", "glem_merge_at"},
    "unit": set(),
}
DEFAULTS = {"kld_alpha": 10.0, "kld_pi": "pair", "learn": "means", "isotropic": False, "lr_policy": "linear"}
DEFAULTS |= {"gaussian_lr": 0.1, "glem_share": 0.1, "glem_steps": 100, "glem_start": "zero", "clamp_variances": False}
ESTIMATOR_DEFAULTS = {"glem": {"kld_weight": 50.0, "learn": "both"}}  # before recipe and DEFAULTS


def add_gaussian_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about class Gaussians; those left out stay None until ``settle_gaussian_options``."""
    group = parser.add_argument_group("class Gaussians")
    group.add_argument("--estimator", choices=sorted(USES), default="fpi", help="where they come from (fpi)")
    group.add_argument("--kld-weight", type=float, help="λ', pull towards separation: more classifies, less augments")
    group.add_argument("--kld-alpha", type=float, help="α of the separation term, 0.1 to 10 (10)")
    group.add_argument("--kld-pi", choices=("pair", "mean"), help="divergence that scales each exponential (pair)")
    group.add_argument("--learn", choices=sorted(PARTS), help="what is learned (means; glem: both)")
    group.add_argument("--variance", choices=("unit", "data"), help="variances at the start (unit; learned: data)")
    group.add_argument("--isotropic", action="store_const", const=True, help="one variance per class")
    group.add_argument("--solve-at", type=int, help="step at which they are solved for, then frozen")
    group.add_argument(
        "--posterior-weight",
        type=float,
        default=0.0,
        metavar="γ",
        help="of log p(label | image) beside the likelihood: classifies better, draws worse (0)",
    )
    group.add_argument(
        "--teacher",
        nargs="+",
        metavar="CLASSIFIER",
        help="learn the posterior from its soft labels, several take turns: folders of finetune.py, or models as timm "
        "names them",
    )
    group.add_argument("--lr-policy", choices=sorted(LR_POLICIES), help="decay of the gradient's rate (linear)")
    group.add_argument("--gaussian-lr", type=float, help="learning rate of gradient and glem (0.1)")
    group.add_argument("--kld-weight-end", type=float, help="glem: λ falls linearly to this (half of --kld-weight)")
    group.add_argument("--clamp-variances", action="store_const", const=True, help="glem: clamp, no reparametrisation")
    group.add_argument("--glem-start", choices=("zero", "random"), help="glem: initial Gaussians (zero)")
    group.add_argument("--glem-share", type=float, help="glem: share of images for the Gaussians alone (0.1)")
    group.add_argument("--glem-steps", type=int, help="glem: steps on the Gaussians (100)")
    group.add_argument("--glem-every", type=int, help="glem: flow steps between them (as --glem-merge-at needs)")
    group.add_argument("--glem-merge-at", type=int, help="glem: step from which only the flow trains, on all images")


def check_estimator_options(given: argparse.Namespace) -> None:
    """Raise a ValueError for options that the command line gives but that the estimator does not read."""
    every = set().union(*USES.values())
    idle = sorted(name for name in every - USES[given.estimator] if getattr(given, name) is not None)
    if idle:
        names = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise ValueError(f"--estimator {given.estimator} does not use {names}; leave them out or choose another")


def check_gaussian_options(args: argparse.Namespace) -> None:
    """Raise a ValueError for values, of command line or recipe, that cannot be or that disagree."""
    if not args.posterior_weight >= 0:
        raise ValueError(f"--posterior-weight is {args.posterior_weight}; expected 0 (likelihood alone) or more")
    if args.posterior_weight and args.estimator == "unit":
        raise ValueError("--estimator unit has no classes for --posterior-weight to tell apart; leave one out")
    if args.teacher and not args.posterior_weight:
        names = " ".join(args.teacher)
        raise ValueError(f"--teacher {names} needs --posterior-weight, the weight of what it teaches")
    if args.glem_share is not None and not 0 < args.glem_share < 1:
        raise ValueError(f"--glem-share is {args.glem_share}; expected a share between 0 and 1")


def settle_gaussian_options(args: argparse.Namespace) -> None:
    """Fill in what the estimator reads and neither command line nor recipe gave, in place; the rest becomes None."""
    for name in set().union(*USES.values()):
        value = getattr(args, name)
        value = DEFAULTS.get(name) if value is None else value
        setattr(args, name, value if name in USES[args.estimator] else None)
    if args.estimator in ("fpi", "gradient"):
        args.variance = args.variance or ("unit" if args.learn == "means" else "data")
    if args.estimator == "glem":
        args.kld_weight_end = args.kld_weight / 2 if args.kld_weight_end is None else args.kld_weight_end
        args.glem_merge_at = args.glem_merge_at or max(1, args.steps // 2)
        args.glem_every = args.glem_every or max(1, args.glem_merge_at // args.glem_steps)


class GaussianSchedule:
    """Sets the class Gaussians of a flow in training.

    Args:
        args: settled options.
        table: the training images.
        reduce: sums a tensor over the processes.
        flow: the flow; under GLEM its Gaussians are set to the first ones.
    """

    def __init__(self, args: argparse.Namespace, table: ImageTable, reduce: Callable, flow: Flow):
        self.args, self.held, self.reduce = args, table, reduce
        self.glem = self.first = None
        if args.estimator == "glem":
            held = split_by_class(table, args.glem_share, args.seed)
            self.first, self.held = torch.nonzero(~held)[:, 0], table.subset(held)
            self.glem = self._make_glem(flow)
            flow.gaussians.assign_(self.glem.value)

    def _make_glem(self, flow: Flow) -> Glem:
        args = self.args
        return Glem(
            flow.gaussians.num_classes,
            flow.dim,
            kld_weight=(args.kld_weight, args.kld_weight_end),
            steps=args.glem_steps,
            lr=args.gaussian_lr,
            learn=PARTS[args.learn],
            reparametrise=not args.clamp_variances,
            start=args.glem_start,
            generator=torch.Generator().manual_seed(args.seed),
            device=flow.gaussians.mean.device,
        )

    def phases(self) -> list[tuple[Tensor | None, int]]:
        """Which images (None: all) the flow trains on, and for how many steps: under GLEM first D_NF, then all."""
        if self.glem is None:
            return [(None, self.args.steps)]
        merge = min(self.args.glem_merge_at, self.args.steps)
        return [(self.first, merge), (None, self.args.steps - merge)]

    def after(self, step: int, flow: Flow) -> dict | None:
        """Set the Gaussians if they are due after ``step`` steps; returns what is worth noting then."""
        if not self._due(step):
            return None
        moments = class_moments(flow, self.held, flow.gaussians.mean.device, self.reduce, self.args.seed)
        if self.glem is not None:
            flow.gaussians.assign_(self.glem.step(moments))
            return {"glem_step": step}
        point = solve(moments, self.args)
        flow.gaussians.assign_(point.value)
        return {"steps": point.steps, "residual": float(point.residual), "converged": bool(point.converged)}

    def _due(self, step: int) -> bool:
        if self.glem is not None:
            return step % self.args.glem_every == 0 and 0 < step <= self.args.glem_merge_at
        return step == self.args.solve_at

    def state_dict(self) -> dict:
        """State of GLEM's optimiser; empty for estimators that solve once."""
        return self.glem.state_dict() if self.glem is not None else {}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what ``state_dict`` returned."""
        if self.glem is not None:
            self.glem.load_state_dict(state)


def solve(moments, args: argparse.Namespace) -> FixedPoint:
    """The one solve of an estimator that solves once."""
    if args.estimator == "data":
        return FixedPoint(data_initialisation(moments), 0, 0.0, True)
    options = {"kld_weight": args.kld_weight, "alpha": args.kld_alpha, "pi": args.kld_pi}
    options |= {"learn": PARTS[args.learn], "variance": args.variance}
    if args.estimator == "gradient":
        return gradient_descent(moments, policy=args.lr_policy, lr=args.gaussian_lr, **options)
    return fpi(moments, isotropic=args.isotropic, **options)


def split_by_class(table: ImageTable, share: float, seed: int) -> Tensor:
    """Choose ``share`` of the images of every class, at least two, and leave at least two: bool (N,).

    Raises:
        ValueError: naming a class with too few images to leave two on either side.
    """
    generator, held = torch.Generator().manual_seed(seed), torch.zeros(len(table), dtype=torch.bool)
    for label in range(table.num_classes):
        rows = torch.nonzero(table.targets == label)[:, 0]
        if len(rows) < 4:
            raise ValueError(
                f"class {label} has {len(rows)} images, GLEM needs 4 to estimate on some and train on others; add "
                "images or use --estimator fpi, which needs no split"
            )
        count = min(max(2, round(share * len(rows))), len(rows) - 2)
        held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return held
