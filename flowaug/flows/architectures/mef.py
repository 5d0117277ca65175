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
    """Matrix exponential flow: ActNorm, 1×1 convolution and coupling, level by level.

    Args:
        event_shape: (C, H, W), H and W divisible by ``2 ** num_levels``.
        steps: steps per level.
        blocks: residual blocks of the conditioners of each level; the last entry serves all further levels.
        hidden: width of the conditioners, of all levels or of each; the last entry serves all further levels.
        coupling: "additive", "affine" or "matrix_exp".
        num_levels: number of levels, None for as many as the size allows (three at most).
        attention: end the conditioners' residual blocks with self-attention over the pixels; ``hidden`` must be a
            multiple of 4.
        split: whether each level hands half of its channels to the output; False takes all through all levels.
    """
    check_image_shape(event_shape, "mef")
    widths = (hidden,) if isinstance(hidden, int) else hidden
    check_at_least_one(**{"number of blocks": len(blocks), "number of widths (hidden)": len(widths)})

    def step(shape: Shape, level: int) -> list[Bijection]:
        width, depth = (sizes[min(level, len(sizes) - 1)] for sizes in (widths, blocks))
        network = partial(ConvConditioner, hidden=width, blocks=depth, attention=attention)
        return [ActNorm(shape), InvertibleConv1x1(shape[0]), Coupling(shape[0], coupling, network)]

    return build_multiscale(event_shape, num_levels, steps, step, split)


def mef_tiny(event_shape: Shape, **overrides) -> Bijection:
    """MEF for small grey images: 4 steps per level, one block of width 32."""
    return build_mef(event_shape, **({"steps": 4, "blocks": (1,), "hidden": 32} | overrides))


def mef_small(event_shape: Shape, **overrides) -> Bijection:
    """MEF of 3.6 M parameters at 32×32×3: 4 steps per level, two blocks of width 64."""
    return build_mef(event_shape, **({"steps": 4, "blocks": (2, 2, 1), "hidden": 64} | overrides))


def mef_base(event_shape: Shape, **overrides) -> Bijection:
    """The paper's MEF: 42.8 M parameters at 32×32×3."""
    return build_mef(event_shape, **({"steps": 8, "blocks": (8, 4, 2), "hidden": 128} | overrides))
