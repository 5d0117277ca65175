"""Checks of class principal components that were read from a file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from flowaug.latents.pca import ClasswisePCA

AGAIN = "copy the whole folder again or train the flow again"
DTYPES = {"axes": ("F32",), "variance": ("F32",), "mean": ("F32",), "coords": ("F16", "F32"), "offsets": ("I64",)}
NDIM = {"axes": 3, "variance": 2, "mean": 2, "coords": 2, "offsets": 1}
LARGEST = 1e6  # of a class mean; the coordinates relative to it are float16, at most 65504
TOLERANCE = 1e-3  # float32 axes of 20,000 dimensions are orthonormal to 1e-5


def check_header(path: Path, header: Mapping, num_classes: int, dim: int) -> None:
    """Check names, data types and number of dimensions of the tensors of a file, and the sizes of the axes.

    Args:
        path: the file, for error messages.
        header: ``(dtype, shape)`` of each tensor.
        num_classes: number of classes K of the flow.
        dim: dimension D of its latents.

    Raises:
        ValueError: if the file does not hold the principal components of this flow.
    """
    if set(header) != set(DTYPES):
        raise ValueError(
            f"{path} holds {', '.join(sorted(header)) or 'nothing'}, expected {', '.join(DTYPES)}: it is not a saved "
            f"ClasswisePCA; {AGAIN}"
        )
    for name, (dtype, shape) in header.items():
        if dtype not in DTYPES[name] or len(shape) != NDIM[name]:
            raise ValueError(
                f"{path}: {name} is {dtype} of shape {tuple(shape)}, expected {' or '.join(DTYPES[name])} with "
                f"{NDIM[name]} dimensions; {AGAIN}"
            )
    classes, _, found = header["axes"][1]
    if (classes, found) != (num_classes, dim):
        raise ValueError(
            f"{path} is for {classes} classes and {found} dimensions, expected {num_classes} and {dim} as in the flow: "
            f"the two files do not belong together; {AGAIN}"
        )


def read_pca(path: Path, tensors: Mapping[str, Tensor]) -> ClasswisePCA:
    """Create a class PCA from the tensors of a file.

    All values must be finite, the axes orthonormal, the variances descending and no class empty.

    Args:
        path: the file, for error messages.
        tensors: its tensors, whose header was checked.

    Returns:
        The class PCA, on the CPU.

    Raises:
        ValueError: if the shapes do not match or one of these does not hold.
    """
    try:
        pca = ClasswisePCA.from_tensors(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {AGAIN}") from error
    infinite = [name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    faults = {
        f"{', '.join(infinite)} not finite": bool(infinite),
        "a class without samples": bool((pca.count < 1).any()),
        f"means beyond ±{LARGEST:.0e}": bool((pca.mean.abs() > LARGEST).any()),
        "a negative variance": bool((pca.variance < 0).any()),
        "variances that are not in descending order": bool(
            (pca.variance.diff() > TOLERANCE * pca.variance[:, :-1]).any()
        ),
        "axes that are not orthonormal": not _are_orthonormal(pca.axes),
    }
    found = [fault for fault, holds in faults.items() if holds]
    if found:
        raise ValueError(
            f"{path} has {found[0]}, expected finite values, orthonormal axes (zero beyond the rank of a class), "
            f"variances in descending order and at least one sample per class; {AGAIN}"
        )
    return pca


def _are_orthonormal(axes: Tensor) -> bool:
    """Return whether ``U Uᵀ v = v`` for a random ``v``, with zeros where an axis is zero; costs one pass over U."""
    used = (axes != 0).any(2)
    v = torch.randn(used.shape, generator=torch.Generator().manual_seed(0)) * used
    back = torch.einsum("krd,kd->kr", axes, torch.einsum("krd,kr->kd", axes, v))
    return bool(((back - v).norm(dim=1) <= TOLERANCE * (1 + v.norm(dim=1))).all())
