"""Same-label mixing of latents along the principal components of their class."""

import torch
from torch import Tensor

from flowaug.latents.gaussians import ClassGaussians
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.plan import MixPlan


def mix_latents(z: Tensor, y: Tensor, pca: ClasswisePCA, plan: MixPlan) -> Tensor:
    r"""Mix latents with their partners along the principal components of their class.

    .. math:: z'_i = z_i + U_y^\top \left[ w \odot U_y (z_j - z_i) \right]

    The part of :math:`z_i` outside the span of the components is unchanged. With ``plan.rescaled`` the mixed
    coordinates are divided by :math:`\sqrt{(1 - w)^2 + w^2}`, which preserves the variance of the class; linear mixing
    would shrink it.

    Reference: Enescu & Sahbi, "Learning Conditionally Untangled Latent Spaces using Fixed Point Iteration", BMVC 2024.

    Args:
        z: latents (M, D) of the samples to mix.
        y: their labels (M,), in 0 … K − 1.
        pca: principal components of the classes.
        plan: weights and partners of these M samples.

    Returns:
        Mixed latents (M, D), a new tensor.

    Raises:
        ValueError: if the plan draws partners from the Gaussians but has no ``noise``.

    Example:
        >>> z, y = torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0])
        >>> plan = MixPlan(index=torch.arange(2), weight=torch.full((2, 1), 0.25), partner=torch.tensor([1, 0]))
        >>> mix_latents(z, y, ClasswisePCA.fit([z], rank=1), plan).tolist()
        [[0.0, 1.5], [0.0, 2.5]]
    """
    rank = plan.weight.shape[1]
    own = pca.project(z, y, rank)
    partner = _partner_coordinates(own, y, pca, plan)

    w = plan.weight.to(own.dtype)
    mixed = own + w * (partner - own)
    if plan.rescaled:
        mixed = mixed / ((1 - w) ** 2 + w**2).sqrt()

    return z + pca.combine(mixed - own, y).to(z.dtype)


def mix_keeping_labels(
    z: Tensor, y: Tensor, pca: ClasswisePCA, plan: MixPlan, gaussians: ClassGaussians
) -> tuple[Tensor, Tensor]:
    """Mix each latent by the first draw of a plan that keeps its label.

    A mixed latent keeps its label if its margin (see ``ClassGaussians.margin``) is at least ``min(0, margin of the
    original)``: it must be classified as its label, or at least not be further from it than the original.

    Args:
        z: latents (M, D) of the samples to mix.
        y: their labels (M,), in 0 … K − 1.
        pca: principal components of the classes.
        plan: weights and partners of these M samples, with alternative draws in ``redraws``.
        gaussians: the class Gaussians.

    Returns:
        Mixed latents (M, D), and a boolean mask (M,) of the samples for which a draw kept the label. The other latents
        are returned unchanged.
    """
    threshold = gaussians.margin(z, y).clamp(max=0)
    result = z
    kept = torch.zeros_like(y, dtype=torch.bool)

    for draw in (plan, *plan.redraws):
        mixed = mix_latents(z, y, pca, draw)
        accepted = ~kept & (gaussians.margin(mixed, y) >= threshold)
        result = torch.where(accepted[:, None], mixed, result)
        kept = kept | accepted

    return result, kept


def _partner_coordinates(own: Tensor, y: Tensor, pca: ClasswisePCA, plan: MixPlan) -> Tensor:
    """Return the coordinates (M, r) of the partners; ``own`` are those of the samples themselves."""
    rank = own.shape[1]
    if plan.source == "batch":
        return own[plan.partner]
    if plan.source == "gaussian":
        if plan.noise is None:
            raise ValueError("the plan has the source 'gaussian' but no noise; pass standard normal draws (M, r)")
        return plan.noise * pca.variance[y, :rank].sqrt()
    return pca.coords[plan.partner, :rank].to(own.dtype)
