"""Passes of a flow over a data set: class moments, class axes, bits per dimension and NF-Acc."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from timm.utils import ModelEmaV3
from torch import Tensor

from flowaug.flows.flow import Flow
from flowaug.latents.moments import ClassMoments
from flowaug.latents.pca import ClasswisePCA


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

    def share(self, device: torch.device, seed: int) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
        """This process's batches, once, in order: x (B, C, H, W) in [0, 1], y (B,) and a generator of noise for them.

        Batches and their noise are the same for any number of processes; only who gets them differs.
        """
        generator = torch.Generator(device)
        for number in range(self.rank, math.ceil(len(self) / self.batch_size), self.world_size):
            rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
            generator.manual_seed((seed << 32) + number)
            yield self.images[rows].to(device).float() / 255, self.targets[rows].to(device), generator


class AveragedFlow(ModelEmaV3):
    """The weights that are saved: an exponential average, and from one step on the plain mean of all (SWA).

    Args:
        flow: the flow in training.
        decay: of the exponential average, which warms up to it.
        swa_from: step from which the plain mean is taken, None for never (Izmailov et al., 2018).
    """

    def __init__(self, flow: Flow, decay: float, swa_from: int | None = None):
        super().__init__(flow, decay=decay, use_warmup=True)
        self.swa_from = swa_from

    def get_decay(self, step: int | None = None) -> float:
        """Weight of the average so far against the flow after ``step``."""
        if self.swa_from is None or step < self.swa_from:
            return super().get_decay(step)
        return 1 - 1 / (step - self.swa_from + 1)


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
    moments = ClassMoments.zeros(data.num_classes, flow.dim, device)
    for x, y, generator in data.share(device, seed):
        moments.update(flow.encode(flow.dequantise(x, generator))[0], y)
    return reduced(moments, reduce)


def reduced(moments: ClassMoments, reduce) -> ClassMoments:
    """The moments of all processes."""
    return ClassMoments.from_tensors({name: reduce(t) for name, t in moments.tensors().items()})


@torch.no_grad()
def evaluate(flow: Flow, data: ImageTable, device: torch.device, reduce=lambda t: t, seed: int = 0) -> dict[str, float]:
    """Bits per dimension of dequantised images given their labels, and NF-Acc of the images themselves."""
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y, generator in data.share(device, seed):
        bits = flow.bits_per_dim(flow.log_prob(flow.dequantise(x, generator), y))
        right = flow.gaussians.log_joint(flow.encode(x)[0]).argmax(1) == y
        sums += torch.stack([bits.double().sum(), right.double().sum(), sums.new_tensor(len(y))])
    bits, right, count = reduce(sums).tolist()
    return {"bits_per_dim": bits / count, "nf_acc": right / count}


@torch.no_grad()
def fit_pca(
    flow: Flow,
    data: ImageTable,
    device: torch.device,
    rank: int,
    partners: int | None = None,
    reduce=lambda t: t,
    moments: ClassMoments | None = None,
) -> ClasswisePCA:
    """Class axes and table of coordinates from the latents of the images themselves, in one pass.

    Each process takes every n-th class, one in memory at a time: (N_y, D) and the results, O(K·R·D).

    Args:
        flow: the flow.
        data: the training images.
        device: where the flow lives.
        rank: axes per class.
        partners: images per class whose coordinates are kept, None for all.
        reduce: sums a tensor over the processes.
        moments: to which the latents of this process's classes are added on the way.
    """
    own = range(data.rank, data.num_classes, data.world_size)
    latents = (_latents_of(flow, data, device, label, moments) for label in own)
    pca = ClasswisePCA.fit(latents, rank, partners) if own else None
    return pca if data.world_size == 1 else _gather_pca(pca, flow.dim, data, rank, partners, reduce, device)


def _latents_of(flow: Flow, data: ImageTable, device, label: int, moments: ClassMoments | None) -> Tensor:
    images = data.images[data.targets == label]
    z = torch.cat([flow.encode(part.to(device).float() / 255)[0] for part in images.split(data.batch_size)])
    if moments is not None:
        moments.update(z, torch.full((len(z),), label, device=device))
    return z


def _gather_pca(pca: ClasswisePCA | None, dim: int, data: ImageTable, rank: int, partners, reduce, device):
    """The class axes of all processes, by adding what each fitted to the zeros that it leaves for the others."""
    k, count = data.num_classes, torch.bincount(data.targets, minlength=data.num_classes)
    count = count if partners is None else count.clamp(max=partners)
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    own = torch.arange(k) % data.world_size == data.rank
    shapes = {"axes": (k, rank, dim), "variance": (k, rank), "mean": (k, dim), "coords": (int(offsets[-1]), rank)}
    whole = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
    for name, tensor in whole.items() if pca is not None else ():
        tensor[own.repeat_interleave(count) if name == "coords" else own] = pca.tensors()[name].float()
    whole = {name: reduce(tensor) for name, tensor in whole.items()}
    return ClasswisePCA.from_tensors(whole | {"coords": whole["coords"].half(), "offsets": offsets.to(device)})
