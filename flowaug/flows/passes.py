"""Passes of a flow over a data set: class moments, class PCA, bits per dimension and accuracy.

The functions run on all processes. Each process handles its part of the data, and ``reduce`` sums a tensor over the
processes.
"""

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
    """In-memory data set, sharded over processes.

    Every process holds all images; ``process_index`` and ``num_processes`` determine which batches it handles.

    Attributes:
        images: uint8 images (N, C, H, W).
        targets: labels (N,).
        num_classes: number of classes K.
        batch_size: images per pass through the flow.
        process_index: index of this process.
        num_processes: number of processes.
    """

    images: Tensor
    targets: Tensor
    num_classes: int
    batch_size: int = 256
    process_index: int = 0
    num_processes: int = 1

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: Tensor) -> "ImageTable":
        """Return the data set of the selected images.

        Args:
            rows: boolean mask (N,) or indices.
        """
        return replace(self, images=self.images[rows], targets=self.targets[rows])

    def share(self, device: torch.device, seed: int) -> Iterator[tuple[Tensor, Tensor, torch.Generator]]:
        """Iterate once over the batches of this process, in order.

        The batches and their noise do not depend on the number of processes.

        Args:
            device: device of the batches and of the generator.
            seed: seed of the generator.

        Yields:
            Images (B, C, H, W) in [0, 1], labels (B,) and a generator for the dequantisation noise of this batch.
        """
        generator = torch.Generator(device)
        num_batches = math.ceil(len(self) / self.batch_size)
        for index in range(self.process_index, num_batches, self.num_processes):
            rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
            generator.manual_seed((seed << 32) + index)
            yield self.images[rows].to(device).float() / 255, self.targets[rows].to(device), generator


class AveragedFlow(ModelEmaV3):
    """Average of the weights of a flow over training, which is what is saved.

    It is an exponential moving average. From step ``swa_from`` on it is the uniform mean of the weights since then
    (stochastic weight averaging, Izmailov et al. 2018).

    Args:
        flow: the flow that is trained.
        decay: decay of the exponential average, reached after a warm-up.
        swa_from: first step of the uniform mean; None for no uniform mean.
    """

    def __init__(self, flow: Flow, decay: float, swa_from: int | None = None):
        super().__init__(flow, decay=decay, use_warmup=True)
        self.swa_from = swa_from

    def get_decay(self, step: int | None = None) -> float:
        """Return the weight of the current average when it is updated with the flow after ``step``."""
        if self.swa_from is None or step is None or step < self.swa_from:
            return super().get_decay(step)
        return 1 - 1 / (step - self.swa_from + 1)


@torch.no_grad()
def class_moments(
    flow: Flow, data: ImageTable, device: torch.device, reduce=lambda t: t, seed: int = 0
) -> ClassMoments:
    """Compute the moments of the latents of each class, over all processes.

    Args:
        flow: the flow.
        data: the training images; they are dequantised.
        device: device of the flow.
        reduce: sums a tensor over the processes.
        seed: seed of the dequantisation noise.
    """
    moments = ClassMoments.zeros(data.num_classes, flow.dim, device)
    for x, y, generator in data.share(device, seed):
        z, _ = flow.encode(flow.dequantise(x, generator))
        moments.update(z, y)
    return reduced(moments, reduce)


def reduced(moments: ClassMoments, reduce) -> ClassMoments:
    """Sum moments over all processes.

    Args:
        moments: the moments of this process.
        reduce: sums a tensor over the processes.
    """
    return ClassMoments.from_tensors({name: reduce(t) for name, t in moments.tensors().items()})


@torch.no_grad()
def evaluate(flow: Flow, data: ImageTable, device: torch.device, reduce=lambda t: t, seed: int = 0) -> dict[str, float]:
    """Evaluate a flow on a data set, over all processes.

    Args:
        flow: the flow.
        data: images and labels.
        device: device of the flow.
        reduce: sums a tensor over the processes.
        seed: seed of the dequantisation noise.

    Returns:
        ``bits_per_dim``, the mean bits per dimension of the dequantised images given their labels, and ``nf_acc``, the
        classification accuracy of the flow on the images without noise.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y, generator in data.share(device, seed):
        bits = flow.bits_per_dim(flow.log_prob(flow.dequantise(x, generator), y))
        z, _ = flow.encode(x)
        correct = flow.gaussians.log_joint(z).argmax(1) == y
        sums += torch.stack([bits.double().sum(), correct.double().sum(), sums.new_tensor(len(y))])

    bits, correct, count = reduce(sums).tolist()
    return {"bits_per_dim": bits / count, "nf_acc": correct / count}


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
    """Fit the PCA of every class to the latents of its images, in one pass over all processes.

    The images are not dequantised. Each process fits every ``num_processes``-th class, with the latents (N_y, D) of one
    class in memory at a time. The result takes O(K·R·D) memory.

    Args:
        flow: the flow.
        data: the training images.
        device: device of the flow.
        rank: number of principal components per class, R.
        partners: number of images per class whose coordinates are stored; None for all.
        reduce: sums a tensor over the processes.
        moments: if given, the latents of the classes of this process are added to it.

    Returns:
        The PCA of all classes, on every process.
    """
    own_classes = range(data.process_index, data.num_classes, data.num_processes)
    latents = (_encode_class(flow, data, device, label, moments) for label in own_classes)
    pca = ClasswisePCA.fit(latents, rank, partners) if own_classes else None
    if pca is not None and data.num_processes == 1:
        return pca
    return _gather_pca(pca, flow.dim, data, rank, partners, reduce, device)


def _encode_class(flow: Flow, data: ImageTable, device, label: int, moments: ClassMoments | None) -> Tensor:
    images = data.images[data.targets == label]
    z = torch.cat([flow.encode(batch.to(device).float() / 255)[0] for batch in images.split(data.batch_size)])
    if moments is not None:
        moments.update(z, torch.full((len(z),), label, device=device))
    return z


def _gather_pca(pca: ClasswisePCA | None, dim: int, data: ImageTable, rank: int, partners, reduce, device):
    """Combine the PCA of all processes.

    Every process fills in its own classes and leaves 0 for the others, so that the sum over the processes is the PCA of
    all classes.
    """
    k = data.num_classes
    count = torch.bincount(data.targets, minlength=k)
    count = count if partners is None else count.clamp(max=partners)
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    shapes = {"axes": (k, rank, dim), "variance": (k, rank), "mean": (k, dim), "coords": (int(offsets[-1]), rank)}
    tensors = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}

    own_classes = torch.arange(k) % data.num_processes == data.process_index
    if pca is not None:
        for name, tensor in tensors.items():
            rows = own_classes.repeat_interleave(count) if name == "coords" else own_classes
            tensor[rows] = pca.tensors()[name].float()

    tensors = {name: reduce(tensor) for name, tensor in tensors.items()}
    tensors |= {"coords": tensors["coords"].half(), "offsets": offsets.to(device)}
    return ClasswisePCA.from_tensors(tensors)
