"""Couplings with perceptrons, for vectors: latents of an autoencoder, toy densities (RealNVP, Dinh et al. 2017)."""

from functools import partial

import torch
from torch import Tensor

from flowaug.flows.architectures.multiscale import check_at_least_one
from flowaug.flows.bijections import ActNorm, Bijection, Chain, Coupling, Permute, Reshape
from flowaug.flows.networks import PlainConditioner


def build_vector(
    event_shape: tuple[int], *, couplings: int, hidden: int, layers: int, coupling: str = "affine"
) -> Bijection:
    """Couplings with fixed random permutations between them, over an ActNorm that standardises the data.

    Args:
        event_shape: (D,), D at least 2.
        couplings: number of couplings.
        hidden: width of the conditioners.
        layers: hidden layers of the conditioners.
        coupling: "additive", "affine" or "matrix_exp".
    """
    _check_vector_shape(event_shape)
    check_at_least_one(couplings=couplings)
    (dim,) = event_shape
    network = partial(PlainConditioner, hidden=hidden, kernels=(1,) * (layers + 1))
    steps = [s for p in fair_permutations(dim, couplings) for s in (Permute(p), Coupling(dim, coupling, network))]
    pixel = (dim, 1, 1)
    return Chain([ActNorm((dim,)), Reshape((dim,), pixel), *steps, Reshape(pixel, (dim,))])


def _check_vector_shape(event_shape: tuple[int, ...]) -> None:
    if len(event_shape) != 1 or event_shape[0] < 2:
        raise ValueError(
            f"vector flows take vectors of at least 2 dimensions, but event_shape is {tuple(event_shape)}; expected "
            "(D,), or choose a mef_*, jet_* or glow_* flow for images (channels, height, width)"
        )


def fair_permutations(dim: int, count: int) -> list[Tensor]:
    """Random permutations, one before each coupling, after which all dimensions have had as many turns (± 1).

    Each brings the dimensions that were transformed least to the transformed half, ties at random. Free permutations
    would, of two dimensions and eight couplings, leave one untouched in one flow of 128.

    Args:
        dim: number of dimensions D.
        count: number of couplings.

    Returns:
        Permutations (D,), each relative to the order that the one before it left.
    """
    turns, layout, relative = torch.zeros(dim), torch.arange(dim), []
    for _ in range(count):
        order = torch.argsort(turns + 0.5 * torch.rand(dim), descending=True)
        relative.append(torch.argsort(layout)[order])
        layout = order
        turns[order[dim - dim // 2 :]] += 1
    return relative


def vector_tiny(event_shape: tuple[int], **overrides) -> Bijection:
    """4 couplings of two layers of 64."""
    return build_vector(event_shape, **({"couplings": 4, "hidden": 64, "layers": 2} | overrides))


def vector_small(event_shape: tuple[int], **overrides) -> Bijection:
    """8 couplings of two layers of 256."""
    return build_vector(event_shape, **({"couplings": 8, "hidden": 256, "layers": 2} | overrides))


def vector_base(event_shape: tuple[int], **overrides) -> Bijection:
    """8 couplings of three layers of 512: the GMM-8 network of Xiao et al. 2019."""
    return build_vector(event_shape, **({"couplings": 8, "hidden": 512, "layers": 3} | overrides))
