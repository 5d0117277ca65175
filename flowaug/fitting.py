"""Passes of a flow over a data set: class moments, class axes, bits per dimension and NF-Acc."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flowaug.flow import Flow
from flowaug.loaders import batches
from flowaug.moments import ClassMoments
from flowaug.pca import ClasswisePCA


@dataclass(frozen=True)
class ImageTable:
    """A data set in memory, and this process's place among those that share it.

    Attributes:
        images: uint8 (N, C, H, W).
        targets: labels (N,).
        num_classes: number of classes K.
        batch_size: images per pass through the flow.
        rank: number of this process.
        world_size: number of processes.
    """

    images: Tensor
    targets: Tensor
    num_classes: int
    batch_size: int = 256
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: Tensor) -> "ImageTable":
        """The images that ``rows``, bool (N,) or indices, names."""
        return replace(self, images=self.images[rows], targets=self.targets[rows])

    def share(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share, once, in order: x (B, C, H, W) in [0, 1] and y (B,) on ``device``."""
        for x, y in batches(self.images, self.targets, self.batch_size, rank=self.rank, world_size=self.world_size):
            yield x.to(device), y.to(device)


@torch.no_grad()
def class_moments(
    flow: Flow, data: ImageTable, device: torch.device, reduce=lambda t: t, seed: int = 0
) -> ClassMoments:
    """Moments of the latents of dequantised images, over all processes.

    Args:
        flow: the flow.
        data: the training images.
        device: where the flow lives.
        reduce: sums a tensor over the processes.
        seed: seed of the dequantisation noise.
    """
    generator = torch.Generator(device).manual_seed(seed * data.world_size + data.rank)
    moments = ClassMoments.zeros(data.num_classes, flow.dim, device)
    for x, y in data.share(device):
        moments.update(flow.encode(flow.dequantise(x, generator))[0], y)
    return ClassMoments.from_tensors({name: reduce(t) for name, t in moments.tensors().items()})


@torch.no_grad()
def evaluate(flow: Flow, data: ImageTable, device: torch.device, reduce=lambda t: t, seed: int = 0) -> dict[str, float]:
    """Bits per dimension of dequantised images given their labels, and NF-Acc of the images themselves."""
    generator = torch.Generator(device).manual_seed(seed * data.world_size + data.rank)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y in data.share(device):
        bits = flow.bits_per_dim(flow.log_prob(flow.dequantise(x, generator), y))
        right = flow.gaussians.log_joint(flow.encode(x)[0]).argmax(1) == y
        sums += torch.stack([bits.double().sum(), right.double().sum(), sums.new_tensor(len(y))])
    bits, right, count = reduce(sums).tolist()
    return {"bits_per_dim": bits / count, "nf_acc": right / count}


@torch.no_grad()
def fit_pca(flow: Flow, data: ImageTable, device: torch.device, rank: int) -> ClasswisePCA:
    """Class axes and table of coordinates from the latents of the images themselves, one class in memory at a time."""
    return ClasswisePCA.fit(_latents_by_class(flow, data, device), rank)


def _latents_by_class(flow: Flow, data: ImageTable, device: torch.device) -> Iterator[Tensor]:
    targets = np.asarray(data.targets)
    for label in range(data.num_classes):
        images = data.images[torch.from_numpy(np.flatnonzero(targets == label))]
        yield torch.cat([flow.encode(part.to(device).float() / 255)[0] for part in images.split(data.batch_size)])


def random_shift(x: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Move each image (B, C, H, W) by up to ``pixels`` in both directions; the border repeats."""
    if pixels == 0:
        return x
    b, _, h, w = x.shape
    dy, dx = torch.randint(-pixels, pixels + 1, (2, b, 1), generator=generator, device=x.device)
    rows = (torch.arange(h, device=x.device) + dy).clamp(0, h - 1)
    columns = (torch.arange(w, device=x.device) + dx).clamp(0, w - 1)
    each = torch.arange(b, device=x.device)
    return x[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_hflip(x: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Mirror each image (B, C, H, W) left to right with probability ``p``."""
    flip = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < p
    return torch.where(flip, x.flip(3), x)
