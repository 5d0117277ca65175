"""Bijections with exact inverses and exact log-determinants."""

from flowaug.bijections.base import Bijection, Chain, MultiScale
from flowaug.bijections.coupling import Coupling
from flowaug.bijections.linear import InvertibleConv1x1
from flowaug.bijections.pointwise import ActNorm
from flowaug.bijections.reshape import Squeeze

__all__ = ["ActNorm", "Bijection", "Chain", "Coupling", "InvertibleConv1x1", "MultiScale", "Squeeze"]
