"""Rivals of flow mixup: augmentations in other directions or in another space.

Each has the interface of ``FlowMixupTransform``, augments the same fraction of the images and rejects images by the
same rules, so that comparisons measure the effect of the direction only. Images with weight 0 are left unchanged.
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
    """Same-label mixup of whole latents, ``z + w (z_j − z)``, with one weight per image.

    Args:
        flow: a trained flow.
        pca: class principal components of the flow; only the numbers of images per class are used.
        bank: the training images that ``pca`` was fitted to, uint8 (N, C, H, W), sorted by class.
        **keywords: arguments of ``FlowMixupTransform``.

    Raises:
        ValueError: ``bank`` and ``pca`` have different numbers of images.
    """

    def __init__(self, flow, pca, bank: Tensor, **keywords):
        super().__init__(flow, pca, **keywords)
        if len(bank) != len(pca.coords):
            raise ValueError(
                f"bank has {len(bank)} images but pca was fitted to {len(pca.coords)}; pass the images of the fit"
            )
        self.bank = self.points(bank.to(pca.axes.device))

    def points(self, bank: Tensor) -> Tensor:
        """Return the latents (N, D) of all possible partners."""
        return encode(self.flow, bank)

    def _move(self, z: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
        return torch.lerp(z, self.bank[plan.partner], plan.weight[:, :1])


class PixelMixup(LatentMixup):
    """Same-label mixup of pixels, ``x + w (x_j − x)`` (SamplePairing, Inoue 2018, within a class).

    Of the flow only the image size and the classes are used. The arguments are those of ``LatentMixup``.
    """

    def points(self, bank: Tensor) -> Tensor:
        """Return all possible partners, images (N, C, H, W) in [0, 1]."""
        return bank.float() / 255

    def _mix(self, small: Tensor, y: Tensor, plan: MixPlan) -> tuple[Tensor, Tensor]:
        return torch.lerp(small, self.bank[plan.partner], plan.weight[:, :1, None, None]), torch.ones_like(y).bool()


class LatentNoise(FlowMixupTransform):
    r"""Gaussian noise on the latents, :math:`z + s \sqrt{\Sigma_y} \varepsilon` (as Yüksel et al., ICCV 2021).

    Args:
        flow: a trained flow.
        pca: class principal components of the flow.
        strength: s, the noise level in standard deviations of the class Gaussian.
        **keywords: arguments of ``FlowMixupTransform``; ``alpha`` has no effect.
    """

    def __init__(self, flow, pca, strength: float, **keywords):
        super().__init__(flow, pca, **keywords)
        self.strength = strength

    def plan(self, y: Tensor) -> MixPlan:
        """Draw the images to augment, with weight 1, and their noise (M, D)."""
        plan = super().plan(y)
        noise = self.sampler.rng.standard_normal((len(plan.index), self.flow.dim), dtype=np.float32)
        weight = (plan.weight != 0).any(1, keepdim=True).float()
        return replace(plan, weight=weight, noise=torch.from_numpy(noise).to(y.device))

    def _move(self, z: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
        return z + plan.weight * self.strength * self.flow.gaussians.variance[y].sqrt() * plan.noise


class ClassDraw(LatentNoise):
    """A draw from the class Gaussian instead of the image.

    The arguments are those of ``LatentNoise``; ``strength`` is the temperature, the factor of the variance.
    """

    def _move(self, z: Tensor, y: Tensor, plan: MixPlan) -> Tensor:
        drawn = self.flow.gaussians.mean[y] + (self.strength * self.flow.gaussians.variance[y]).sqrt() * plan.noise
        return torch.lerp(z, drawn, plan.weight)


WITH_BANK = {"pixel": PixelMixup, "latent": LatentMixup}
WITH_STRENGTH = {"noise": LatentNoise, "gaussian": ClassDraw}
DEFAULTS = {"alpha": 1.0, "per_axis": False, "rescaled": False}  # those of the kept runs, whatever the package's are


def grouped(dataset: ImageDataset, size: tuple[int, int], channels: int) -> Tensor:
    """Return all images, uint8 (N, C, H, W), sorted by class and otherwise in their order, as in ``fit_pca``."""
    order = torch.as_tensor(dataset.targets).argsort(stable=True)
    return stack_images(dataset, size, channels)[order]


def create_augmentation(kind: str, source: str | Path, train: ImageDataset, **keywords) -> FlowMixupTransform:
    """Create flow mixup or a rival.

    Args:
        kind: "flow", "pixel", "latent", "noise", "gaussian" or "axes" (the same class as "flow").
        source: folder or name of a trained flow.
        train: the training set of the flow.
        **keywords: arguments of the transform; those left out are ``DEFAULTS``.

    Raises:
        ValueError: ``kind`` is unknown, or ``train`` has another number of images than the flow's training set.
    """
    known = {"flow": FlowMixupTransform, **WITH_BANK, **WITH_STRENGTH, "axes": FlowMixupTransform}
    if kind not in known:
        raise ValueError(f"unknown augmentation {kind!r}; expected one of {', '.join(known)}")
    flow, pca = load_flow(source), load_pca(source)
    if kind in WITH_BANK:
        keywords["bank"] = grouped(train, flow.event_shape[1:], flow.event_shape[0])
    return known[kind](flow, pca, class_names=train.class_names, **{**DEFAULTS, **keywords})
