"""Conditional normalizing flow: a bijection and one Gaussian per class in its latent space."""

import copy
import math

import torch
from torch import Tensor, nn

from flowaug.flows.bijections import Bijection
from flowaug.flows.bijections.base import ConditionedBijection
from flowaug.flows.inference import freeze
from flowaug.latents.gaussians import ClassGaussians
from flowaug.pixels import bits_per_dim, dequantise

ROUNDING = 0.01  # tolerance on the largest magnitude of a pixel or of a scaled autoencoder latent
TYPICAL_GAP = (
    10.0  # log-density gap between classes, in nats, to which the posterior of the hybrid objective is tempered
)


class Flow(nn.Module):
    r"""Conditional normalizing flow with one Gaussian per class in the latent space.

    .. math:: \log p(x \mid y) = \log N(f(x); \mu_y, \Sigma_y) + \log |\det \partial f / \partial x|

    The bijection :math:`f` does not depend on the label, so ``decode`` is the same function for all classes (Enescu &
    Sahbi, "Learning Conditionally Untangled Latent Spaces using Fixed Point Iteration", Eq. 2).

    Args:
        bijection: maps events, which are images (B, C, H, W) or vectors (B, D), to latents (B, D).
        gaussians: class Gaussians over the D latent dimensions.
        event_shape: (C, H, W) for images or (D,) for vectors.
        grey_levels: number of grey levels of the images.
        config: the arguments of ``create_flow`` that build this flow, as stored in a checkpoint.

    Attributes:
        class_names: names of the classes in label order, or None; set by ``load_flow`` and by training.
        frozen: whether this flow is an inference copy, made by ``freeze``.

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
        self.class_names: tuple[str, ...] | None = None
        self.frozen = False

    @property
    def dim(self) -> int:
        """Number of latent dimensions D = C·H·W."""
        return math.prod(self.event_shape)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.event_shape[1], self.event_shape[2])

    @property
    def _event_description(self) -> str:
        return "images (B, C, H, W)" if len(self.event_shape) == 3 else "vectors (B, D)"

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map events to latents.

        The range of the values is not checked, because this would synchronise a GPU.

        Args:
            x: images (B, C, H, W) in [0, 1], dequantised or not, or vectors (B, D); in the dtype of the flow.

        Returns:
            Latents (B, D) and the log-determinants ``ladj`` (B,) in nats.

        Raises:
            ValueError: for a wrong shape.
            TypeError: for a wrong dtype.
        """
        self._check(x, self.event_shape, f"{self._event_description} of")
        return self.bijection(x)

    def decode(self, z: Tensor) -> Tensor:
        """Map latents to events.

        Args:
            z: latents (B, D), in the dtype of the flow.

        Returns:
            Events (B, *event_shape). Images are not clamped to [0, 1].

        Raises:
            ValueError: for a wrong shape.
            TypeError: for a wrong dtype.
        """
        self._check(z, (self.dim,), "latents (B, D) of")
        return self.bijection.inverse(z)

    def _check(self, x: Tensor, shape: tuple[int, ...], what: str) -> None:
        if x.ndim != len(shape) + 1 or tuple(x.shape[1:]) != shape:
            raise ValueError(
                f"this flow takes {what} shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}; resize or "
                "reshape the input"
            )
        dtype = self.gaussians.mean.dtype
        if x.dtype != dtype:
            raise TypeError(f"this flow computes in {dtype}, got a tensor of {x.dtype}; convert it with x.to({dtype})")

    def log_prob(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Compute the log-density of events.

        Args:
            x: events (B, *event_shape).
            y: labels (B,). None for the marginal density under a uniform prior over the classes.

        Returns:
            ``log p(x | y)``, or ``log p(x)``, (B,) in nats.
        """
        z, ladj = self.encode(x)
        if y is None:
            return self.gaussians.log_joint(z).logsumexp(1) + ladj
        return self.gaussians.log_prob(z, y) + ladj

    def forward(
        self, x: Tensor, y: Tensor | None = None, posterior_weight: float = 0.0, soft: Tensor | None = None
    ) -> Tensor:
        """Compute the training objective per image (the ``forward`` that DDP wraps).

        The objective is ``log p(x | y) + posterior_weight · D · log p(y | x)``, to be maximised. It combines a
        generative and a discriminative term (Ardizzone et al., "Training Normalizing Flows with the Information
        Bottleneck", 2020).

        The posterior ``p(y | x)`` is tempered. If the class Gaussians are far apart, log-densities of two classes
        differ by thousands of nats, and a few misclassified images would outweigh the likelihood of all others. The
        temperature reduces the mean gap between the classes to ``TYPICAL_GAP`` nats.

        Args:
            x: events (B, *event_shape).
            y: labels (B,). None is allowed if ``posterior_weight`` is 0, see ``log_prob``.
            posterior_weight: weight of the posterior term; 0 gives ``log_prob(x, y)``.
            soft: class probabilities (B, K) of a teacher, used instead of ``y`` in the posterior term (Hinton, Vinyals
                & Dean, "Distilling the Knowledge in a Neural Network", 2015).

        Returns:
            Objective (B,) in nats.

        Raises:
            ValueError: if ``y`` is None and ``posterior_weight`` is not 0.
        """
        if not posterior_weight:
            return self.log_prob(x, y)
        if y is None:
            raise ValueError("posterior_weight needs the labels y of the events; pass them or set it to 0")

        z, ladj = self.encode(x)
        temperature = (self.gaussians.separation() / TYPICAL_GAP).clamp(min=1)
        posterior = self.gaussians.log_posterior(z, y if soft is None else soft, temperature)
        return self.gaussians.log_prob(z, y) + ladj + posterior_weight * self.dim * posterior

    def log_joint(self, x: Tensor) -> Tensor:
        """Compute the joint log-density of events and every class, under a uniform prior over the classes.

        The class with the largest value is the prediction of the flow; its accuracy is "NF-Acc" in the papers.

        Args:
            x: events (B, *event_shape).

        Returns:
            ``log p(x, y)`` (B, K) in nats.
        """
        z, ladj = self.encode(x)
        return self.gaussians.log_joint(z) + ladj[:, None]

    @torch.no_grad()
    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw one event per label.

        Args:
            y: labels (B,).
            temperature: factor on the covariance of the class Gaussians, at least 0.
            generator: random generator; None uses the global one.

        Returns:
            Events (B, *event_shape). Images are clamped to [0, 1].
        """
        x = self.decode(self.gaussians.sample(y, temperature, generator))
        return x.clamp(0, 1) if len(self.event_shape) == 3 else x

    def dequantise(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Add dequantisation noise for the grey levels of this flow; see ``flowaug.pixels.dequantise``."""
        return dequantise(x, self.grey_levels, generator)

    def bits_per_dim(self, log_prob: Tensor) -> Tensor:
        """Convert log-densities of *dequantised* images, in nats, to bits per dimension."""
        return bits_per_dim(log_prob, self.dim, self.grey_levels)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Initialise the data-dependent parameters from a batch.

        Args:
            x: dequantised images (B, C, H, W) in [0, 1], or vectors (B, D); at least 2.

        Raises:
            ValueError: for a wrong shape, fewer than 2 examples, non-finite values or pixel values out of range.
            TypeError: for a wrong dtype.
        """
        self._check(x, self.event_shape, f"{self._event_description} of")
        self._check_values(x)
        self.bijection.initialise(x)

    def freeze(self, conditioner_dtype: torch.dtype | None = None, compiled: bool = False) -> "Flow":
        """Return a copy optimised for inference: same outputs, faster, but it cannot be trained or saved.

        Args:
            conditioner_dtype: dtype in which the conditioners run, for example ``torch.bfloat16``; None for the dtype
                of the flow.
            compiled: compile the steps with ``torch.compile`` at their first use.

        Returns:
            The frozen copy; ``self`` if this flow is already frozen.
        """
        if self.frozen:
            return self

        bijection = freeze(self.bijection, conditioner_dtype, compiled)
        frozen = Flow(bijection, copy.deepcopy(self.gaussians), self.event_shape, self.grey_levels, self.config)
        frozen.class_names = self.class_names
        frozen.frozen = True
        return frozen.eval().requires_grad_(False)

    def set_training_form(
        self, conditioner_dtype: torch.dtype | None = None, grad_checkpointing: bool = False, compiled: bool = False
    ) -> "Flow":
        """Choose how the conditioners run in training, in place.

        Args:
            conditioner_dtype: dtype in which they run, for example ``torch.bfloat16``; None for the dtype of the flow.
            grad_checkpointing: recompute their activations in the backward pass instead of saving them. The gradients
                are the same. It needs a fraction of the memory and makes a step about a third slower.
            compiled: compile the couplings with ``torch.compile`` at their first use.

        Returns:
            ``self``.
        """
        for module in self.modules():
            if isinstance(module, ConditionedBijection):
                module.conditioner_dtype = conditioner_dtype
                module.grad_checkpointing = grad_checkpointing
                if compiled:
                    module.compile()
        return self

    @property
    def _max_magnitude(self) -> float:
        return 1 + 0.5 / (self.grey_levels - 1) + ROUNDING  # a dequantised pixel can leave [0, 1] by half a cell

    def _check_values(self, x: Tensor) -> None:
        if len(x) < 2:
            raise ValueError(
                f"initialise computes means and variances over a batch; got {len(x)} examples, pass 2 or more"
            )
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
            raise ValueError(
                f"{bad} of the {len(x)} {self._event_description} passed to initialise contain NaN or infinite values; "
                "remove them or correct the preprocessing"
            )
        if len(self.event_shape) == 3 and x.abs().max() > self._max_magnitude:  # vectors may have any scale
            raise ValueError(
                f"the images passed to initialise have values from {x.min():.3g} to {x.max():.3g}; expected pixels in "
                "[0, 1] or autoencoder latents scaled to [−1, 1]; divide 8-bit pixels by 255 and undo any normalisation"
            )
