"""Same-label mixup along the principal axes of a class: drawing a plan, and carrying it out."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowaug.latents.pca import ClasswisePCA

PARTNERS = ("bank", "batch", "gaussian")


@dataclass(frozen=True)
class MixPlan:
    """The random choices for one batch; with them an augmentation can be repeated exactly.

    M of the B samples take part. A sample whose weights are all 0 comes back as it was.

    Attributes:
        index: positions in the batch of the M samples that take part, (M,) int64.
        weight: share of the *partner* along each of the leading r axes, (M, r).
        partner: (M,) int64, rows of the table ``pca.coords`` ("bank") or of these M samples ("batch").
        noise: (M, r) standard normal draws ("gaussian"), else None.
        source: "bank", "batch" or "gaussian".
        rescaled: divide the mixed coordinates by ``√((1−w)² + w²)``, which keeps the radius that linear mixing shrinks.
        chosen: (M,) bool, samples that were drawn to take part; all of them when None.
        redraws: further choices for the same M samples, for those whose label the ones before would lose.
    """

    index: Tensor
    weight: Tensor
    partner: Tensor
    noise: Tensor | None = None
    source: str = "bank"
    rescaled: bool = False
    chosen: Tensor | None = None
    redraws: tuple["MixPlan", ...] = ()


class MixPolicy:
    """How often and how far the samples of each class are moved, as tables on the device of the labels.

    Args:
        p: probability that a sample takes part.
        alpha: weights are drawn from Beta(alpha, alpha).
        rank: number of leading axes along which samples move.
        per_class: overrides by class name, for example ``{"cat": {"p": 0.2, "alpha": 0.5, "rank": 16}}``.
        class_names: names in label order; needed with ``per_class``.
        num_classes: number of classes K.
        max_rank: axes that were fitted.
    """

    KEYS = ("p", "alpha", "rank")

    def __init__(
        self,
        p: float,
        alpha: float,
        rank: int | None,
        per_class: Mapping[str, Mapping[str, float]] | None,
        class_names: tuple[str, ...] | None,
        num_classes: int,
        max_rank: int,
    ):
        defaults = {"p": p, "alpha": alpha, "rank": max_rank if rank is None else rank}
        rows = [dict(defaults) for _ in range(num_classes)]
        for name, override in (per_class or {}).items():
            rows[self._label(name, class_names)].update(self._known(name, override))
        for row in [defaults, *rows]:
            self._check(row, max_rank)
        self.alphas = sorted({float(row["alpha"]) for row in rows})
        self.max_p = max(row["p"] for row in rows)
        self.max_rank = max(row["rank"] for row in rows)
        self.p = torch.tensor([float(row["p"]) for row in rows])
        self.alpha_index = torch.tensor([self.alphas.index(row["alpha"]) for row in rows])
        self.rank = torch.tensor([row["rank"] for row in rows])

    def to(self, device: torch.device | str) -> "MixPolicy":
        """Move the tables to a device, in place."""
        self.p, self.alpha_index, self.rank = (t.to(device) for t in (self.p, self.alpha_index, self.rank))
        return self

    def always(self) -> "MixPolicy":
        """The same policy, but every sample takes part."""
        other = copy.copy(self)
        other.p, other.max_p = torch.ones_like(self.p), 1.0
        return other

    @staticmethod
    def _label(name: str, class_names: tuple[str, ...] | None) -> int:
        if not class_names or name not in class_names:
            raise ValueError(f"the policy names a class {name!r}; the flow's classes are {class_names}")
        return class_names.index(name)

    @classmethod
    def _known(cls, name: str, override: Mapping[str, float]) -> Mapping[str, float]:
        if not isinstance(override, Mapping) or not set(override) <= set(cls.KEYS):
            raise ValueError(
                f"the policy of class {name!r} is {override!r}; expected a mapping with keys among {cls.KEYS}"
            )
        return override

    @staticmethod
    def _check(row: Mapping[str, float], max_rank: int) -> None:
        p, alpha, rank = row["p"], row["alpha"], row["rank"]
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; expected a probability from 0 to 1")
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha is {alpha}; expected a positive number, the parameter of Beta(alpha, alpha)")
        if not isinstance(rank, int) or not 1 <= rank <= max_rank:
            raise ValueError(f"rank is {rank}; expected an integer from 1 to the {max_rank} axes fitted per class")


class PlanSampler:
    """Draws mix plans from a generator of its own, on the host: nothing is read back from the device.

    Args:
        pca: the class axes and the table of partners.
        policy: how often and how far.
        partner: "bank", "batch" or "gaussian".
        per_axis: one weight per axis instead of one per sample.
        rescaled: keep the radius that linear mixing shrinks.
        seed: seed of the generator, combined with ``rank``.
        rank: number of this process.
        redraws: further choices for each sample.
    """

    def __init__(
        self,
        pca: ClasswisePCA,
        policy: MixPolicy,
        partner: str,
        per_axis: bool,
        rescaled: bool,
        seed: int,
        rank: int,
        redraws: int = 0,
    ):
        if partner not in PARTNERS:
            raise ValueError(f"partner is {partner!r}; expected one of {PARTNERS}")
        if redraws < 0:
            raise ValueError(f"redraws is {redraws}; expected 0 (labels are not checked) or more")
        self.pca, self.policy, self.partner = pca, policy, partner
        self.per_axis, self.rescaled, self.redraws = per_axis, rescaled, redraws
        self.reseed(seed, rank)

    def reseed(self, *numbers: int) -> None:
        """Start the generator anew from several numbers, for example seed, rank and step."""
        self.rng = np.random.default_rng(numbers)

    def __call__(self, y: Tensor) -> MixPlan:
        """Draw the plan of a batch with labels ``y`` (B,); labels outside 0 … K − 1 get weight 0."""
        known = (y >= 0) & (y < self.pca.num_classes)
        coin = torch.from_numpy(self.rng.random(len(y), dtype=np.float32))
        everyone = torch.arange(len(y))
        index = everyone if self.partner == "batch" else everyone[coin < self.policy.max_p]
        index, coin = index.to(y.device), coin[index].to(y.device)
        y, known = y[index].clamp(0, self.pca.num_classes - 1), known[index]
        chosen = coin < self.policy.p[y]
        first, *others = (self._choice(index, y, known, chosen) for _ in range(1 + self.redraws))
        return replace(first, redraws=tuple(others))

    def _choice(self, index: Tensor, y: Tensor, known: Tensor, chosen: Tensor) -> MixPlan:
        partner, found = self._partners(y)
        weight = self._weights(y) * (chosen & known & found)[:, None]
        return MixPlan(index, weight, partner, self._noise(y), self.partner, self.rescaled, chosen)

    def _uniform(self, *shape: int, device: torch.device) -> Tensor:
        return torch.from_numpy(self.rng.random(shape)).to(device)

    def _partners(self, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.partner == "bank":
            count, u = self.pca.count[y], self._uniform(len(y), device=y.device)
            return self.pca.offsets[y] + torch.minimum((u * count).long(), count - 1), count > 1
        if self.partner == "gaussian":
            return torch.zeros_like(y), self.pca.count[y] > 1
        same = y[:, None] == y
        same.fill_diagonal_(False)
        score = self._uniform(len(y), len(y), device=y.device).masked_fill(~same, -1)
        return (score.argmax(1), same.any(1)) if len(y) else (y, same.any(1))

    def _weights(self, y: Tensor) -> Tensor:
        axes = self.policy.max_rank
        shape = (len(self.policy.alphas), len(y), axes if self.per_axis else 1)
        alphas = np.reshape(self.policy.alphas, (-1, 1, 1))
        draws = torch.from_numpy(self.rng.beta(alphas, alphas, shape)).float().to(y.device)
        weight = draws[self.policy.alpha_index[y], torch.arange(len(y), device=y.device)]
        allowed = torch.arange(axes, device=y.device) < self.policy.rank[y, None]
        return weight * allowed

    def _noise(self, y: Tensor) -> Tensor | None:
        if self.partner != "gaussian":
            return None
        draws = self.rng.standard_normal((len(y), self.policy.max_rank), dtype=np.float32)
        return torch.from_numpy(draws).to(y.device)
