"""Same-label mixing of latents along the principal components of their class."""

import torch
from torch import Tensor

from flowaug.latents.gaussians import ClassGaussians
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.plan import MixPlan


def mix_latents(z: Tensor, y: Tensor, pca: ClasswisePCA, plan: MixPlan) -> Tensor:
    """Move latents towards their partners along the axes of their class: ``z + Uᵀ [w ⊙ U (z_j − z_i)]``.

    Args:
        z: latents (M, D) of the samples that take part.
        y: their labels (M,), in 0 … K − 1.
        pca: the class axes.
        plan: weights and partners of these M samples.

    Returns:
        Mixed latents (M, D), a new tensor.
    """
    rank = plan.weight.shape[1]
    own = pca.project(z, y, rank)
    other = _partner_coordinates(own, y, pca, plan)
    w = plan.weight.to(own.dtype)
    mixed = own + w * (other - own)
    if plan.rescaled:
        mixed = mixed / ((1 - w) ** 2 + w**2).sqrt()
    return z + pca.combine(mixed - own, y).to(z.dtype)


def mix_keeping_labels(
    z: Tensor, y: Tensor, pca: ClasswisePCA, plan: MixPlan, gaussians: ClassGaussians
) -> tuple[Tensor, Tensor]:
    """Move latents by the first choice of a plan that keeps their label.

    It does where the class Gaussians find the moved latent likeliest of its class, or, if they do not find the latent
    itself so, no less likely beside the next class than before.

    Args:
        z: latents (M, D) of the samples that take part.
        y: their labels (M,), in 0 … K − 1.
        pca: the class axes.
        plan: weights and partners of these M samples, and ``redraws``.
        gaussians: the class Gaussians.

    Returns:
        Mixed latents (M, D), and whether a choice kept the label, bool (M,); where none did, the latent is as before.
    """
    least, mixed = gaussians.margin(z, y).clamp(max=0), z
    kept = torch.zeros_like(y, dtype=torch.bool)
    for choice in (plan, *plan.redraws):
        moved = mix_latents(z, y, pca, choice)
        fine = ~kept & (gaussians.margin(moved, y) >= least)
        mixed, kept = torch.where(fine[:, None], moved, mixed), kept | fine
    return mixed, kept


def _partner_coordinates(own: Tensor, y: Tensor, pca: ClasswisePCA, plan: MixPlan) -> Tensor:
    if plan.source == "batch":
        return own[plan.partner]
    if plan.source == "gaussian":
        return plan.noise * pca.variance[y, : own.shape[1]].sqrt()
    return pca.coords[plan.partner, : own.shape[1]].to(own.dtype)
