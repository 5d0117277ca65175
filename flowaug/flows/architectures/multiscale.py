"""Multi-scale structure of MEF and Glow.

Each level squeezes 2×2 pixels into channels, applies some steps and passes half of its channels to the output.
"""

from collections.abc import Callable
from math import prod

from flowaug.flows.bijections import Bijection, Chain, MultiScale, Reshape, Squeeze

Shape = tuple[int, int, int]
MAX_LEVELS = 3


def check_image_shape(event_shape: tuple[int, ...], name: str) -> None:
    """Raise a ``ValueError`` unless ``event_shape`` is (C, H, W)."""
    if len(event_shape) != 3:
        raise ValueError(
            f"{name} flows take images, but event_shape is {tuple(event_shape)}; expected (channels, height, width), "
            "or choose a vector_* flow for vectors (D,)"
        )


def check_at_least_one(**counts: int) -> None:
    """Raise a ``ValueError`` that names the first keyword argument below 1, if there is one."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; expected at least 1")


def default_num_levels(height: int, width: int) -> int:
    """Return the default number of levels for an image size.

    This is the number of times that the size can be halved such that at least 2×2 pixels remain, at most three.
    """
    level = 0
    while level < MAX_LEVELS and height % 2 == width % 2 == 0 and min(height, width) >= 4:
        height //= 2
        width //= 2
        level += 1
    return level


def _check_size(event_shape: Shape, num_levels: int) -> None:
    _, height, width = event_shape
    step = 2**num_levels
    if num_levels < 1 or height % step or width % step:
        raise ValueError(
            f"a multi-scale flow halves the image once per level: {height}×{width} must be multiples of 2, at least 4, "
            f"and multiples of {max(step, 2)} for num_levels={num_levels}; resize the images or change num_levels"
        )


def build_multiscale(
    event_shape: Shape,
    num_levels: int | None,
    steps: int,
    make_step: Callable[[Shape, int], list[Bijection]],
    split: bool = True,
) -> Bijection:
    """Build a multi-scale flow from a function that makes one step.

    Args:
        event_shape: (C, H, W), H and W divisible by ``2 ** num_levels``.
        num_levels: number of levels; None for as many as the image size allows, at most three.
        steps: steps per level.
        make_step: returns the bijections of one step, given their event shape (C, H, W) and the index of the level.
        split: whether each level passes half of its channels directly to the output (RealNVP, Dinh et al. 2017,
            Section 3.6). With False all channels go through all levels, which is slower and treats all dimensions
            alike.

    Returns:
        A bijection from images (B, C, H, W) to latents (B, C·H·W).

    Raises:
        ValueError: if the image size does not suit ``num_levels``, or ``steps`` is below 1.
    """
    channels, height, width = event_shape
    num_levels = default_num_levels(height, width) if num_levels is None else num_levels
    _check_size(event_shape, num_levels)
    check_at_least_one(steps=steps)

    levels, shapes = [], []
    for level in range(num_levels):
        channels, height, width = 4 * channels, height // 2, width // 2
        shapes.append((channels, height, width))
        layers = [layer for _ in range(steps) for layer in make_step(shapes[-1], level)]
        levels.append(Chain([Squeeze(), *layers]))
        channels -= channels // 2 if split else 0

    if split:
        return MultiScale(levels, shapes)
    return Chain([*levels, Reshape(shapes[-1], (prod(shapes[-1]),))])
