"""Glow (Kingma & Dhariwal, "Glow: Generative Flow with Invertible 1×1 Convolutions", NeurIPS 2018): the baseline.

As everywhere here there are no split priors: the levels are re-packed into one vector, which the class Gaussian covers.
"""

from functools import partial

from flowaug.flows.architectures.multiscale import Shape, build_multiscale, check_image_shape
from flowaug.flows.bijections import ActNorm, Bijection, Coupling, PLUConv1x1
from flowaug.flows.networks import PlainConditioner


def build_glow(
    event_shape: Shape, *, steps: int, hidden: int, coupling: str = "affine", num_levels: int | None = None
) -> Bijection:
    """Glow: ActNorm per channel, PLU 1×1 convolution and affine coupling, level by level.

    Args:
        event_shape: (C, H, W), H and W divisible by ``2 ** num_levels``.
        steps: steps per level (the paper's K).
        hidden: width of the conditioners.
        coupling: "additive", "affine" or "matrix_exp".
        num_levels: number of levels (the paper's L), None for as many as the size allows (three at most).
    """
    check_image_shape(event_shape, "glow")
    network = partial(PlainConditioner, hidden=hidden, kernels=(3, 1, 3))

    def step(shape: Shape, level: int) -> list[Bijection]:
        return [ActNorm(shape, per_channel=True), PLUConv1x1(shape[0]), Coupling(shape[0], coupling, network)]

    return build_multiscale(event_shape, num_levels, steps, step)


def glow_tiny(event_shape: Shape, **overrides) -> Bijection:
    """Glow for small grey images: 4 steps per level of width 64."""
    return build_glow(event_shape, **({"steps": 4, "hidden": 64} | overrides))


def glow_small(event_shape: Shape, **overrides) -> Bijection:
    """Glow about the size of ``mef_small``: 12 steps per level of width 160."""
    return build_glow(event_shape, **({"steps": 12, "hidden": 160} | overrides))


def glow_base(event_shape: Shape, **overrides) -> Bijection:
    """The paper's Glow for CIFAR-10: L=3, K=32, width 512, 44 M parameters at 32×32×3."""
    return build_glow(event_shape, **({"steps": 32, "hidden": 512} | overrides))
