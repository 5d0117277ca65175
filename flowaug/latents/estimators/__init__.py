"""Estimators of the class Gaussians from class moments: fixed-point iteration, GLEM, gradient descent, data."""

from flowaug.latents.estimators.descent import LR_POLICIES, gradient_descent
from flowaug.latents.estimators.divergence import objective, pairwise_kld
from flowaug.latents.estimators.fpi import VARIANCE_BOUNDS, FixedPoint, data_initialisation, fpi
from flowaug.latents.estimators.glem import Glem, glem

__all__ = [
    "LR_POLICIES",
    "VARIANCE_BOUNDS",
    "FixedPoint",
    "Glem",
    "data_initialisation",
    "fpi",
    "glem",
    "gradient_descent",
    "objective",
    "pairwise_kld",
]
