"""Matrix exponential flow (Xiao & Liu, "Generative Flows with Matrix Exponential", ICML 2020)."""

from functools import partial

from flowaug.flows.architectures.multiscale import Shape, build_multiscale, check_at_least_one, check_image_shape
from flowaug.flows.bijections import ActNorm, Bijection, Coupling, InvertibleConv1x1
from flowaug.flows.networks import ConvConditioner


def build_mef(
    event_shape: Shape,
    *,
    steps: int,
    blocks: tuple[int, ...],
    hidden: int | tuple[int, ...],
    coupling: str = "matrix_exp",
    num_levels: int | None = None,
    attention: bool = False,
    split: bool = True,
) -> Bijection:
    """Build a matrix exponential flow: per level, steps of ActNorm, 1×1 convolution and coupling.

    Args:
        event_shape: (C, H, W), H and W divisible by ``2 ** num_levels``.
        steps: steps per level.
        blocks: number of residual blocks per conditioner, for each level. The last entry applies to all further levels.
        hidden: number of hidden channels of the conditioners, for all levels or for each level. The last entry applies
            to all further levels.
        coupling: "additive", "affine" or "matrix_exp".
        num_levels: number of levels; None for as many as the image size allows, at most three.
        attention: apply self-attention over the pixels after the residual blocks of the conditioners. ``hidden`` must
            then be a multiple of 4.
        split: whether each level passes half of its channels directly to the output. With False all channels go
            through all levels.

    Returns:
        A bijection from images (B, C, H, W) to latents (B, C·H·W).

    Raises:
        ValueError: if ``event_shape`` is not that of an image or does not suit ``num_levels``, if ``blocks`` or
            ``hidden`` is empty, or if ``steps`` is below 1.
    """
    check_image_shape(event_shape, "mef")
    widths = (hidden,) if isinstance(hidden, int) else hidden
    check_at_least_one(**{"number of blocks": len(blocks), "number of widths (hidden)": len(widths)})

    def step(shape: Shape, level: int) -> list[Bijection]:
        width = widths[min(level, len(widths) - 1)]
        depth = blocks[min(level, len(blocks) - 1)]
        network = partial(ConvConditioner, hidden=width, blocks=depth, attention=attention)
        return [ActNorm(shape), InvertibleConv1x1(shape[0]), Coupling(shape[0], coupling, network)]

    return build_multiscale(event_shape, num_levels, steps, step, split)


def mef_tiny(event_shape: Shape, **overrides) -> Bijection:
    """Build an MEF for small greyscale images: 4 steps per level, one residual block of 32 channels."""
    return partial(build_mef, steps=4, blocks=(1,), hidden=32)(event_shape, **overrides)


def mef_small(event_shape: Shape, **overrides) -> Bijection:
    """Build an MEF of 3.6 M parameters at 32×32×3: 4 steps per level, one or two residual blocks of 64 channels."""
    return partial(build_mef, steps=4, blocks=(2, 2, 1), hidden=64)(event_shape, **overrides)


def mef_base(event_shape: Shape, **overrides) -> Bijection:
    """Build the MEF of the paper: 42.8 M parameters at 32×32×3."""
    return partial(build_mef, steps=8, blocks=(8, 4, 2), hidden=128)(event_shape, **overrides)
