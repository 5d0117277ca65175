"""Jet (Kolesnikov, Pinto & Tschannen, "Jet: A Modern Transformer-Based Normalizing Flow", 2024)."""

from functools import partial
from itertools import cycle, islice, product

import torch
from torch import Tensor

from flowaug.flows.architectures.multiscale import Shape, check_at_least_one, check_image_shape
from flowaug.flows.bijections import Bijection, Chain, FixedScale, Patchify, Reshape, TokenCoupling
from flowaug.flows.bijections.tokens import PATTERNS, halves_first, pattern_mask
from flowaug.flows.networks import TransformerConditioner

CHANNEL_COUPLINGS = 4  # channel couplings before each spatial one
SPATIAL = tuple(product(PATTERNS, (False, True)))  # (pattern, inverted), in turn


def build_jet(
    event_shape: Shape, *, couplings: int, depth: int, width: int, heads: int, patch_size: int | None = None
) -> Bijection:
    """Jet: patches, then couplings whose conditioners are vision transformers. No ActNorm, no levels.

    Args:
        event_shape: (C, H, W), H and W divisible by ``2 * patch_size``.
        couplings: number of couplings; of five, four divide the entries of a token and one divides the tokens.
        depth: encoder blocks per coupling.
        width: width of the transformers, a multiple of ``heads``.
        heads: attention heads.
        patch_size: side of a patch, None for 4 where the image is at least 16 pixels wide and high, 2 elsewhere.
    """
    check_image_shape(event_shape, "jet")
    check_at_least_one(couplings=couplings, depth=depth)
    patch = default_patch_size(event_shape) if patch_size is None else patch_size
    grid, size = _grid(event_shape, patch), event_shape[0] * patch**2
    tokens = (grid[0] * grid[1], size)
    network = partial(TransformerConditioner, tokens=tokens[0], width=width, depth=depth, heads=heads)
    layers = [TokenCoupling(order, dim, network, tokens) for order, dim in _orders(couplings, grid, size)]
    flat = event_shape[0] * event_shape[1] * event_shape[2]
    return Chain([FixedScale(0.5, 2.0), Patchify(event_shape, patch), *layers, Reshape(tokens, (flat,))])


def default_patch_size(event_shape: Shape) -> int:
    """4, or 2 for images that are small or no multiples of 8."""
    return 4 if min(event_shape[1:]) >= 16 and not any(n % 8 for n in event_shape[1:]) else 2


def _grid(event_shape: Shape, patch: int) -> tuple[int, int]:
    channels, height, width = event_shape
    if patch < 1 or height % (2 * patch) or width % (2 * patch) or channels * patch**2 % 2:
        raise ValueError(
            f"jet halves both the grid of {patch}×{patch} patches and their C·p² entries: {height}×{width} must be "
            f"multiples of {2 * patch} and {channels}·{patch}² must be even; resize the images or change patch_size"
        )
    return height // patch, width // patch


def _orders(couplings: int, grid: tuple[int, int], size: int) -> list[tuple[Tensor, int]]:
    """Order and dimension (2: entries, 1: tokens) of every coupling."""
    patterns, orders = cycle(SPATIAL), []
    for dim in islice(cycle([2] * CHANNEL_COUPLINGS + [1]), couplings):
        orders.append((torch.randperm(size) if dim == 2 else _spatial_order(grid, *next(patterns)), dim))
    return orders


def _spatial_order(grid: tuple[int, int], pattern: str, inverted: bool) -> Tensor:
    return halves_first(pattern_mask(grid, pattern) ^ inverted)


def jet_tiny(event_shape: Shape, **overrides) -> Bijection:
    """Jet for small images: 10 couplings of depth 1, width 64."""
    return build_jet(event_shape, **({"couplings": 10, "depth": 1, "width": 64, "heads": 2} | overrides))


def jet_small(event_shape: Shape, **overrides) -> Bijection:
    """Jet about the size of ``mef_small``: 20 couplings of depth 1, width 112."""
    return build_jet(event_shape, **({"couplings": 20, "depth": 1, "width": 112, "heads": 2} | overrides))


def jet_base(event_shape: Shape, **overrides) -> Bijection:
    """Jet about the size of ``mef_base``: 30 couplings (every spatial pattern once) of depth 2, width 240."""
    return build_jet(event_shape, **({"couplings": 30, "depth": 2, "width": 240, "heads": 4} | overrides))
