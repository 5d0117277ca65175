"""Random choices of same-label mixup: the plan of a batch, the settings of each class, and the sampler."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from flowaug.latents.pca import ClasswisePCA

PARTNERS = ("bank", "batch", "gaussian")


@dataclass(frozen=True)
class MixPlan:
    """Random choices for one batch. Applying the same plan again repeats an augmentation exactly.

    M of the B samples are mixed. A sample whose weights are all 0 is left unchanged.

    Attributes:
        index: indices in the batch of the M samples to mix, (M,) int64.
        weight: weight of the *partner* along each of the leading r principal components, (M, r); 0 keeps the image.
        partner: index of the partner, (M,) int64: a row of ``pca.coords`` ("bank") or of these M samples ("batch").
        noise: standard normal draws (M, r) of the partner coordinates ("gaussian"); otherwise None.
        source: where partners come from: "bank", "batch" or "gaussian".
        rescaled: whether to divide the mixed coordinates by ``√((1−w)² + w²)``, which preserves the class variance.
        chosen: whether each sample was selected for augmentation, (M,) bool; None means all of them.
        redraws: alternative draws for the same M samples, to be tried in order if the mixed latent loses its label.

    Example:
        >>> # mix sample 0 of a batch with row 5 of ``pca.coords``: weight 0.3 along three principal components
        >>> plan = MixPlan(index=torch.tensor([0]), weight=torch.full((1, 3), 0.3), partner=torch.tensor([5]))
        >>> plan.source, plan.rescaled
        ('bank', False)
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
    """Mixing settings of each class, as tensors (K,) that can be indexed by label.

    Args:
        p: probability that a sample is mixed.
        alpha: weights are drawn from Beta(alpha, alpha).
        rank: number of leading principal components to mix; None for all.
        per_class: overrides by class name, for example ``{"cat": {"p": 0.2, "alpha": 0.5, "rank": 16}}``.
        class_names: names in label order; required with ``per_class``.
        num_classes: number of classes K.
        max_rank: number of principal components that were fitted.

    Raises:
        ValueError: if a setting is out of range, or an override has an unknown class or key.
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
            rows[self._label(name, class_names)].update(self._check_keys(name, override))
        for row in [defaults, *rows]:
            self._check_values(row, max_rank)

        self.alphas = sorted({float(row["alpha"]) for row in rows})
        self.max_p = max(row["p"] for row in rows)
        self.max_rank = max(int(row["rank"]) for row in rows)

        self.p = torch.tensor([float(row["p"]) for row in rows])
        self.alpha_index = torch.tensor([self.alphas.index(row["alpha"]) for row in rows])
        self.rank = torch.tensor([int(row["rank"]) for row in rows])

    def to(self, device: torch.device | str) -> "MixPolicy":
        """Move the tensors to a device, in place."""
        self.p, self.alpha_index, self.rank = (t.to(device) for t in (self.p, self.alpha_index, self.rank))
        return self

    def always(self) -> "MixPolicy":
        """Return a copy of the policy that mixes every sample (``p = 1``)."""
        other = copy.copy(self)
        other.p, other.max_p = torch.ones_like(self.p), 1.0
        return other

    @staticmethod
    def _label(name: str, class_names: tuple[str, ...] | None) -> int:
        if not class_names or name not in class_names:
            raise ValueError(f"the policy names a class {name!r}; expected one of the flow's classes {class_names}")
        return class_names.index(name)

    @classmethod
    def _check_keys(cls, name: str, override: Mapping[str, float]) -> Mapping[str, float]:
        if not isinstance(override, Mapping) or not set(override) <= set(cls.KEYS):
            raise ValueError(
                f"the policy of class {name!r} is {override!r}; expected a mapping with keys among {cls.KEYS}"
            )
        return override

    @staticmethod
    def _check_values(row: Mapping[str, float], max_rank: int) -> None:
        p, alpha, rank = row["p"], row["alpha"], row["rank"]
        for name, value in row.items():
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; expected a number")
        if not 0 <= p <= 1:
            raise ValueError(f"p is {p}; expected a probability from 0 to 1")
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha is {alpha}; expected a positive number, the parameter of Beta(alpha, alpha)")
        if not isinstance(rank, Integral) or not 1 <= rank <= max_rank:
            raise ValueError(
                f"rank is {rank}; expected an integer from 1 to {max_rank}, the number of principal components fitted"
            )


class PlanSampler:
    """Sampler of mix plans with its own random generator.

    It draws on the host and never reads from the device, so it does not synchronize a GPU.

    Args:
        pca: principal components of the classes, with the coordinates of possible partners.
        policy: mixing settings of each class.
        partner: where partners come from: "bank", "batch" or "gaussian".
        per_axis: whether to draw one weight per principal component instead of one per sample.
        rescaled: whether mixing preserves the class variance.
        seed: seed of the generator, combined with ``process_index``.
        process_index: index of this process.
        redraws: number of alternative draws for each sample.

    Raises:
        ValueError: if ``partner`` is unknown or ``redraws`` is negative.
    """

    def __init__(
        self,
        pca: ClasswisePCA,
        policy: MixPolicy,
        partner: str,
        per_axis: bool,
        rescaled: bool,
        seed: int,
        process_index: int,
        redraws: int = 0,
    ):
        if partner not in PARTNERS:
            raise ValueError(f"partner is {partner!r}; expected one of {PARTNERS}")
        if redraws < 0:
            raise ValueError(f"redraws is {redraws}; expected 0 (labels are not checked) or more")
        self.pca, self.policy, self.partner = pca, policy, partner
        self.per_axis, self.rescaled, self.redraws = per_axis, rescaled, redraws
        self.reseed(seed, process_index)

    def reseed(self, *numbers: int) -> None:
        """Reset the generator, for example to ``(seed, process_index, step)``."""
        self.numbers, self.worker_seed = numbers, _worker_seed()
        self.rng = np.random.default_rng(numbers)

    def _follow_worker(self) -> None:
        """Reset the generator in a new worker of a data loader, which starts with a copy of the main process's.

        The seed of a worker differs between workers and epochs and follows from the loader's generator.
        """
        if (seed := _worker_seed()) not in (None, self.worker_seed):
            self.worker_seed, self.rng = seed, np.random.default_rng((*self.numbers, seed))

    def __call__(self, y: Tensor) -> MixPlan:
        """Draw the plan of a batch with labels ``y`` (B,). Labels outside 0 … K − 1 get weight 0."""
        self._follow_worker()
        known = (y >= 0) & (y < self.pca.num_classes)
        u = torch.from_numpy(self.rng.random(len(y), dtype=np.float32))

        # Preselect on the host by the largest p. A sample in the batch can be a partner even if it is not selected.
        everyone = torch.arange(len(y))
        index = everyone if self.partner == "batch" else everyone[u < self.policy.max_p]
        index, u = index.to(y.device), u[index].to(y.device)

        y, known = y[index].clamp(0, self.pca.num_classes - 1), known[index]
        chosen = u < self.policy.p[y]
        first, *others = (self._draw(index, y, known, chosen) for _ in range(1 + self.redraws))
        return replace(first, redraws=tuple(others))

    def _draw(self, index: Tensor, y: Tensor, known: Tensor, chosen: Tensor) -> MixPlan:
        partner, found = self._partners(y)
        weight = self._weights(y) * (chosen & known & found)[:, None]
        return MixPlan(index, weight, partner, self._noise(y), self.partner, self.rescaled, chosen)

    def _uniform(self, *shape: int, device: torch.device) -> Tensor:
        return torch.from_numpy(self.rng.random(shape)).to(device)

    def _partners(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a partner for each sample; the second result tells which samples have one."""
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
        """Draw the weights (M, r); 0 beyond the rank of the class."""
        num_axes = self.policy.max_rank
        shape = (len(self.policy.alphas), len(y), num_axes if self.per_axis else 1)
        alphas = np.reshape(self.policy.alphas, (-1, 1, 1))

        # One set of weights for each value of alpha, since the labels that select one are on the device.
        draws = torch.from_numpy(self.rng.beta(alphas, alphas, shape)).float().to(y.device)
        weight = draws[self.policy.alpha_index[y], torch.arange(len(y), device=y.device)]
        within_rank = torch.arange(num_axes, device=y.device) < self.policy.rank[y, None]
        return weight * within_rank

    def _noise(self, y: Tensor) -> Tensor | None:
        if self.partner != "gaussian":
            return None
        draws = self.rng.standard_normal((len(y), self.policy.max_rank), dtype=np.float32)
        return torch.from_numpy(draws).to(y.device)


def _worker_seed() -> int | None:
    """Return the seed of the data loader's worker that this process is, or None."""
    worker = get_worker_info()
    return None if worker is None else worker.seed


def read_policy(policy: Mapping | str | Path | None) -> Mapping | None:
    """Return the overrides of a policy, read from a JSON file if ``policy`` is a path.

    Raises:
        ValueError: if the policy is no mapping, or the file is not valid JSON.
    """
    content = policy
    if isinstance(policy, str | Path):
        try:
            content = json.loads(Path(policy).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"the policy {policy} is not valid JSON ({error}); expected {{class name: {{p: 0.5}}}}"
            ) from error
    if content is not None and not isinstance(content, Mapping):
        raise ValueError(f"the policy {policy!r} is no mapping; expected {{class name: {{p: 0.5}}}}")
    return content
