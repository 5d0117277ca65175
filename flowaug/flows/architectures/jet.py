"""Jet (Kolesnikov, Pinto & Tschannen, "Jet: A Modern Transformer-Based Normalizing Flow", 2024)."""

from functools import partial
from itertools import cycle, islice, product
from math import prod

import torch
from torch import Tensor

from flowaug.flows.architectures.multiscale import Shape, check_at_least_one, check_image_shape
from flowaug.flows.bijections import Bijection, Chain, FixedScale, Patchify, Reshape, TokenCoupling
from flowaug.flows.bijections.tokens import PATTERNS, halves_first, pattern_mask
from flowaug.flows.networks import TransformerConditioner

CHANNEL_COUPLINGS = 4  # number of channel couplings before each spatial coupling
SPATIAL = tuple(product(PATTERNS, (False, True)))  # (pattern, inverted) of the spatial couplings, used cyclically


def build_jet(
    event_shape: Shape, *, couplings: int, depth: int, width: int, heads: int, patch_size: int | None = None
) -> Bijection:
    """Build a Jet: patches, then couplings with vision transformers as conditioners.

    There are no ActNorms and no levels.

    Args:
        event_shape: (C, H, W), H and W divisible by ``2 * patch_size``.
        couplings: number of couplings. They alternate: four split the channels of every token into halves, then one
            splits the set of tokens.
        depth: number of encoder blocks per coupling.
        width: token size of the transformers; a multiple of ``heads``.
        heads: number of attention heads.
        patch_size: side of a patch in pixels; None for ``default_patch_size(event_shape)``.

    Returns:
        A bijection from images (B, C, H, W) to latents (B, C·H·W).

    Raises:
        ValueError: if ``event_shape`` is not that of an image or does not suit ``patch_size``, if ``heads`` does not
            divide ``width``, or if ``couplings`` or ``depth`` is below 1.
    """
    check_image_shape(event_shape, "jet")
    check_at_least_one(couplings=couplings, depth=depth)

    patch = default_patch_size(event_shape) if patch_size is None else patch_size
    grid = _token_grid(event_shape, patch)
    token_size = event_shape[0] * patch**2
    tokens = (grid[0] * grid[1], token_size)

    network = partial(TransformerConditioner, tokens=tokens[0], width=width, depth=depth, heads=heads)
    layers = [
        TokenCoupling(order, dim, network, tokens) for order, dim in _coupling_orders(couplings, grid, token_size)
    ]
    return Chain([FixedScale(0.5, 2.0), Patchify(event_shape, patch), *layers, Reshape(tokens, (prod(event_shape),))])


def default_patch_size(event_shape: Shape) -> int:
    """Return the default patch size.

    Args:
        event_shape: (C, H, W).

    Returns:
        4 if H and W are at least 16 and multiples of 8, otherwise 2.
    """
    return 4 if min(event_shape[1:]) >= 16 and not any(n % 8 for n in event_shape[1:]) else 2


def _token_grid(event_shape: Shape, patch: int) -> tuple[int, int]:
    channels, height, width = event_shape
    if patch < 1 or height % (2 * patch) or width % (2 * patch) or channels * patch**2 % 2:
        raise ValueError(
            f"jet splits the grid of {patch}×{patch} patches and the C·p² entries of a patch into halves: "
            f"{height}×{width} must be multiples of {2 * patch} and {channels}·{patch}² must be even; resize the "
            "images or change patch_size"
        )
    return height // patch, width // patch


def _coupling_orders(couplings: int, grid: tuple[int, int], token_size: int) -> list[tuple[Tensor, int]]:
    """Return ``order`` and ``dim`` of every ``TokenCoupling``; ``dim`` is 2 for channels and 1 for tokens."""
    patterns = cycle(SPATIAL)
    orders = []
    for dim in islice(cycle([2] * CHANNEL_COUPLINGS + [1]), couplings):
        order = torch.randperm(token_size) if dim == 2 else _spatial_order(grid, *next(patterns))
        orders.append((order, dim))
    return orders


def _spatial_order(grid: tuple[int, int], pattern: str, inverted: bool) -> Tensor:
    return halves_first(pattern_mask(grid, pattern) ^ inverted)


def jet_tiny(event_shape: Shape, **overrides) -> Bijection:
    """Build a Jet for small images: 10 couplings of depth 1, width 64."""
    return partial(build_jet, couplings=10, depth=1, width=64, heads=2)(event_shape, **overrides)


def jet_small(event_shape: Shape, **overrides) -> Bijection:
    """Build a Jet of about the size of ``mef_small``: 20 couplings of depth 1, width 112."""
    return partial(build_jet, couplings=20, depth=1, width=112, heads=2)(event_shape, **overrides)


def jet_base(event_shape: Shape, **overrides) -> Bijection:
    """Build a Jet of about the size of ``mef_base``: 30 couplings of depth 2, width 240.

    With 30 couplings every spatial pattern is used once.
    """
    return partial(build_jet, couplings=30, depth=2, width=240, heads=4)(event_shape, **overrides)
