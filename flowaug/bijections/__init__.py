"""Bijections with exact inverses and exact log-determinants."""

from flowaug.bijections.base import Bijection, Chain, MultiScale
from flowaug.bijections.coupling import Coupling
from flowaug.bijections.linear import InvertibleConv1x1, PLUConv1x1
from flowaug.bijections.pointwise import ActNorm, FixedScale
from flowaug.bijections.reshape import Patchify, Permute, Reshape, Squeeze
from flowaug.bijections.tokens import TokenCoupling

__all__ = [
    "ActNorm",
    "Bijection",
    "Chain",
    "Coupling",
    "FixedScale",
    "InvertibleConv1x1",
    "MultiScale",
    "PLUConv1x1",
    "Patchify",
    "Permute",
    "Reshape",
    "Squeeze",
    "TokenCoupling",
]
