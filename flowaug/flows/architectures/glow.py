"""Glow, a baseline (Kingma & Dhariwal, "Glow: Generative Flow with Invertible 1×1 Convolutions", NeurIPS 2018).

Unlike the paper, there are no split priors. The outputs of all levels are concatenated to one latent vector, and the
class Gaussian covers all of its dimensions.
"""

from functools import partial

from flowaug.flows.architectures.multiscale import Shape, build_multiscale, check_image_shape
from flowaug.flows.bijections import ActNorm, Bijection, Coupling, PLUConv1x1
from flowaug.flows.networks import PlainConditioner


def build_glow(
    event_shape: Shape, *, steps: int, hidden: int, coupling: str = "affine", num_levels: int | None = None
) -> Bijection:
    """Build a Glow: per level, steps of ActNorm per channel, PLU 1×1 convolution and coupling.

    Args:
        event_shape: (C, H, W), H and W divisible by ``2 ** num_levels``.
        steps: steps per level (K in the paper).
        hidden: number of hidden channels of the conditioners.
        coupling: "additive", "affine" or "matrix_exp".
        num_levels: number of levels (L in the paper); None for as many as the image size allows, at most three.

    Returns:
        A bijection from images (B, C, H, W) to latents (B, C·H·W).

    Raises:
        ValueError: if ``event_shape`` is not that of an image or does not suit ``num_levels``, or ``steps`` is below 1.
    """
    check_image_shape(event_shape, "glow")
    network = partial(PlainConditioner, hidden=hidden, kernels=(3, 1, 3))

    def step(shape: Shape, level: int) -> list[Bijection]:
        return [ActNorm(shape, per_channel=True), PLUConv1x1(shape[0]), Coupling(shape[0], coupling, network)]

    return build_multiscale(event_shape, num_levels, steps, step)


def glow_tiny(event_shape: Shape, **overrides) -> Bijection:
    """Build a Glow for small greyscale images: 4 steps per level, 64 hidden channels."""
    return partial(build_glow, steps=4, hidden=64)(event_shape, **overrides)


def glow_small(event_shape: Shape, **overrides) -> Bijection:
    """Build a Glow of about the size of ``mef_small``: 12 steps per level, 160 hidden channels."""
    return partial(build_glow, steps=12, hidden=160)(event_shape, **overrides)


def glow_base(event_shape: Shape, **overrides) -> Bijection:
    """Build the Glow of the paper for CIFAR-10: L=3, K=32, 512 hidden channels, 44 M parameters at 32×32×3."""
    return partial(build_glow, steps=32, hidden=512)(event_shape, **overrides)
