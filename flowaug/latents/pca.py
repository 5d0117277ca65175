"""The principal axes of every class and the table of training coordinates in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

__all__ = ["ClasswisePCA"]

_GATHERED = 8  # axes per gather in `project`: fewer kernels than one by one, a block that stays in cache
_STORED = ("axes", "variance", "mean", "coords", "offsets")


class ClasswisePCA(nn.Module):
    r"""Leading principal axes :math:`U_y` of the latents of each class, and the training set in them.

    At rank :math:`N_y - 1` the axes carry the whole covariance of the class: the same object is the papers'
    re-estimated full covariance matrix (RFCM), drawn from with `sample`.

    Args:
        axes: `(K, R, D)` float32, orthonormal rows; rows of zeros past the rank of a class.
        variance: `(K, R)`, population variance along each axis, descending; 0 past the rank.
        mean: `(K, D)`, class means.
        coords: `(N, R)` float16, :math:`U_y (z_j - \mu_y)` of every training sample, grouped by class.
        offsets: `(K + 1,)` int64, class `y` owns the rows `offsets[y] : offsets[y + 1]`, so a random partner
            of class `y` is row `offsets[y] + floor(u * count[y])`.

    Attributes:
        labels: `(N,)` int64, the class of each row of `coords`.
        count: `(K,)` int64, rows per class.

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
        """Exact PCA of each class, one class in memory at a time.

        Args:
            latents: K tensors `(N_y, D)`, the latents of class 0, 1, …; a generator will do.
            rank: axes per class, R. A class of fewer than R + 1 samples is padded with zeros.
            partners: samples per class, evenly spread over it, whose coordinates are kept; None for all.

        Raises:
            ValueError: naming the class that is empty, has non-finite latents or another dimension.
        """
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if partners is not None and partners < 1:
            raise ValueError(f"partners must be at least 1, got {partners}; None keeps all")
        parts: list[list[Tensor]] = [[], [], [], []]
        for label, z in enumerate(latents):
            _check_class(z, label, dim=parts[2][0].shape[0] if label else None)
            for part, tensor in zip(parts, _fit_class(z, rank, label, partners), strict=True):
                part.append(tensor)
        if not parts[0]:
            raise ValueError("no class to fit: `latents` yielded nothing")
        counts = torch.tensor([0, *(len(coords) for coords in parts[3])], device=parts[3][0].device)
        axes, variance, mean = (torch.stack(part) for part in parts[:3])
        return cls(axes, variance, mean, torch.cat(parts[3]), counts.cumsum(0))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ClasswisePCA:
        """Back from `tensors()`, for example after `safetensors.torch.load_file`."""
        missing = [name for name in _STORED if name not in tensors]
        if missing:
            raise ValueError(f"not a class PCA: {', '.join(missing)} missing among {', '.join(tensors)}")
        return cls(*(tensors[name] for name in _STORED))

    def tensors(self) -> dict[str, Tensor]:
        """What to save: contiguous axes, variance, mean, coords, offsets (labels and count follow)."""
        return {name: getattr(self, name).contiguous() for name in _STORED}

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.axes.shape[0]

    @property
    def rank(self) -> int:
        """Axes per class, R."""
        return self.axes.shape[1]

    @property
    def dim(self) -> int:
        """The dimension D of the latents."""
        return self.axes.shape[2]

    def project(self, z: Tensor, y: Tensor, rank: int | None = None) -> Tensor:
        r"""Coordinates :math:`U_y (z - \mu_y)` in the axes of the own class.

        The axes are gathered a few at a time: never a `(B, R, D)` copy, no host synchronisation.

        Args:
            z: latents, `(B, D)`.
            y: integer labels, `(B,)`.
            rank: only the first `rank` axes; all R if None.

        Returns:
            `(B, rank)`.
        """
        if z.ndim != 2 or z.shape[1] != self.dim or y.shape != z.shape[:1]:
            expected = f"latents (B, {self.dim}) and labels (B,)"
            raise ValueError(f"expected {expected}, got {tuple(z.shape)} and {tuple(y.shape)}")
        offset = (z - self.mean.index_select(0, y)).to(self.axes.dtype)
        rows = self._rows(y, self.rank if rank is None else rank)
        table, parts = self.axes.flatten(0, 1), []
        for some in rows.split(_GATHERED, 1):
            gathered = table.index_select(0, some.T.flatten()).view(some.shape[1], *offset.shape)
            parts.append(torch.linalg.vecdot(gathered, offset))
        return torch.cat(parts).T

    def combine(self, a: Tensor, y: Tensor) -> Tensor:
        r"""The point :math:`U_y^\top a` that the coordinates stand for, relative to the class mean.

        Args:
            a: coordinates in the first r axes, `(B, r)`, `r <= R`.
            y: integer labels, `(B,)`.

        Returns:
            `(B, D)`.
        """
        if a.ndim != 2 or y.shape != a.shape[:1]:
            expected = f"coordinates (B, r <= {self.rank}) and labels (B,)"
            raise ValueError(f"expected {expected}, got {tuple(a.shape)} and {tuple(y.shape)}")
        rows, weights = self._rows(y, a.shape[1]), a.to(self.axes.dtype)
        return embedding_bag(rows, self.axes.flatten(0, 1), per_sample_weights=weights, mode="sum")

    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        r"""Draws :math:`\mu_y + U_y^\top \sqrt{\tau \Lambda_y}\,\varepsilon`: RFCM sampling at full rank.

        Args:
            y: integer labels, `(B,)`.
            temperature: scales the covariance; 0 gives the class means.
            generator: source of the randomness, on any device; the global one if None.

        Returns:
            Latents `(B, D)`.
        """
        if not temperature >= 0:
            raise ValueError(f"temperature scales the covariance and must be >= 0, got {temperature}")
        scale = (temperature * self.variance.index_select(0, y)).sqrt()
        device = scale.device if generator is None else generator.device
        noise = torch.randn(scale.shape, generator=generator, device=device, dtype=scale.dtype)
        return self.mean.index_select(0, y) + self.combine(scale * noise.to(scale.device), y)

    def extra_repr(self) -> str:
        """Sizes, for `print(pca)`."""
        return f"num_classes={self.num_classes}, rank={self.rank}, dim={self.dim}, samples={len(self.coords)}"

    def _rows(self, y: Tensor, rank: int) -> Tensor:
        """Rows `(B, rank)` of the flattened axes `(K·R, D)` that belong to the labels."""
        if not 1 <= rank <= self.rank:
            raise ValueError(f"asked for {rank} axes, this class PCA has {self.rank}")
        return y[:, None] * self.rank + torch.arange(rank, device=y.device)


def _fit_class(z: Tensor, rank: int, label: int, partners: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Axes `(R, D)`, variances `(R,)`, mean `(D,)` and half-precision coordinates `(N, R)` of one class."""
    wide = z.to(torch.float64)
    mean = wide.mean(0)
    centred = wide - mean
    axes, variance = _principal_axes(centred, rank)
    kept = len(z) if partners is None else min(partners, len(z))
    rows = torch.arange(kept, device=z.device) * len(z) // kept
    coords = (centred[rows] @ axes.T).to(torch.float16)
    if not torch.isfinite(coords).all():
        raise ValueError(f"coordinates of class {label} exceed half precision (65504): the latents diverged")
    return axes.float(), variance.float(), mean.float(), coords


def _principal_axes(centred: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal axes `(rank, D)` and population variances of centred samples `(N, D)`, zeros past the rank.

    From the smaller Gram matrix: eigenvectors `v` of `X Xᵀ / N` give the axes `Xᵀ v / √(N λ)`; the QR step
    restores the orthogonality that division by a small `λ` loses. Directions whose `λ` is rounding count as none.
    """
    n, d = centred.shape
    values, vectors = torch.linalg.eigh((centred @ centred.T if n <= d else centred.T @ centred) / n)
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    known = int((values > values[:1] * max(n, d) * torch.finfo(values.dtype).eps).sum())
    columns = vectors[:, :known] if n > d else torch.linalg.qr(centred.T @ vectors[:, :known])[0]
    axes, variance = centred.new_zeros(rank, d), centred.new_zeros(rank)
    axes[:known], variance[:known] = _fix_signs(columns.T), values[:known]
    return axes, variance


def _fix_signs(axes: Tensor) -> Tensor:
    """Makes the largest entry of each axis positive: `eigh` leaves the sign to chance."""
    if axes.numel() == 0:
        return axes
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return axes * largest.sign()


def _check_class(z: Tensor, label: int, dim: int | None) -> None:
    if z.ndim != 2 or z.shape[1] == 0 or (dim is not None and z.shape[1] != dim):
        expected = "D" if dim is None else dim
        raise ValueError(f"latents of class {label} must be (N_y, {expected}), got {tuple(z.shape)}")
    if len(z) == 0:
        raise ValueError(f"class {label} has no sample: its axes are undefined; leave the class out")
    if not torch.isfinite(z).all():
        raise ValueError(f"latents of class {label} are not all finite; the flow has diverged")


def _check_shapes(axes: Tensor, variance: Tensor, mean: Tensor, coords: Tensor, offsets: Tensor) -> None:
    k, r, d = axes.shape if axes.ndim == 3 else (-1, -1, -1)
    expected = ((k, r, d), (k, r), (k, d), (coords.shape[0], r), (k + 1,))
    found = tuple(tuple(tensor.shape) for tensor in (axes, variance, mean, coords, offsets))
    if found != expected:
        raise ValueError(f"axes, variance, mean, coords, offsets need shapes {expected}, got {found}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(coords) or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to the {len(coords)} rows of coords")
