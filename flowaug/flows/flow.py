"""Flow = bijection + class Gaussians."""

import copy
import math

import torch
from torch import Tensor, nn

from flowaug.flows.bijections import Bijection
from flowaug.flows.bijections.base import Conditioned
from flowaug.flows.inference import freeze
from flowaug.latents.gaussians import ClassGaussians
from flowaug.pixels import bits_per_dim, dequantise

ROUNDING = 0.01  # allowed beyond the largest magnitude of a pixel or a scaled autoencoder latent
TYPICAL_GAP = 10.0  # nats between an image's class and another, to which ``posterior_weight`` cools them down


class Flow(nn.Module):
    r"""A conditional normalizing flow whose label lives only in its class Gaussians.

    .. math:: \log p(x \mid y) = \log N(f(x); \mu_y, \Sigma_y) + \log |\det \partial f / \partial x|

    ``decode`` is therefore one plain function for every class (Enescu & Sahbi, "Learning Conditionally Untangled Latent
    Spaces using Fixed Point Iteration", Eq. 2).

    Args:
        bijection: maps events, images (B, C, H, W) or vectors (B, D), to vectors (B, D).
        gaussians: class Gaussians over the D latent dimensions.
        event_shape: (C, H, W) of images or (D,) of vectors.
        grey_levels: number of grey levels of the images.
        config: what ``create_flow`` needs to build this flow again.

    Example:
        >>> from flowaug import create_flow
        >>> flow = create_flow("mef_tiny", event_shape=(1, 8, 8), num_classes=10)
        >>> x = torch.rand(4, 1, 8, 8)
        >>> z, ladj = flow.encode(x)
        >>> bool((flow.decode(z) - x).abs().max() < 1e-5)
        True
    """

    def __init__(
        self,
        bijection: Bijection,
        gaussians: ClassGaussians,
        event_shape: tuple[int, ...],
        grey_levels: int = 256,
        config: dict | None = None,
    ):
        super().__init__()
        self.bijection = bijection
        self.gaussians = gaussians
        self.event_shape = tuple(event_shape)
        self.grey_levels = grey_levels
        self.config = config or {}
        self.class_names: tuple[str, ...] | None = None  # in label order; set by load_flow and train_flow.py
        self.frozen = False

    @property
    def dim(self) -> int:
        """Number of latent dimensions D = C·H·W."""
        return math.prod(self.event_shape)

    @property
    def _events(self) -> str:
        return "images (B, C, H, W)" if len(self.event_shape) == 3 else "vectors (B, D)"

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map events to latents. Values are not looked at, which would make the host wait for the device.

        Args:
            x: images (B, C, H, W) in [0, 1], dequantised or not, or vectors (B, D), in the dtype of the flow.

        Returns:
            Latents (B, D) and ``ladj`` (B,) in nats.
        """
        self._check(x, self.event_shape, f"{self._events} of")
        return self.bijection(x)

    def decode(self, z: Tensor) -> Tensor:
        """Map latents (B, D) back to events (B, *event_shape); images are not clamped to [0, 1]."""
        self._check(z, (self.dim,), "latents (B, D) of")
        return self.bijection.inverse(z)

    def _check(self, x: Tensor, shape: tuple[int, ...], what: str) -> None:
        if x.ndim != len(shape) + 1 or tuple(x.shape[1:]) != shape:
            raise ValueError(f"this flow takes {what} shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")
        dtype = self.gaussians.mean.dtype
        if x.dtype != dtype:
            raise TypeError(f"this flow computes in {dtype}, got a tensor of {x.dtype}; convert it with x.to({dtype})")

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Log-density (B,) in nats: of x given its label (B,), or of x alone when ``y`` is None (uniform prior)."""
        z, ladj = self.encode(x)
        if y is None:
            return self.gaussians.log_joint(z).logsumexp(1) + ladj
        return self.gaussians.log_prob(z, y) + ladj

    def forward(
        self, x: Tensor, y: Tensor | None = None, posterior_weight: float = 0.0, soft: Tensor | None = None
    ) -> Tensor:
        """What training maximises, and what a data-parallel wrapper calls: ``log_prob`` (B,), and more with a weight.

        ``log p(x | y) + posterior_weight · D · log p(y | x)`` is a hybrid of a generative and a discriminative
        objective (Ardizzone et al., "Training Normalizing Flows with the Information Bottleneck", 2020). Between class
        Gaussians far apart the posterior is 0 or 1 to thousands of nats, and a few misplaced images would outweigh the
        likelihood of all; here it is that at the temperature where classes differ by ``TYPICAL_GAP`` nats. With the
        probabilities ``soft`` (B, K) that a teacher gives the classes, the posterior learns these in place of y
        (Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015).
        """
        if not posterior_weight:
            return self.log_prob(x, y)
        z, ladj = self.encode(x)
        temperature = (self.gaussians.separation() / TYPICAL_GAP).clamp(min=1)
        posterior = self.gaussians.log_posterior(z, y if soft is None else soft, temperature)
        return self.gaussians.log_prob(z, y) + ladj + posterior_weight * self.dim * posterior

    def log_joint(self, x: Tensor) -> Tensor:
        """``log p(x, y)`` (B, K) for every class under a uniform prior; its argmax classifies ("NF-Acc")."""
        z, ladj = self.encode(x)
        return self.gaussians.log_joint(z) + ladj[:, None]

    @torch.no_grad()
    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw one event per label ``y`` (B,), images within [0, 1]; ``temperature`` scales the covariance."""
        x = self.decode(self.gaussians.sample(y, temperature, generator))
        return x.clamp(0, 1) if len(self.event_shape) == 3 else x

    def dequantise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Add the noise of this flow's grey levels to images (B, C, H, W); see ``flowaug.pixels``."""
        return dequantise(x, self.grey_levels, generator)

    def bits_per_dim(self, log_prob: Tensor) -> Tensor:
        """Convert ``log_prob`` in nats of *dequantised* images into bits per dimension."""
        return bits_per_dim(log_prob, self.dim, self.grey_levels)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the data-dependent parameters from a batch of dequantised images (B, C, H, W), or vectors (B, D)."""
        self._check(x, self.event_shape, f"{self._events} of")
        self._check_values(x)
        self.bijection.initialise(x)

    def freeze(self, conditioner_dtype: torch.dtype | None = None, compiled: bool = False) -> "Flow":
        """A copy in inference form: the same values, sooner; it cannot be trained or saved. A frozen flow stays itself.

        Args:
            conditioner_dtype: dtype to run the conditioners in, for example ``torch.bfloat16``; None for the flow's.
            compiled: compile the steps with ``torch.compile`` when they are first used.
        """
        if self.frozen:
            return self
        bijection = freeze(self.bijection, conditioner_dtype, compiled)
        frozen = Flow(bijection, copy.deepcopy(self.gaussians), self.event_shape, self.grey_levels, self.config)
        frozen.class_names, frozen.frozen = self.class_names, True
        return frozen.eval().requires_grad_(False)

    def set_training_form(
        self, conditioner_dtype: torch.dtype | None = None, recompute: bool = False, compiled: bool = False
    ) -> "Flow":
        """Choose how conditioners run in training, in place.

        Args:
            conditioner_dtype: dtype to run them in, for example ``torch.bfloat16``; None for the flow's.
            recompute: run them again in the backward pass instead of keeping their activations: gradients are the
                same, memory falls to a fraction, a step takes about a third longer.
            compiled: compile them with ``torch.compile`` when they are first used.
        """
        for module in self.modules():
            if isinstance(module, Conditioned):
                module.conditioner_dtype, module.recompute = conditioner_dtype, recompute
                if compiled:
                    module.compile()
        return self

    @property
    def _largest(self) -> float:
        return 1 + 0.5 / (self.grey_levels - 1) + ROUNDING  # a dequantised pixel leaves [0, 1] by half a cell

    def _check_values(self, x: Tensor) -> None:
        if len(x) < 2:
            raise ValueError(
                f"initialise takes means and variances over a batch; got {len(x)} examples, pass 2 or more"
            )
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
            raise ValueError(f"{bad} of the {len(x)} {self._events} to initialise on hold NaN or infinite values")
        if len(self.event_shape) == 3 and x.abs().max() > self._largest:  # vectors may have any scale
            raise ValueError(
                f"the images to initialise on run from {x.min():.3g} to {x.max():.3g}; expected pixels in [0, 1] (or "
                "latents of an autoencoder scaled to [−1, 1]): divide 8-bit pixels by 255, undo a normalisation"
            )
