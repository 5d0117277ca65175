"""Sufficient statistics of the class Gaussians: per-class sums in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float64).eps


class ClassMoments:
    r"""Count, :math:`\sum z` and :math:`\sum z^2` of the latents of each class, in float64.

    These three sums are all that the estimators of the class Gaussians need. The sums of two shards are merged
    by adding them, so they are also all that distributed processes exchange.

    Args:
        count: number of samples per class, ``(K,)`` int64.
        total: sum of the latents per class, ``(K, D)`` float64.
        squares: sum of the squared latents per class, ``(K, D)`` float64.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> z, y = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
        >>> ClassMoments.of(z, y, num_classes=2).mean.tolist()
        [[1.0], [5.0]]
    """

    def __init__(self, count: Tensor, total: Tensor, squares: Tensor) -> None:
        if count.ndim != 1 or total.ndim != 2 or total.shape != squares.shape or len(count) != len(total):
            shapes = f"{tuple(count.shape)}, {tuple(total.shape)} and {tuple(squares.shape)}"
            raise ValueError(f"count, total and squares must have shapes (K,), (K, D) and (K, D), got {shapes}")
        self._count = count.to(torch.int64)
        self._total = total.to(torch.float64)
        self._squares = squares.to(torch.float64)

    @classmethod
    def zeros(cls, num_classes: int, dim: int, device: torch.device | str | None = None) -> ClassMoments:
        """Return the moments of zero samples, to be accumulated over batches with ``update``.

        Args:
            num_classes: number of classes K.
            dim: dimension D of the latents.
            device: device of the sums.

        Raises:
            ValueError: if ``num_classes`` or ``dim`` is less than 1.
        """
        if num_classes < 1 or dim < 1:
            raise ValueError(f"num_classes and dim must be at least 1, got {num_classes} and {dim}")
        count = torch.zeros(num_classes, dtype=torch.int64, device=device)
        sums = torch.zeros(2, num_classes, dim, dtype=torch.float64, device=device)
        return cls(count, sums[0], sums[1])

    @classmethod
    def of(cls, z: Tensor, y: Tensor, num_classes: int) -> ClassMoments:
        """Compute the moments of one set of latents.

        Args:
            z: latents, ``(B, D)``.
            y: integer labels, ``(B,)``.
            num_classes: number of classes K.

        Raises:
            ValueError: see ``update``.
        """
        if z.ndim != 2:
            raise ValueError(f"latents must be (B, D), got {tuple(z.shape)}; flatten them with z.flatten(1)")
        return cls.zeros(num_classes, z.shape[1], z.device).update(z, y)

    @torch.no_grad()
    def update(self, z: Tensor, y: Tensor) -> ClassMoments:
        """Add a batch in place and return ``self``. An invalid batch leaves the moments unchanged.

        Args:
            z: latents, ``(B, D)``.
            y: integer labels, ``(B,)``.

        Raises:
            ValueError: if a shape is wrong, a label is not an integer or out of range, or a latent is not finite.
        """
        z, y = z.to(self.device), y.to(self.device)
        self._check_batch(z, y)

        z64 = z.to(torch.float64)
        self._count += torch.bincount(y, minlength=self.num_classes)
        self._total.index_add_(0, y, z64)
        self._squares.index_add_(0, y, z64.square())
        return self

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Return the moments of both shards together, as a new object.

        Args:
            other: moments of the other shard, with the same K and D.

        Raises:
            ValueError: if K or D differ.
        """
        if self._total.shape != other._total.shape:
            ours, theirs = tuple(self._total.shape), tuple(other._total.shape)
            raise ValueError(f"cannot merge moments of different shapes (K, D): {ours} and {theirs}")
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        return ClassMoments(*(ours + theirs.to(ours.device) for ours, theirs in pairs))

    def tensors(self) -> dict[str, Tensor]:
        """Return the three sums without copying them.

        To merge the moments of distributed processes, all-reduce each tensor in place with ``SUM``.
        """
        return {"count": self._count, "total": self._total, "squares": self._squares}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ClassMoments:
        """Create moments from the output of ``tensors``, for example after loading it from a file."""
        return cls(tensors["count"], tensors["total"], tensors["squares"])

    def to(self, device: torch.device | str) -> ClassMoments:
        """Return the same moments on another device."""
        return ClassMoments(*(tensor.to(device) for tensor in self.tensors().values()))

    @property
    def device(self) -> torch.device:
        """Device of the sums."""
        return self._total.device

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return self._total.shape[0]

    @property
    def dim(self) -> int:
        """Dimension D of the latents."""
        return self._total.shape[1]

    @property
    def count(self) -> Tensor:
        """Number of samples per class, ``(K,)`` int64."""
        return self._count

    @property
    def mean(self) -> Tensor:
        """Class means, ``(K, D)`` float64.

        Raises:
            ValueError: if a class has no samples.
        """
        return self._total / self._divisor()

    @property
    def variance(self) -> Tensor:
        r"""Population variance (divided by :math:`N_y`) of each class, ``(K, D)`` float64, never negative.

        It is computed as :math:`E[z^2] - m^2`. Summing :math:`N_y` terms in float64 has a relative error of up to
        :math:`N_y \epsilon` on :math:`E[z^2]`. A variance below this error is set to 0. For 10,000 samples the
        limit is a standard deviation of 1.5e-6 times the root mean square, about 12 times the float32 epsilon.

        Raises:
            ValueError: if a class has no samples.
        """
        divisor = self._divisor()
        second_moment = self._squares / divisor
        variance = second_moment - (self._total / divisor).square_()
        return variance.masked_fill_(variance <= second_moment.mul_(divisor * _EPS), 0.0)

    def _divisor(self) -> Tensor:
        """Return the sample counts as ``(K, 1)`` float64; raise if one of them is 0."""
        empty = torch.nonzero(self._count == 0).flatten().tolist()
        if empty:
            raise ValueError(
                f"no samples for class {_format_list(empty)} of {self.num_classes}: the class mean is undefined; "
                "add latents of that class, or leave it out and renumber the classes"
            )
        return self._count.to(torch.float64)[:, None]

    def _check_batch(self, z: Tensor, y: Tensor) -> None:
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise ValueError(f"latents must be (B, {self.dim}), got {tuple(z.shape)}")
        if not z.is_floating_point():
            raise ValueError(f"latents must be floating point, got {z.dtype}")
        check_labels(y, self.num_classes, batch=len(z))

        invalid = torch.nonzero(~torch.isfinite(z).all(dim=1)).flatten().tolist()
        if invalid:
            classes = sorted({int(y[i]) for i in invalid})
            raise ValueError(
                f"{len(invalid)} of {len(z)} latents are not finite (class {_format_list(classes)}, first at row "
                f"{invalid[0]} of the batch); either the flow has diverged or its input was not in [0, 1]"
            )


def check_labels(y: Tensor, num_classes: int, batch: int) -> None:
    """Check that there is one valid label per sample.

    Args:
        y: labels to check; must be integers in ``[0, num_classes)``, of shape ``(batch,)``.
        num_classes: number of classes K.
        batch: number of samples.

    Raises:
        ValueError: if the shape, the dtype or a value is invalid.
    """
    if y.ndim != 1 or len(y) != batch:
        raise ValueError(f"expected {batch} labels of shape ({batch},), got {tuple(y.shape)}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"labels must be integer class indices, got {y.dtype}; use y.long() or y.argmax(1)")
    invalid = y[(y < 0) | (y >= num_classes)].unique().tolist()
    if invalid:
        raise ValueError(
            f"label {_format_list(invalid)} is out of range; with {num_classes} classes, labels must be in "
            f"[0, {num_classes - 1}]"
        )


def _format_list(items: list[int], limit: int = 5) -> str:
    """Join the first ``limit`` items with commas and count the rest."""
    text = ", ".join(str(item) for item in items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"
