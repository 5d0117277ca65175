"""``FlowMixupTransform``: flow mixup of batches of images of any size, dtype and normalisation."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from flowaug.flows.checkpoint import find_flow, load_flow, load_pca, read_config
from flowaug.flows.flow import Flow
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.checks import (
    channel_constants,
    check_batch,
    check_class_names,
    check_labels,
    check_numbers,
    check_pair,
    check_range,
)
from flowaug.mixup.mixing import mix_keeping_labels, mix_latents
from flowaug.mixup.plan import MixPlan, MixPolicy, PlanSampler, read_policy
from flowaug.mixup.settings import MIXUP_DEFAULTS, has_few_images
from flowaug.pixels import enlarge, quantise, resize

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in PIL's convert("L")
MAX_WORKERS = 64  # of a data loader, that are counted apart
SAFE_RANGE = (-0.5, 1.5)  # decoded pixels beyond this range indicate a failed decode


class FlowMixupTransform:
    """Mix each image with another of its class, along the principal components of the class in a flow's latent space.

    Labels do not change. The input is not modified, and random choices come from the transform's own generator. A
    sample that cannot be augmented is rejected (NaN, decoded out of range, label lost): left unchanged and counted.

    Reference: Enescu & Sahbi, "Learning Conditionally Untangled Latent Spaces using Fixed Point Iteration", BMVC 2024.

    Args:
        flow: a trained flow. The transform keeps an inference copy (``Flow.freeze``).
        pca: principal components of the flow's classes.
        p: probability that a sample is augmented.
        alpha: the weight of the partner is drawn from Beta(alpha, alpha).
        partner: "bank" (any training image), "batch" (same label in the batch) or "gaussian" (a draw from the class
            Gaussian in the principal components).
        rank: number of leading principal components to mix; None for all.
        per_axis: whether to draw one weight per principal component instead of one per sample; None chooses by the
            number of training images per class.
        rescaled: preserve the class variance, which linear mixing shrinks.
        redraws: number of times to resample partner and weight when the mixed latent is classified as another class;
            samples that still fail are rejected. 0 disables the check.
        policy: overrides of ``p``, ``alpha`` and ``rank`` by class name: a mapping, or the path of a JSON file.
        mean: mean of the classifier's normalisation per channel; None for images in [0, 1].
        std: standard deviation of the classifier's normalisation per channel.
        luminance: apply a greyscale flow to the luminance of RGB images.
        unknown: what to do with labels that the flow does not have: "error", or "skip" to leave the samples unchanged.
        class_names: class names of the data set in label order, to be compared with those of the flow.
        max_outside: reject a decoded image if a larger fraction of its pixels is outside [−0.5, 1.5].
        batch_size: number of samples per pass through the flow.
        autocast: let the caller's autocast apply to the flow; this reduces the precision of the latents.
        seed: seed of the random choices.
        process_index: index of this process, so that processes draw different choices.

    Raises:
        ValueError: if an argument is out of range, or flow, ``pca`` and ``class_names`` do not match.

    Example:
        >>> from flowaug import FlowMixupTransform
        >>> transform = FlowMixupTransform.from_pretrained("digits", p=1.0)
        >>> x, y = torch.zeros(2, 1, 8, 8), torch.tensor([3, 7])
        >>> transform(x, y)[0].shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        flow: Flow,
        pca: ClasswisePCA,
        *,
        p: float = MIXUP_DEFAULTS["p"],
        alpha: float = MIXUP_DEFAULTS["alpha"],
        partner: str = "bank",
        rank: int | None = None,
        per_axis: bool | None = MIXUP_DEFAULTS["per_axis"],
        rescaled: bool = MIXUP_DEFAULTS["rescaled"],
        redraws: int = 0,
        policy: Mapping[str, Mapping[str, float]] | str | Path | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        luminance: bool = False,
        unknown: str = "error",
        class_names: Sequence[str] | None = None,
        max_outside: float = 0.01,
        batch_size: int = 256,
        autocast: bool = False,
        seed: int = 0,
        process_index: int = 0,
    ):
        if unknown not in ("error", "skip"):
            raise ValueError(f"unknown is {unknown!r}; expected 'error' or 'skip'")
        check_numbers(batch_size, redraws, seed, process_index, max_outside)
        check_class_names(flow.class_names, class_names)
        check_pair(flow, pca)
        names = flow.class_names or (tuple(class_names) if class_names else None)
        class_policy = MixPolicy(p, alpha, rank, read_policy(policy), names, pca.num_classes, pca.rank)
        if per_axis is None:
            per_axis = has_few_images(len(pca.coords), pca.num_classes)

        self.settings = {"p": p, "alpha": alpha, "partner": partner, "rank": rank}
        self.settings |= {"per_axis": per_axis, "rescaled": rescaled, "redraws": redraws}
        self.flow = flow.freeze()
        self.pca = pca.view()  # the caller's stays on its device
        self.sampler = PlanSampler(self.pca, class_policy, partner, per_axis, rescaled, seed, process_index, redraws)
        self.mean, self.std = channel_constants(mean, std)
        self.luminance, self.unknown = luminance, unknown
        self.max_outside, self.batch_size, self.autocast = max_outside, batch_size, autocast
        with torch.inference_mode(False):  # or the counts could not be updated in place outside of inference mode
            self._counts = torch.zeros(1 + MAX_WORKERS, 4, dtype=torch.int64).share_memory_()
        self._first_call = True
        self.to(flow.gaussians.mean.device)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: torch.device | str = "cpu", **keywords
    ) -> "FlowMixupTransform":
        """Load a flow with its principal components and its own mixup settings.

        Args:
            source: folder, bundled name, ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME[@REVISION]``.
            device: device of the transform.
            **keywords: arguments of the class. They default to the settings stored with the flow.

        Raises:
            FileNotFoundError: if the flow or one of its files does not exist.
            ValueError: if the checkpoint is damaged or an argument is out of range.
        """
        folder = find_flow(source)
        settings = read_config(folder).get("mixup", {})
        return cls(load_flow(folder, device), load_pca(folder, device), **{**settings, **keywords})

    def to(self, device: torch.device | str) -> "FlowMixupTransform":
        """Move the transform to a device, in place."""
        self.flow.to(device)
        self.pca.to(device)
        self.sampler.policy.to(device)
        self._counts, self.mean, self.std = (t.to(device) for t in (self._counts, self.mean, self.std))
        return self

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            x: images (B, C, H, W) of any size: uint8, float in [0, 1], or normalised by ``mean`` and ``std``.
            y: integer labels (B,).

        Returns:
            New images of the same shape, dtype and memory layout, and ``y`` itself.

        Raises:
            ValueError: if a shape, the number of channels, a label, the range of the pixels or a device does not match.
            TypeError: if the images are neither floating point nor uint8.
        """
        self._check_values(x, y)
        return self.apply(x, y, self.plan(y)), y

    def reseed(self, *numbers: int) -> None:
        """Reset the generator, for example to ``(seed, process_index, step)`` so that a resumed run repeats a step."""
        self.sampler.reseed(*numbers)

    def plan(self, y: Tensor) -> MixPlan:
        """Draw the random choices for a batch with labels ``y`` (B,)."""
        return self.sampler(y.long())

    @torch.no_grad()
    def apply(self, x: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
        """Apply a plan to images ``x`` (B, C, H, W) with labels ``y`` (B,) and return new images."""
        self._check_form(x, y)
        out = x.clone()
        known = y[plan.index].long().clamp(0, self.pca.num_classes - 1)
        with contextlib.nullcontext() if self.autocast else torch.autocast(x.device.type, enabled=False):
            if len(plan.index):
                out[plan.index] = self._augment(x[plan.index], known, plan)
            self._row[0] += len(y)
        return out

    def pixels(self, x: Tensor) -> Tensor:
        """Convert images (B, C, H, W) in the format that the transform accepts to float32 in [0, 1]."""
        return self._to_pixels(x).clamp(0, 1)

    def _augment(self, x: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
        pixels = self._to_pixels(x)
        valid_input = _fraction_outside(pixels) == 0
        small = self._to_flow(torch.where(valid_input[:, None, None, None], pixels, 0.0))
        decoded, kept = self._mix(small, y, plan)

        mixed = (plan.weight != 0).any(1)
        accepted = valid_input & kept & torch.isfinite(decoded).flatten(1).all(1)
        accepted &= _fraction_outside(decoded) <= self.max_outside
        self._count(mixed, accepted, torch.ones_like(mixed) if plan.chosen is None else plan.chosen)

        # Adding the change at full resolution preserves the detail that the flow does not see.
        change = enlarge(decoded - small, pixels.shape[2:])
        return torch.where((mixed & accepted)[:, None, None, None], self._from_pixels(pixels + change, x), x)

    def _mix(self, small: Tensor, y: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
        """Mix images at the flow's size; the second result (M,) tells which samples kept their label."""
        z = torch.cat([self.flow.encode(part)[0] for part in small.split(self.batch_size)]).float()
        if plan.redraws:
            mixed, kept = mix_keeping_labels(z, y, self.pca, plan, self.flow.gaussians)
        else:
            mixed, kept = self._move(z, y, plan), torch.ones_like(y, dtype=torch.bool)
        return torch.cat([self.flow.decode(part) for part in mixed.split(self.batch_size)]).float(), kept

    def _move(self, z: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
        """Mix latents; subclasses can replace this step."""
        return mix_latents(z, y, self.pca, plan)

    def _to_pixels(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            return x.float() / 255
        return x.float() * self.std + self.mean

    def _from_pixels(self, pixels: Tensor, like: Tensor) -> Tensor:
        pixels = pixels.clamp(0, 1)
        if like.dtype == torch.uint8:
            return (pixels * 255).round().to(torch.uint8)
        return ((pixels - self.mean) / self.std).to(like.dtype)

    def _to_flow(self, pixels: Tensor) -> Tensor:
        if self.flow.event_shape[0] == 1 and pixels.shape[1] == 3:
            pixels = (pixels * pixels.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        return quantise(resize(pixels, self.flow.image_size))

    def _count(self, mixed: Tensor, accepted: Tensor, chosen: Tensor) -> None:
        self._row[1:] += torch.stack([(mixed & accepted).sum(), (mixed & ~accepted).sum(), (chosen & ~mixed).sum()])

    @property
    def _row(self) -> Tensor:
        """The counts of this process: a data loader's worker has a row of its own, in shared memory."""
        worker = get_worker_info()
        return self._counts[0 if worker is None else 1 + worker.id % MAX_WORKERS]

    @property
    def counts(self) -> dict[str, int]:
        """Number of samples so far, by outcome.

        ``seen``: all samples. ``augmented``: mixed. ``rejected``: NaN, decoded out of range or label lost: left
        unchanged. ``no_partner``: selected, but without a partner or with an unknown label: left unchanged.
        """
        return dict(zip(("seen", "augmented", "rejected", "no_partner"), self._counts.sum(0).tolist(), strict=True))

    def sum_counts(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Sum ``counts`` over all processes with ``reduce``, which sums a tensor over them."""
        self._counts = reduce(self._counts)

    def state_dict(self) -> dict:
        """Return the generator state and the counts, as JSON types; see ``Accelerator.register_for_checkpointing``."""
        return {"rng": self.sampler.rng.bit_generator.state, "counts": self._counts.sum(0).tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Restore a state returned by ``state_dict``."""
        self.sampler.rng.bit_generator.state = state["rng"]
        self._counts.zero_()[0].copy_(torch.tensor(state["counts"]))

    def __repr__(self) -> str:
        """Return a summary with architecture, number of classes and counts."""
        name = self.flow.config.get("architecture", "flow")
        counts = ", ".join(f"{k}={v}" for k, v in self.counts.items())
        sizes = f"K={self.pca.num_classes}, rank={self.pca.rank}"
        return f"FlowMixupTransform({name} {self.flow.event_shape}, {sizes}, {counts})"

    def _check_form(self, x: Tensor, y: Tensor) -> None:
        check_batch(x, y, self.pca.axes.device, len(self.mean))
        channels, expected = x.shape[1], self.flow.event_shape[0]
        if channels == expected or (expected == 1 and channels == 3 and self.luminance):
            return
        hint = "; pass luminance=True to augment the luminance of RGB images" if (expected, channels) == (1, 3) else ""
        raise ValueError(f"the images have {channels} channels but the flow was trained on {expected}{hint}")

    def _check_values(self, x: Tensor, y: Tensor) -> None:
        self._check_form(x, y)
        # Reading values synchronizes a GPU, so check the labels of the first batch only there.
        if self.unknown == "error" and (self._first_call or x.device.type == "cpu"):
            check_labels(y, self.pca.num_classes)
        if self._first_call and len(x):
            check_range(self._to_pixels(x))
        self._first_call = False


def _fraction_outside(x: Tensor) -> Tensor:
    """Return the fraction of pixels of each image that are NaN or outside ``SAFE_RANGE``."""
    inside = (x >= SAFE_RANGE[0]) & (x <= SAFE_RANGE[1])
    return 1 - inside.flatten(1).float().mean(1)
