"""Rivals of flow mixup: only what they move an image towards, and in which space, differs from it.

Each has the interface of ``FlowMixupTransform``, moves the same share of the samples and stands behind the same guard,
so that a comparison is one of directions. A sample of weight 0 comes back as it came.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowaug import FlowMixupTransform, MixPlan
from flowaug.data import ImageDataset, stack_images
from flowaug.evaluation.sampling import encode
from flowaug.flows.checkpoint import load_flow, load_pca


class LatentMixup(FlowMixupTransform):
    """Same-label mixup of whole latents, ``z + w (z_j − z)``: full rank and a scalar weight.

    Args:
        flow: a trained flow.
        pca: class axes, of which the numbers of images per class are used.
        bank: the images that ``pca`` was fitted to, uint8 (N, C, H, W), class by class.
        **keywords: as for ``FlowMixupTransform``.
    """

    def __init__(self, flow, pca, bank: Tensor, **keywords):
        super().__init__(flow, pca, **keywords)
        if len(bank) != len(pca.coords):
            raise ValueError(f"{len(bank)} images but the class axes know {len(pca.coords)}; pass those they came from")
        self.bank = self.points(bank.to(pca.axes.device))

    def points(self, bank: Tensor) -> Tensor:
        """What partners are looked up in: latents (N, D)."""
        return encode(self.flow, bank)

    def _move(self, z: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
        return torch.lerp(z, self.bank[plan.partner], plan.weight[:, :1])


class PixelMixup(LatentMixup):
    """Same-label mixup of pixels: ``x + w (x_j − x)`` with a training image of the class (as SamplePairing).

    The flow gives size and classes; its couplings are not run.
    """

    def points(self, bank: Tensor) -> Tensor:
        """What partners are looked up in: images (N, C, H, W) in [0, 1]."""
        return bank.float() / 255

    def _mix(self, small: Tensor, y: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
        return torch.lerp(small, self.bank[plan.partner], plan.weight[:, :1, None, None]), torch.ones_like(y).bool()


class LatentNoise(FlowMixupTransform):
    r"""Gaussian noise on the latents, :math:`z + s \sqrt{\Sigma_y} \varepsilon` (as Yüksel et al., ICCV 2021).

    Args:
        flow: a trained flow.
        pca: its class axes.
        strength: s, times the standard deviations of the class Gaussian.
        **keywords: as for ``FlowMixupTransform``; ``alpha`` has no say, the strength is one for all.
    """

    def __init__(self, flow, pca, strength: float, **keywords):
        super().__init__(flow, pca, **keywords)
        self.strength = strength

    def plan(self, y: Tensor) -> MixPlan:
        """Draw who takes part, all at weight 1, and the noise of each, (M, D)."""
        plan = super().plan(y)
        noise = self.sampler.rng.standard_normal((len(plan.index), self.flow.dim), dtype=np.float32)
        moving = (plan.weight != 0).any(1, keepdim=True).float()
        return replace(plan, weight=moving, noise=torch.from_numpy(noise).to(y.device))

    def _move(self, z: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
        return z + plan.weight * self.strength * self.flow.gaussians.variance[y].sqrt() * plan.noise


class ClassDraw(LatentNoise):
    """A draw from the class Gaussian in place of the image; ``strength`` is the temperature."""

    def _move(self, z: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
        drawn = self.flow.gaussians.mean[y] + (self.strength * self.flow.gaussians.variance[y]).sqrt() * plan.noise
        return torch.lerp(z, drawn, plan.weight)


WITH_BANK = {"pixel": PixelMixup, "latent": LatentMixup}
WITH_STRENGTH = {"noise": LatentNoise, "gaussian": ClassDraw}


def grouped(dataset: ImageDataset, size: tuple[int, int], channels: int) -> Tensor:
    """All images, uint8 (N, C, H, W), class by class in their order: as ``fit_pca`` goes through them."""
    order = torch.as_tensor(dataset.targets).argsort(stable=True)
    return stack_images(dataset, size, channels)[order]


def create_augmentation(kind: str, source: str | Path, train: ImageDataset, **keywords) -> FlowMixupTransform:
    """Build flow mixup or a rival of it.

    Args:
        kind: "flow", "pixel", "latent", "noise", "gaussian" or "axes" (as "flow", given other keywords).
        source: the trained flow.
        train: the images that the flow was trained on.
        **keywords: of the transform.

    Raises:
        ValueError: unknown kind, or other images than the flow's in number.
    """
    known = {"flow": FlowMixupTransform, **WITH_BANK, **WITH_STRENGTH, "axes": FlowMixupTransform}
    if kind not in known:
        raise ValueError(f"no augmentation {kind!r}; expected one of {', '.join(known)}")
    flow, pca = load_flow(source), load_pca(source)
    if kind in WITH_BANK:
        keywords["bank"] = grouped(train, flow.event_shape[1:], flow.event_shape[0])
    return known[kind](flow, pca, class_names=train.class_names, **keywords)
