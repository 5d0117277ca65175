"""The class Gaussians: log-density, posterior and sampling. The one owner of class means and variances."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClassGaussians", "GaussianParameters"]


class GaussianParameters(NamedTuple):
    """Means `(K, D)` and diagonal variances `(K, D)` of the class Gaussians."""

    mean: Tensor
    variance: Tensor


class ClassGaussians(nn.Module):
    r"""One diagonal Gaussian :math:`N(\mu_y, \Sigma_y)` per class in the latent space, with equal priors.

    The parameters are buffers, not learned by the flow's optimizer; `assign_` is their only writer. The prior
    is uniform, :math:`p(y) = 1/K`, so that :math:`\log p(z) = \mathrm{logsumexp}_k` of `log_joint`.

    Args:
        mean: class means, `(K, D)`; kept as float32.
        variance: class variances (not standard deviations), `(K, D)`, positive; kept as float32.

    Raises:
        ValueError: wrong shapes, non-finite entries, a variance that is not positive.

    Example:
        >>> gaussians = ClassGaussians(torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
        >>> gaussians.posterior(torch.zeros(1, 1)).tolist()
        [[0.5, 0.5]]
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        _check_parameters(mean, variance)
        self.register_buffer("mean", mean.detach().to(torch.float32, copy=True))
        self.register_buffer("variance", variance.detach().to(torch.float32, copy=True))

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.mean.shape[0]

    @property
    def dim(self) -> int:
        """The dimension D of the latents."""
        return self.mean.shape[1]

    @torch.no_grad()
    def assign_(self, value: GaussianParameters) -> ClassGaussians:
        """Replaces means and variances in place, after checking both.

        Args:
            value: mean `(K, D)` and variance `(K, D)` of this module's own K and D.

        Raises:
            ValueError: other shapes, non-finite entries, a variance that is not positive in float32.
        """
        mean, variance = value
        if mean.shape != self.mean.shape:
            ours, theirs = tuple(self.mean.shape), tuple(mean.shape)
            raise ValueError(f"these class Gaussians are (K, D) = {ours}; cannot assign means {theirs}")
        _check_parameters(mean, variance)
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        return self

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        r""":math:`\log N(z; \mu_y, \Sigma_y)` in nats.

        Args:
            z: latents, `(B, D)`.
            y: integer labels, `(B,)`.

        Returns:
            `(B,)`.
        """
        self._check_batch(z, y)
        mean, variance = self.mean.index_select(0, y), self.variance.index_select(0, y)
        squared = (z - mean).square() / variance
        return -0.5 * ((squared + variance.log()).sum(1) + self.dim * math.log(2 * math.pi))

    def log_joint(self, z: Tensor) -> Tensor:
        r""":math:`\log N(z; \mu_k, \Sigma_k) + \log(1/K)` for every class, by two matrix products.

        With :math:`c` the grand mean, :math:`P_k = \Sigma_k^{-1}` and :math:`\bar P` their mean over classes,

        .. math:: (z-\mu_k)^\top P_k (z-\mu_k) = \|z-c\|^2_{\bar P} + (z-c)^2 \cdot (P_k - \bar P)
                  - 2 (z-c) \cdot P_k(\mu_k-c) + \|\mu_k-c\|^2_{P_k}

        Centring keeps the terms as small as the classes' spread, and what all classes share never enters a
        product, so that differences between classes keep float32 precision.

        Args:
            z: latents, `(B, D)`.

        Returns:
            `(B, K)`.
        """
        self._check_batch(z)
        centre, precision = self.mean.mean(0), self.variance.reciprocal()
        common, mean = precision.mean(0), self.mean - centre
        with torch.autocast(z.device.type, enabled=False):
            offset = z.to(self.mean.dtype) - centre
            squared = offset.square()
            distance = torch.addmm(
                (mean.square() * precision + self.variance.log()).sum(1), squared, (precision - common).T
            )
            distance = torch.addmm(distance, offset, (mean * precision).T, alpha=-2.0)
        shared = (squared * common).sum(1, keepdim=True) + self.dim * math.log(2 * math.pi)
        return -0.5 * (distance + shared) - math.log(self.num_classes)

    def posterior(self, z: Tensor) -> Tensor:
        """Class probabilities `p(k | z)` under the uniform prior: `(B, D)` to `(B, K)`."""
        return self.log_joint(z).softmax(1)

    def log_posterior(self, z: Tensor, y: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        r"""Log-probability of labels, :math:`\log p(y | z) \propto \log N(z; \mu_y, \Sigma_y) / T`, in nats.

        Args:
            z: latents, `(B, D)`.
            y: integer labels, `(B,)`; or a probability of each class, `(B, K)`, by which the mean over them is taken.
            temperature: T, divides the log-densities before they are normalised over the classes.

        Returns:
            `(B,)`.
        """
        self._check_batch(z, y if y.ndim == 1 else None)
        return -F.cross_entropy(self.log_joint(z) / temperature, y, reduction="none")

    def margin(self, z: Tensor, y: Tensor) -> Tensor:
        """How much likelier latents `(B, D)` are of their class `(B,)` than of any other: `(B,)` in nats."""
        self._check_batch(z, y)
        joint = self.log_joint(z)
        return joint.gather(1, y[:, None])[:, 0] - joint.scatter(1, y[:, None], -torch.inf).amax(1)

    def separation(self) -> Tensor:
        r"""How far apart the class means are: :math:`\frac{1}{K-1} \sum_k \|\mu_k - \bar\mu\|^2_{P_k}` in nats, scalar.

        With unit variances this is the mean divergence between two classes, the gap that an image at its class mean
        has to another class.
        """
        offset = self.mean - self.mean.mean(0)
        return (offset.square() / self.variance).sum() / max(self.num_classes - 1, 1)

    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        r"""Draws :math:`z \sim N(\mu_y, \tau \Sigma_y)`.

        Args:
            y: integer labels, `(B,)`.
            temperature: :math:`\tau \ge 0`, scales the covariance; 0 gives the means.
            generator: source of the randomness, on any device; the global one if None.

        Returns:
            Latents `(B, D)`.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature scales the covariance and must be >= 0, got {temperature}")
        mean, variance = self.mean.index_select(0, y), self.variance.index_select(0, y)
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        return mean + (temperature * variance).sqrt() * noise.to(mean.device)

    def extra_repr(self) -> str:
        """Sizes, for `print(flow)`."""
        return f"num_classes={self.num_classes}, dim={self.dim}"

    def _check_batch(self, z: Tensor, y: Tensor | None = None) -> None:
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"latents must be (B, {self.dim}), got {tuple(z.shape)}")
        if y is not None and y.shape != z.shape[:1]:
            raise ValueError(f"{len(z)} latents need {len(z)} labels of shape (B,), got {tuple(y.shape)}")


def _check_parameters(mean: Tensor, variance: Tensor) -> None:
    if mean.ndim != 2 or mean.shape != variance.shape:
        shapes = f"{tuple(mean.shape)} and {tuple(variance.shape)}"
        raise ValueError(f"mean and variance must both be (K, D), got {shapes}")
    single = variance.to(torch.float32)  # what is kept: 1e-50 would become 0
    faults = {
        "a mean that is not finite": ~torch.isfinite(mean.to(torch.float32)),
        "a variance that is not finite and positive": ~(torch.isfinite(single) & (single > 0)),
    }
    for fault, where in faults.items():
        classes = torch.nonzero(where.any(1)).flatten().tolist()
        if classes:
            raise ValueError(f"class {classes[0]} has {fault} ({len(classes)} of {len(mean)} classes do)")
