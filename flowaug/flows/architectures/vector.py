"""Flows over vectors, such as the latents of an autoencoder or toy data: couplings with MLPs as conditioners.

Source: Dinh et al., "Density Estimation Using Real NVP", ICLR 2017.
"""

from functools import partial

import torch
from torch import Tensor

from flowaug.flows.architectures.multiscale import check_at_least_one
from flowaug.flows.bijections import ActNorm, Bijection, Chain, Coupling, Permute, Reshape
from flowaug.flows.networks import PlainConditioner


def build_vector(
    event_shape: tuple[int], *, couplings: int, hidden: int, layers: int, coupling: str = "affine"
) -> Bijection:
    """Build a flow over vectors: an ActNorm that standardises the data, then permutations and couplings in turn.

    Args:
        event_shape: (D,), D at least 2.
        couplings: number of couplings, each after a fixed random permutation.
        hidden: size of a hidden layer of the conditioners.
        layers: number of hidden layers of the conditioners.
        coupling: "additive", "affine" or "matrix_exp".

    Returns:
        A bijection from vectors (B, D) to latents (B, D).

    Raises:
        ValueError: if ``event_shape`` is not (D,) with D at least 2, or ``couplings`` is below 1.
    """
    _check_vector_shape(event_shape)
    check_at_least_one(couplings=couplings)

    (dim,) = event_shape
    pixel = (dim, 1, 1)  # a vector as an image of one pixel, so that 1×1 convolutions act as an MLP
    network = partial(PlainConditioner, hidden=hidden, kernels=(1,) * (layers + 1))
    steps = []
    for order in fair_permutations(dim, couplings):
        steps += [Permute(order), Coupling(dim, coupling, network)]
    return Chain([ActNorm((dim,)), Reshape((dim,), pixel), *steps, Reshape(pixel, (dim,))])


def _check_vector_shape(event_shape: tuple[int, ...]) -> None:
    if len(event_shape) != 1 or event_shape[0] < 2:
        raise ValueError(
            f"vector flows take vectors of at least 2 dimensions, but event_shape is {tuple(event_shape)}; expected "
            "(D,), or choose a mef_*, jet_* or glow_* flow for images (channels, height, width)"
        )


def fair_permutations(dim: int, count: int) -> list[Tensor]:
    """Draw random permutations such that the couplings transform all dimensions equally often (± 1).

    Each permutation moves the dimensions that were transformed least often to the transformed half. Ties are broken at
    random. With independent random permutations some dimensions could stay untransformed: with two dimensions and eight
    couplings this happens in one of 128 flows.

    Args:
        dim: number of dimensions D.
        count: number of couplings.

    Returns:
        One permutation (D,) per coupling, relative to the order after the previous permutation.
    """
    turns = torch.zeros(dim)  # how often each dimension was transformed
    layout = torch.arange(dim)  # the dimension at each position
    relative = []
    for _ in range(count):
        order = torch.argsort(turns + 0.5 * torch.rand(dim), descending=True)
        relative.append(torch.argsort(layout)[order])
        layout = order
        turns[order[dim - dim // 2 :]] += 1
    return relative


def vector_tiny(event_shape: tuple[int], **overrides) -> Bijection:
    """Build a flow over vectors with 4 couplings of two hidden layers of size 64."""
    return partial(build_vector, couplings=4, hidden=64, layers=2)(event_shape, **overrides)


def vector_small(event_shape: tuple[int], **overrides) -> Bijection:
    """Build a flow over vectors with 8 couplings of two hidden layers of size 256."""
    return partial(build_vector, couplings=8, hidden=256, layers=2)(event_shape, **overrides)


def vector_base(event_shape: tuple[int], **overrides) -> Bijection:
    """Build a flow over vectors with 8 couplings of three hidden layers of size 512.

    These are the sizes of the GMM-8 experiment of Xiao et al. 2019.
    """
    return partial(build_vector, couplings=8, hidden=512, layers=3)(event_shape, **overrides)
