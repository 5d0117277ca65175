"""Principal components of each class and the coordinates of the training latents in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

_GATHERED = 8  # components gathered at once in ``project``: few kernel launches, and the block stays in cache
_STORED = ("axes", "variance", "mean", "coords", "offsets")


class ClasswisePCA(nn.Module):
    r"""Leading principal components :math:`U_y` of the latents of each class, and the training coordinates.

    At rank :math:`N_y - 1` the components carry the whole covariance of the class. ``sample`` then draws from the
    re-estimated full covariance matrix (RFCM) of Enescu & Sahbi (ECCV 2024).

    Args:
        axes: principal components, ``(K, R, D)`` float32, with orthonormal rows; rows beyond the rank of a class
            are zero.
        variance: population variance along each component, ``(K, R)``, in descending order; 0 beyond the rank.
        mean: class means, ``(K, D)``.
        coords: coordinates :math:`U_y (z_j - \mu_y)` of the training samples, ``(N, R)`` float16, grouped by
            class.
        offsets: ``(K + 1,)`` int64. The rows of class ``y`` in ``coords`` are ``offsets[y] : offsets[y + 1]``. With
            ``u`` uniform in [0, 1), row ``offsets[y] + floor(u * count[y])`` is a random partner of class ``y``.

    Attributes:
        labels: class of each row of ``coords``, ``(N,)`` int64.
        count: number of rows of ``coords`` per class, ``(K,)`` int64.

    Raises:
        ValueError: if the shapes or the offsets do not match.

    Example:
        >>> pca = ClasswisePCA.fit([torch.tensor([[0.0, 1.0], [0.0, 3.0]])], rank=1)
        >>> pca.project(torch.tensor([[7.0, 5.0]]), torch.tensor([0])).tolist()
        [[3.0]]
    """

    axes: Tensor
    variance: Tensor
    mean: Tensor
    coords: Tensor
    offsets: Tensor
    labels: Tensor
    count: Tensor

    def __init__(self, axes: Tensor, variance: Tensor, mean: Tensor, coords: Tensor, offsets: Tensor) -> None:
        super().__init__()
        _check_shapes(axes, variance, mean, coords, offsets)
        for name, tensor in zip(_STORED, (axes, variance, mean, coords, offsets), strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("count", offsets.diff(), persistent=False)
        classes = torch.arange(len(axes), device=offsets.device)
        self.register_buffer("labels", classes.repeat_interleave(self.count), persistent=False)

    @classmethod
    @torch.no_grad()
    def fit(cls, latents: Iterable[Tensor], rank: int, partners: int | None = None) -> ClasswisePCA:
        """Compute the exact PCA of each class. Only one class needs to be in memory at a time.

        Args:
            latents: K tensors ``(N_y, D)``, the latents of classes 0, 1, … in order; may be a generator.
            rank: number of principal components per class, R. For a class with fewer than R + 1 samples, the
                remaining components are zero.
            partners: number of samples per class whose coordinates are kept, evenly spaced over the class.
                Defaults to all.

        Raises:
            ValueError: if a class is empty, has non-finite latents or another dimension than the first (the message
                names the class), or if ``rank`` or ``partners`` is less than 1.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if partners is not None and partners < 1:
            raise ValueError(f"partners must be at least 1, got {partners}; use None to keep all samples")

        parts: list[list[Tensor]] = [[], [], [], []]  # axes, variance, mean, coords
        for label, z in enumerate(latents):
            _check_class(z, label, dim=parts[2][0].shape[0] if label else None)
            for part, tensor in zip(parts, _fit_class(z, rank, label, partners), strict=True):
                part.append(tensor)
        if not parts[0]:
            raise ValueError("latents is empty; pass one tensor (N_y, D) per class")

        counts = torch.tensor([0, *(len(coords) for coords in parts[3])], device=parts[3][0].device)
        axes, variance, mean = (torch.stack(part) for part in parts[:3])
        return cls(axes, variance, mean, torch.cat(parts[3]), counts.cumsum(0))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ClasswisePCA:
        """Create an instance from the output of ``tensors``, e.g. loaded with ``safetensors.torch.load_file``.

        Raises:
            ValueError: if a tensor is missing or its shape does not match.
        """
        missing = [name for name in _STORED if name not in tensors]
        if missing:
            raise ValueError(
                f"not a saved ClasswisePCA: missing {', '.join(missing)}, found {', '.join(tensors) or 'nothing'}"
            )
        return cls(*(tensors[name] for name in _STORED))

    def view(self) -> ClasswisePCA:
        """Return a copy that shares the tensors; moving one of the two to a device leaves the other."""
        return ClasswisePCA(*(getattr(self, name) for name in _STORED))

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors to save: axes, variance, mean, coords and offsets, each contiguous."""
        return {name: getattr(self, name).contiguous() for name in _STORED}

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self.axes.shape[0]

    @property
    def rank(self) -> int:
        """Number of principal components per class R."""
        return self.axes.shape[1]

    @property
    def dim(self) -> int:
        """Dimension D of the latents."""
        return self.axes.shape[2]

    def project(self, z: Tensor, y: Tensor, rank: int | None = None) -> Tensor:
        r"""Compute the coordinates :math:`U_y (z - \mu_y)` in the principal components of the labeled class.

        A few components are gathered at a time. This avoids a copy of size ``(B, R, D)`` and needs no host
        synchronization.

        Args:
            z: latents, ``(B, D)``.
            y: integer labels, ``(B,)``.
            rank: number of leading components to use. Defaults to all R.

        Returns:
            ``(B, rank)``.

        Raises:
            ValueError: if a shape is wrong or ``rank`` is not in [1, R].
        """
        if z.ndim != 2 or z.shape[1] != self.dim or y.shape != z.shape[:1]:
            expected = f"latents (B, {self.dim}) and labels (B,)"
            raise ValueError(f"expected {expected}, got {tuple(z.shape)} and {tuple(y.shape)}")

        offset = (z - self.mean.index_select(0, y)).to(self.axes.dtype)
        rows = self._rows(y, self.rank if rank is None else rank)
        flat_axes = self.axes.flatten(0, 1)
        parts = []
        for chunk in rows.split(_GATHERED, 1):
            gathered = flat_axes.index_select(0, chunk.T.flatten()).view(chunk.shape[1], *offset.shape)
            parts.append(torch.linalg.vecdot(gathered, offset))
        return torch.cat(parts).T

    def combine(self, a: Tensor, y: Tensor) -> Tensor:
        r"""Compute the linear combination :math:`U_y^\top a` of principal components, relative to the class mean.

        Args:
            a: coordinates in the first ``r`` components, ``(B, r)`` with ``r <= R``.
            y: integer labels, ``(B,)``.

        Returns:
            ``(B, D)``.

        Raises:
            ValueError: if a shape is wrong or ``r`` is not in [1, R].
        """
        if a.ndim != 2 or y.shape != a.shape[:1]:
            expected = f"coordinates (B, r <= {self.rank}) and labels (B,)"
            raise ValueError(f"expected {expected}, got {tuple(a.shape)} and {tuple(y.shape)}")
        rows, weights = self._rows(y, a.shape[1]), a.to(self.axes.dtype)
        return embedding_bag(rows, self.axes.flatten(0, 1), per_sample_weights=weights, mode="sum")

    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        r"""Draw samples :math:`\mu_y + U_y^\top \sqrt{\tau \Lambda_y}\,\varepsilon` with standard normal ε.

        At full rank this is RFCM sampling (Enescu & Sahbi, ECCV 2024).

        Args:
            y: integer labels, ``(B,)``.
            temperature: factor :math:`\tau \ge 0` of the covariance; 0 returns the class means.
            generator: random number generator, on any device. Defaults to the global one.

        Returns:
            Latents, ``(B, D)``.

        Raises:
            ValueError: if ``temperature`` is negative or NaN.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature scales the covariance and must be >= 0, got {temperature}")
        scale = (temperature * self.variance.index_select(0, y)).sqrt()
        device = scale.device if generator is None else generator.device
        noise = torch.randn(scale.shape, generator=generator, device=device, dtype=scale.dtype)
        return self.mean.index_select(0, y) + self.combine(scale * noise.to(scale.device), y)

    def extra_repr(self) -> str:
        """Return the sizes shown by ``print(pca)``."""
        return f"num_classes={self.num_classes}, rank={self.rank}, dim={self.dim}, samples={len(self.coords)}"

    def _rows(self, y: Tensor, rank: int) -> Tensor:
        """Return the rows of the flattened axes ``(K * R, D)`` that belong to each label, ``(B, rank)``."""
        if not 1 <= rank <= self.rank:
            raise ValueError(
                f"rank must be in [1, {self.rank}], got {rank}; fit a ClasswisePCA of higher rank for more"
            )
        return y[:, None] * self.rank + torch.arange(rank, device=y.device)


def _fit_class(z: Tensor, rank: int, label: int, partners: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute axes ``(R, D)``, variances ``(R,)``, mean ``(D,)`` and float16 coordinates ``(N, R)`` of one class."""
    z64 = z.to(torch.float64)
    mean = z64.mean(0)
    centered = z64 - mean
    axes, variance = _principal_axes(centered, rank)

    kept = len(z) if partners is None else min(partners, len(z))
    rows = torch.arange(kept, device=z.device) * len(z) // kept
    coords = (centered[rows] @ axes.T).to(torch.float16)
    if not torch.isfinite(coords).all():
        raise ValueError(
            f"coordinates of class {label} exceed the float16 range (±65504): the flow has diverged; train it again "
            "with a lower learning rate"
        )
    return axes.float(), variance.float(), mean.float(), coords


def _principal_axes(centered: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute orthonormal axes ``(rank, D)`` and population variances of centered samples ``(N, D)``.

    The smaller of the two Gram matrices is decomposed. If N <= D, an eigenvector ``v`` of ``X Xᵀ / N`` with
    eigenvalue ``λ`` gives the axis ``Xᵀ v / √(N λ)``. A QR decomposition does this normalization and restores the
    orthogonality that is lost for small ``λ``. Eigenvalues at the level of rounding errors are treated as zero;
    their axes and variances are zero.
    """
    n, d = centered.shape
    gram = (centered @ centered.T if n <= d else centered.T @ centered) / n
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]  # eigh sorts in ascending order

    positive = int((values > values[:1] * max(n, d) * torch.finfo(values.dtype).eps).sum())
    if n > d:
        columns = vectors[:, :positive]
    else:
        columns = torch.linalg.qr(centered.T @ vectors[:, :positive])[0]

    axes, variance = centered.new_zeros(rank, d), centered.new_zeros(rank)
    axes[:positive] = _fix_signs(columns.T)
    variance[:positive] = values[:positive]
    return axes, variance


def _fix_signs(axes: Tensor) -> Tensor:
    """Flip axes so that the largest entry of each is positive; the sign returned by ``eigh`` is arbitrary."""
    if axes.numel() == 0:
        return axes
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return axes * largest.sign()


def _check_class(z: Tensor, label: int, dim: int | None) -> None:
    if z.ndim != 2 or z.shape[1] == 0 or (dim is not None and z.shape[1] != dim):
        expected = "D" if dim is None else dim
        raise ValueError(f"latents of class {label} must be (N_y, {expected}), got {tuple(z.shape)}")
    if len(z) == 0:
        raise ValueError(f"class {label} has no samples, so it has no principal components; leave the class out")
    if not torch.isfinite(z).all():
        raise ValueError(
            f"latents of class {label} contain NaN or infinity: the flow has diverged; train it again with a lower "
            "learning rate"
        )


def _check_shapes(axes: Tensor, variance: Tensor, mean: Tensor, coords: Tensor, offsets: Tensor) -> None:
    k, r, d = axes.shape if axes.ndim == 3 else (-1, -1, -1)
    expected = ((k, r, d), (k, r), (k, d), (coords.shape[0], r), (k + 1,))
    found = tuple(tuple(tensor.shape) for tensor in (axes, variance, mean, coords, offsets))
    if found != expected:
        raise ValueError(f"axes, variance, mean, coords and offsets must have shapes {expected}, got {found}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(coords) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"offsets must be non-decreasing from 0 to {len(coords)}, the number of rows of coords; got offsets from "
            f"{int(offsets[0])} to {int(offsets[-1])}"
        )
