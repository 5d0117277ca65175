"""Options of the class Gaussians, and which of them each estimator reads."""

from dataclasses import dataclass
from typing import Any, Literal

from flowaug.training.options.fields import OptionError, Options, option, option_name

_REPULSION = {"kld_weight", "kld_alpha", "kld_pi", "learn", "variance", "solve_at"}
_GLEM = {"glem_start", "glem_fraction", "glem_every", "glem_steps", "glem_merge_at"}
USED_BY = {  # the options that each estimator reads; giving another one is an error
    "fpi": _REPULSION | {"isotropic"},
    "gradient": _REPULSION | {"lr_policy", "gaussian_lr"},
    "data": {"solve_at"},
    "glem": _GLEM | {"kld_weight", "kld_weight_end", "learn", "gaussian_lr", "clamp_variances"},
    "unit": set(),
}
SOLVED_ONCE = ("fpi", "gradient", "data")
ESTIMATOR_DEFAULTS: dict[str, dict[str, Any]] = {"glem": {"kld_weight": 50.0, "learn": "both"}}


@dataclass(frozen=True)
class GaussianOptions(Options):
    """Class Gaussians."""

    estimator: Literal["fpi", "glem", "gradient", "data", "unit"] = option(
        "fpi",
        "how class Gaussians are found: fpi (fixed-point iteration), glem (expectation maximisation), gradient "
        "(gradient descent), data (class means and variances), unit (N(0, I), no classes)",
    )
    kld_weight: float = option(
        10.0,
        "weight λ' of the KL repulsion between class Gaussians; larger separates classes better and leaves less room "
        "to augment; glem starts from 50",
        at_least=0,
    )
    kld_alpha: float = option(10.0, "scale α of the repulsion, 0.1 to 10", above=0)
    kld_pi: Literal["pair", "mean"] = option(
        "pair", "normaliser π of the repulsion: the pair's own divergence (Eq. 9) or the mean of all (Eq. 10)"
    )
    learn: Literal["means", "variances", "both"] = option(
        "means", "parameters of the Gaussians to learn; glem learns both unless told otherwise"
    )
    variance: Literal["unit", "data"] | None = option(
        None, "initial variances (default: unit; data if variances are learned)"
    )
    isotropic: bool = option(False, "one variance per class instead of one per dimension")
    solve_at: int = option(
        500, "training step at which the Gaussians are solved for and frozen; at most half of the steps", at_least=0
    )
    posterior_weight: float = option(
        0.0,
        "weight of the classification term log p(y|x) added to the likelihood; improves accuracy, degrades samples",
        at_least=0,
        metavar="γ",
    )
    teacher: tuple[str, ...] | None = option(
        None,
        "classifiers whose soft labels the classification term learns: folders of finetune, or timm models; several "
        "alternate by step",
        metavar="CLASSIFIER",
    )
    lr_policy: Literal["sublinear", "linear", "superlinear"] = option("linear", "gradient: decay of its learning rate")
    gaussian_lr: float = option(0.1, "gradient and glem: learning rate", above=0)
    kld_weight_end: float | None = option(
        None, "glem: final weight of the repulsion (default: half of --kld-weight)", at_least=0
    )
    clamp_variances: bool = option(False, "glem: clamp the variances instead of reparametrising them")
    glem_start: Literal["zero", "random"] = option("zero", "glem: initial Gaussians")
    glem_fraction: float = option(0.1, "glem: fraction of the images reserved for the Gaussians", above=0, below=1)
    glem_steps: int = option(100, "glem: number of steps on the Gaussians", at_least=1)
    glem_every: int | None = option(
        None, "glem: flow steps between steps on the Gaussians (default: --glem-merge-at / --glem-steps)", at_least=1
    )
    glem_merge_at: int | None = option(
        None, "glem: step from which the flow trains on all images (default: half of --steps)", at_least=1
    )

    def check(self) -> None:
        """Refuse a classification term without classes, and teachers without it."""
        if self.posterior_weight and self.estimator == "unit":
            raise OptionError("posterior_weight", "--posterior-weight needs classes, which --estimator unit has not")
        if self.teacher and not self.posterior_weight:
            raise OptionError("teacher", "--teacher needs --posterior-weight, the weight of what the teacher teaches")

    @property
    def initial_variance(self) -> str:
        """Initial variances, "unit" or "data"."""
        return self.variance or ("unit" if self.learn == "means" else "data")

    @property
    def final_kld_weight(self) -> float:
        """Weight of the repulsion at the end of GLEM."""
        return self.kld_weight / 2 if self.kld_weight_end is None else self.kld_weight_end

    def solve_step(self, steps: int) -> int:
        """Return the step at which the Gaussians are solved for: in the first half of the ``steps`` of the flow."""
        return min(self.solve_at, steps // 2)

    def merge_step(self, steps: int) -> int:
        """Return the step from which the flow trains on all images under GLEM, of ``steps`` in all."""
        return min(self.glem_merge_at or max(1, steps // 2), steps)

    def glem_interval(self, steps: int) -> int:
        """Return the number of flow steps between steps on the Gaussians under GLEM, of ``steps`` in all."""
        return self.glem_every or max(1, self.merge_step(steps) // self.glem_steps)

    def uses(self, name: str) -> bool:
        """Return whether the estimator reads an option."""
        return name in USED_BY[self.estimator]


def check_estimator_options(estimator: str, given: set[str]) -> None:
    """Raise an OptionError for options that were given but that the estimator does not read."""
    idle = sorted(given & set().union(*USED_BY.values()) - USED_BY[estimator])
    if idle:
        names = ", ".join(map(option_name, idle))
        message = f"--estimator {estimator} does not use {names}; leave them out or choose another estimator"
        raise OptionError(idle[0], message)
