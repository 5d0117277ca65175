"""Invertible layers with exact inverses and exact log-determinants."""

from flowaug.flows.bijections.base import Bijection, Chain, MultiScale
from flowaug.flows.bijections.coupling import Coupling
from flowaug.flows.bijections.linear import InvertibleConv1x1, PLUConv1x1
from flowaug.flows.bijections.pointwise import ActNorm, FixedScale
from flowaug.flows.bijections.reshape import Patchify, Permute, Reshape, Squeeze
from flowaug.flows.bijections.tokens import TokenCoupling

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
