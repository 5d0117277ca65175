"""FlowMixupTransform: batches of images in, batches of images out, whatever their size, dtype or normalisation."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from flowaug.flows.checkpoint import load_flow, load_pca
from flowaug.flows.flow import Flow
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.checks import check_batch, check_class_names, check_pair
from flowaug.mixup.mixing import mix_keeping_labels, mix_latents
from flowaug.mixup.plan import MixPlan, MixPolicy, PlanSampler
from flowaug.pixels import quantise, resize

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, what PIL's convert("L") uses
SAFE_RANGE = (-0.5, 1.5)  # pixels a sane decode may reach before clamping
INPUT_TOLERANCE = 0.05


class FlowMixupTransform:
    """Mix each image with another of its class along the principal axes of the class in a flow's latent space.

    Labels are unchanged. The transform never edits its input and draws from a generator of its own. A sample that
    cannot be augmented (no partner, NaN, a decode out of range) comes back as it came, and is counted.

    Args:
        flow: a trained flow; the transform keeps its inference form, a copy (``Flow.freeze``).
        pca: its class axes.
        p: probability that a sample is augmented.
        alpha: the partner's share is drawn from Beta(alpha, alpha).
        partner: "bank" (any training image), "batch" (same label in the batch) or "gaussian" (a draw along the axes).
        rank: leading axes to move along, None for all fitted.
        per_axis: one weight per axis instead of one per sample.
        rescaled: keep the radius that linear mixing shrinks.
        redraws: draw partner and weights of a sample anew, up to so many times, while the class Gaussians find what
            they come to of another class; what never keeps its label is refused. 0 checks no labels.
        policy: per class name, any of ``p``, ``alpha``, ``rank``: a mapping or the path of a JSON file.
        mean: mean of the classifier's normalisation per channel; None when images are in [0, 1].
        std: standard deviation of the classifier's normalisation.
        luminance: let a grey flow move the luminance of RGB images.
        unknown: labels outside the flow's classes: "error", or "skip" to leave those samples alone.
        class_names: the data set's class names in label order; an error if the flow's differ.
        max_outside: refuse a decode with a larger share of pixels outside [−0.5, 1.5].
        batch_size: samples that go through the flow at a time.
        autocast: let the caller's autocast reach the flow; its latents then lose precision.
        seed: seed of the random choices.
        process_index: rank of this process, so that ranks draw differently.

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
        p: float = 0.5,
        alpha: float = 1.0,
        partner: str = "bank",
        rank: int | None = None,
        per_axis: bool = False,
        rescaled: bool = False,
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
        check_class_names(flow.class_names, class_names)
        check_pair(flow, pca)
        names = flow.class_names or (tuple(class_names) if class_names else None)
        table = MixPolicy(p, alpha, rank, _read_policy(policy), names, pca.num_classes, pca.rank)
        self.flow = flow.freeze()
        self.pca = pca
        self.sampler = PlanSampler(pca, table, partner, per_axis, rescaled, seed, process_index, redraws)
        self.mean, self.std = _channel_constants(mean, std)
        self.luminance, self.unknown = luminance, unknown
        self.max_outside, self.batch_size, self.autocast = max_outside, batch_size, autocast
        self._counts = torch.zeros(4, dtype=torch.int64)
        self._first = True
        self.to(flow.gaussians.mean.device)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: torch.device | str = "cpu", **keywords
    ) -> "FlowMixupTransform":
        """Load flow and axes by folder, bundled name, ``local-dir:`` or ``hf-hub:``; keywords as for the class."""
        return cls(load_flow(source, device), load_pca(source, device), **keywords)

    def to(self, device: torch.device | str) -> "FlowMixupTransform":
        """Move flow, axes and tables to a device, in place."""
        self.flow.to(device)
        self.pca.to(device)
        self.sampler.policy.to(device)
        self._counts, self.mean, self.std = (t.to(device) for t in (self._counts, self.mean, self.std))
        return self

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            x: images (B, C, H, W): uint8, or float in [0, 1] or normalised by ``mean`` and ``std``; any size.
            y: integer labels (B,).

        Returns:
            New images of the same shape, dtype and layout, and ``y`` itself.
        """
        self._check_values(x, y)
        return self.apply(x, y, self.plan(y)), y

    def reseed(self, *numbers: int) -> None:
        """Draw from now on by several numbers, for example (seed, rank, step): a resumed run then repeats a step."""
        self.sampler.reseed(*numbers)

    def plan(self, y: Tensor) -> MixPlan:
        """Draw the random choices for a batch with labels ``y`` (B,)."""
        return self.sampler(y)

    @torch.no_grad()
    def apply(self, x: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
        """Carry a plan out on images ``x`` (B, C, H, W) with labels ``y`` (B,); returns new images."""
        self._check_form(x, y)
        out = x.clone()
        known = y[plan.index].clamp(0, self.pca.num_classes - 1)
        with contextlib.nullcontext() if self.autocast else torch.autocast(x.device.type, enabled=False):
            if len(plan.index):
                out[plan.index] = self._augment(x[plan.index], known, plan)
            self._counts[0] += len(y)
        return out

    def pixels(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) as this transform takes them, back in [0, 1] float32."""
        return self._to_pixels(x).clamp(0, 1)

    def _augment(self, x: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
        pixels = self._to_pixels(x)
        sane = _fraction_outside(pixels) == 0
        small = self._to_flow(torch.where(sane[:, None, None, None], pixels, 0.0))
        decoded, kept = self._mix(small, y, plan)
        moving = (plan.weight != 0).any(1)
        fine = sane & kept & torch.isfinite(decoded).flatten(1).all(1)
        fine &= _fraction_outside(decoded) <= self.max_outside
        self._count(moving, fine, torch.ones_like(moving) if plan.chosen is None else plan.chosen)
        residual = enlarge(decoded - small, pixels.shape[2:])
        return torch.where((moving & fine)[:, None, None, None], self._from_pixels(pixels + residual, x), x)

    def _mix(self, small: Tensor, y: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
        """New images (M, C, H, W), and whether they kept their label, bool (M,)."""
        z = torch.cat([self.flow.encode(part)[0] for part in small.split(self.batch_size)]).float()
        if plan.redraws:
            mixed, kept = mix_keeping_labels(z, y, self.pca, plan, self.flow.gaussians)
        else:
            mixed, kept = self._move(z, y, plan), torch.ones_like(y, dtype=torch.bool)
        return torch.cat([self.flow.decode(part) for part in mixed.split(self.batch_size)]).float(), kept

    def _move(self, z: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
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
        return quantise(resize(pixels, self.flow.event_shape[1:]))

    def _count(self, moving: Tensor, fine: Tensor, chosen: Tensor) -> None:
        counts = torch.stack([(moving & fine).sum(), (moving & ~fine).sum(), (chosen & ~moving).sum()])
        self._counts[1:] += counts

    @property
    def counts(self) -> dict[str, int]:
        """Samples seen, augmented, refused (NaN, out of range, label lost), drawn without partner or known label."""
        seen, augmented, refused, idle = self._counts.tolist()
        return {"seen": seen, "augmented": augmented, "refused": refused, "no_partner": idle}

    def sum_counts(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Make `counts` those of all processes, over which ``reduce`` sums a tensor."""
        self._counts = reduce(self._counts)

    def state_dict(self) -> dict:
        """State of the generator and the counts, JSON-able; for ``accelerator.register_for_checkpointing``."""
        return {"rng": self.sampler.rng.bit_generator.state, "counts": self._counts.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Restore what ``state_dict`` returned."""
        self.sampler.rng.bit_generator.state = state["rng"]
        self._counts.copy_(torch.tensor(state["counts"]))

    def __repr__(self) -> str:
        """Architecture, classes and counts."""
        name = self.flow.config.get("architecture", "flow")
        counts = ", ".join(f"{k}={v}" for k, v in self.counts.items())
        sizes = f"K={self.pca.num_classes}, rank={self.pca.rank}"
        return f"FlowMixupTransform({name} {self.flow.event_shape}, {sizes}, {counts})"

    def _check_form(self, x: Tensor, y: Tensor) -> None:
        check_batch(x, y, self.pca.axes.device)
        channels, wanted = x.shape[1], self.flow.event_shape[0]
        if channels == wanted or (wanted == 1 and channels == 3 and self.luminance):
            return
        hint = "; pass luminance=True to move the luminance of RGB images" if (wanted, channels) == (1, 3) else ""
        raise ValueError(f"the images have {channels} channels but the flow was trained on {wanted}{hint}")

    def _check_values(self, x: Tensor, y: Tensor) -> None:
        self._check_form(x, y)
        if self._first or x.device.type == "cpu":  # elsewhere a look at values would make the host wait
            self._check_labels(y)
        if self._first and len(x):
            self._check_range(x)
        self._first = False

    def _check_labels(self, y: Tensor) -> None:
        num_classes = self.pca.num_classes
        if self.unknown == "error" and len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
            raise ValueError(
                f"labels run from {int(y.min())} to {int(y.max())} but the flow knows {num_classes} classes, 0 to "
                f"{num_classes - 1}; pass unknown='skip' to leave the others alone, or a flow trained on these classes"
            )

    def _check_range(self, x: Tensor) -> None:
        pixels = self._to_pixels(x)
        pixels = pixels[pixels.isfinite()]
        if len(pixels) and not -INPUT_TOLERANCE <= pixels.min() <= pixels.max() <= 1 + INPUT_TOLERANCE:
            raise ValueError(
                f"pixels run from {pixels.min():.3g} to {pixels.max():.3g} after undoing mean and std, not [0, 1]: "
                "pass the mean and std your images are normalised with, or images in [0, 1] or uint8"
            )


def enlarge(change: Tensor, size: Sequence[int]) -> Tensor:
    """A change of the flow's images (B, C, h, w), for images of another ``size`` (H, W); bicubic."""
    if tuple(change.shape[2:]) == tuple(size):
        return change
    return F.interpolate(change, tuple(size), mode="bicubic", align_corners=False)


def _read_policy(policy: Mapping | str | Path | None) -> Mapping | None:
    if not isinstance(policy, str | Path):
        return policy
    try:
        return json.loads(Path(policy).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the policy {policy} is not valid JSON ({error}); expected {{name: {{p: 0.5}}}}") from error


def _channel_constants(mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Tensor, Tensor]:
    if (mean is None) != (std is None):
        raise ValueError("pass both mean and std of the classifier's normalisation, or neither for images in [0, 1]")
    mean, std = torch.tensor(mean or [0.0]), torch.tensor(std or [1.0])
    if mean.ndim != 1 or mean.shape != std.shape or not (std > 0).all():
        raise ValueError(
            f"mean {mean.tolist()} and std {std.tolist()}: expected one number per channel each, std positive"
        )
    return mean[:, None, None].float(), std[:, None, None].float()


def _fraction_outside(x: Tensor) -> Tensor:
    inside = (x >= SAFE_RANGE[0]) & (x <= SAFE_RANGE[1])
    return 1 - inside.flatten(1).float().mean(1)
