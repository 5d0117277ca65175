"""Class-conditional Gaussians of the latent space: density, posterior and sampling."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GaussianParameters(NamedTuple):
    """Parameters of the class Gaussians.

    Attributes:
        mean: class means, ``(K, D)``.
        variance: diagonal class variances (not standard deviations), ``(K, D)``.

    Example:
        >>> unit = GaussianParameters(mean=torch.zeros(10, 64), variance=torch.ones(10, 64))
        >>> ClassGaussians(*unit).num_classes
        10
    """

    mean: Tensor
    variance: Tensor


class ClassGaussians(nn.Module):
    r"""One diagonal Gaussian :math:`N(\mu_y, \Sigma_y)` per class in the latent space.

    Means and variances are buffers: the optimizer of the flow does not train them, and only ``assign_`` changes
    them. The class prior is uniform, :math:`p(y) = 1/K`, so that :math:`\log p(z)` is the log-sum-exp of
    ``log_joint`` over the classes.

    Args:
        mean: class means, ``(K, D)``; stored as float32.
        variance: class variances (not standard deviations), ``(K, D)``, positive; stored as float32.

    Raises:
        ValueError: if the shapes differ, an entry is not finite or a variance is not positive.

    Example:
        >>> gaussians = ClassGaussians(torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
        >>> gaussians.posterior(torch.zeros(1, 1)).tolist()
        [[0.5, 0.5]]
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        check_parameters(mean, variance)
        self.register_buffer("mean", mean.detach().to(torch.float32, copy=True))
        self.register_buffer("variance", variance.detach().to(torch.float32, copy=True))

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.mean.shape[0]

    @property
    def dim(self) -> int:
        """Dimension D of the latents."""
        return self.mean.shape[1]

    @torch.no_grad()
    def assign_(self, value: GaussianParameters) -> ClassGaussians:
        """Replace means and variances in place and return ``self``.

        Args:
            value: new means and variances, each ``(K, D)`` with the same K and D as before.

        Raises:
            ValueError: if a shape differs, an entry is not finite or a variance is not positive in float32.
                The parameters are then unchanged.
        """
        mean, variance = value
        if mean.shape != self.mean.shape:
            expected, found = tuple(self.mean.shape), tuple(mean.shape)
            raise ValueError(
                f"expected means of shape (K, D) = {expected}, got {found}; for another number of classes or "
                "dimensions, create a new ClassGaussians"
            )
        check_parameters(mean, variance)
        self.mean.copy_(mean)
        self.variance.copy_(variance)
        return self

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        r"""Compute the log-density :math:`\log N(z; \mu_y, \Sigma_y)` in nats.

        Args:
            z: latents, ``(B, D)``.
            y: integer labels, ``(B,)``.

        Returns:
            ``(B,)``.
        """
        self._check_batch(z, y)
        mean, variance = self.mean.index_select(0, y), self.variance.index_select(0, y)
        squared = (z - mean).square() / variance
        return -0.5 * ((squared + variance.log()).sum(1) + self.dim * math.log(2 * math.pi))

    def log_joint(self, z: Tensor) -> Tensor:
        r"""Compute :math:`\log N(z; \mu_k, \Sigma_k) + \log(1/K)` in nats for every class.

        The quadratic form is expanded so that two matrix products suffice. With the mean of all class means
        :math:`c`, the precisions :math:`P_k = \Sigma_k^{-1}` and their mean :math:`\bar P` over the classes,

        .. math:: (z-\mu_k)^\top P_k (z-\mu_k) = \|z-c\|^2_{\bar P} + (z-c)^2 \cdot (P_k - \bar P)
                  - 2 (z-c) \cdot P_k(\mu_k-c) + \|\mu_k-c\|^2_{P_k}

        Centering keeps the terms small, and the term shared by all classes is added after the matrix products.
        Differences between classes therefore keep float32 precision. Autocast is disabled.

        Args:
            z: latents, ``(B, D)``.

        Returns:
            ``(B, K)``.
        """
        self._check_batch(z)
        center = self.mean.mean(0)
        mean = self.mean - center
        precision = self.variance.reciprocal()
        mean_precision = precision.mean(0)

        with torch.autocast(z.device.type, enabled=False):
            offset = z.to(self.mean.dtype) - center
            squared = offset.square()
            bias = (mean.square() * precision + self.variance.log()).sum(1)
            distance = torch.addmm(bias, squared, (precision - mean_precision).T)
            distance = torch.addmm(distance, offset, (mean * precision).T, alpha=-2.0)

        shared = (squared * mean_precision).sum(1, keepdim=True) + self.dim * math.log(2 * math.pi)
        return -0.5 * (distance + shared) - math.log(self.num_classes)

    def posterior(self, z: Tensor) -> Tensor:
        """Compute the class probabilities ``p(k | z)`` under the uniform prior.

        Args:
            z: latents, ``(B, D)``.

        Returns:
            ``(B, K)``; each row sums to 1.
        """
        return self.log_joint(z).softmax(1)

    def log_posterior(self, z: Tensor, y: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        r"""Compute the log-probability of labels, :math:`\log p(y | z)`, in nats.

        The log-densities are divided by the temperature ``T`` and normalized over the classes:
        :math:`p(y | z) \propto N(z; \mu_y, \Sigma_y)^{1/T}`.

        Args:
            z: latents, ``(B, D)``.
            y: integer labels, ``(B,)``; or class probabilities (soft labels), ``(B, K)``, in which case the
                log-probabilities are averaged with these weights.
            temperature: ``T``.

        Returns:
            ``(B,)``.
        """
        self._check_batch(z, y if y.ndim == 1 else None)
        return -F.cross_entropy(self.log_joint(z) / temperature, y, reduction="none")

    def margin(self, z: Tensor, y: Tensor) -> Tensor:
        """Compute the log-density of the labeled class minus that of the most likely other class, in nats.

        The margin is positive if the latent is classified as its label.

        Args:
            z: latents, ``(B, D)``.
            y: integer labels, ``(B,)``.

        Returns:
            ``(B,)``.
        """
        self._check_batch(z, y)
        joint = self.log_joint(z)
        own = joint.gather(1, y[:, None])[:, 0]
        return own - joint.scatter(1, y[:, None], -torch.inf).amax(1)

    def separation(self) -> Tensor:
        r"""Compute the separation of the class means, in nats.

        .. math:: \frac{1}{K-1} \sum_k \|\mu_k - \bar\mu\|^2_{P_k}

        With unit variances this is the mean KL divergence between two classes: the average difference between the
        log-densities of a class mean under its own Gaussian and under that of another class.

        Returns:
            A scalar.
        """
        offset = self.mean - self.mean.mean(0)
        return (offset.square() / self.variance).sum() / max(self.num_classes - 1, 1)

    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw samples from :math:`N(\mu_y, \tau \Sigma_y)`.

        Args:
            y: integer labels, ``(B,)``.
            temperature: factor :math:`\tau \ge 0` of the covariance; 0 returns the class means.
            generator: random number generator, on any device. Defaults to the global one.

        Returns:
            Latents, ``(B, D)``.

        Raises:
            ValueError: if ``temperature`` is negative or NaN.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature scales the covariance and must be >= 0, got {temperature}")
        mean, variance = self.mean.index_select(0, y), self.variance.index_select(0, y)
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
        return mean + (temperature * variance).sqrt() * noise.to(mean.device)

    def extra_repr(self) -> str:
        """Return the sizes shown by ``print(flow)``."""
        return f"num_classes={self.num_classes}, dim={self.dim}"

    def _check_batch(self, z: Tensor, y: Tensor | None = None) -> None:
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"latents must be (B, {self.dim}), got {tuple(z.shape)}")
        if y is not None and y.shape != z.shape[:1]:
            raise ValueError(f"expected {len(z)} labels of shape ({len(z)},), got {tuple(y.shape)}")


def check_parameters(mean: Tensor, variance: Tensor) -> None:
    """Check the parameters of class Gaussians.

    Args:
        mean: class means, ``(K, D)``.
        variance: class variances, ``(K, D)``.

    Raises:
        ValueError: if the shapes differ, an entry is not finite or a variance is not positive in float32.
    """
    if mean.ndim != 2 or mean.shape != variance.shape:
        shapes = f"{tuple(mean.shape)} and {tuple(variance.shape)}"
        raise ValueError(f"mean and variance must both be (K, D), got {shapes}")
    if mean.is_meta:
        return  # no values to check

    # check the stored dtype: a float64 variance of 1e-50 becomes 0 in float32
    stored = variance.to(torch.float32)
    faults = {
        "a non-finite mean": ~torch.isfinite(mean.to(torch.float32)),
        "a non-finite or non-positive variance": ~(torch.isfinite(stored) & (stored > 0)),
    }
    for fault, where in faults.items():
        classes = torch.nonzero(where.any(1)).flatten().tolist()
        if classes:
            raise ValueError(
                f"class {classes[0]} has {fault} ({len(classes)} of {len(mean)} classes affected); all entries must "
                "be finite and all variances > 0 in float32"
            )
