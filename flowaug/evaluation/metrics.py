"""Metrics of generated images: FID, density, coverage, label reliability and CNN-A.

The papers take features from a classifier trained on the data set, not from an Inception network. Values are therefore
comparable only if the features are the same.
"""

from collections.abc import Callable, Iterator

import timm
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowaug.evaluation.oracle import Oracle, fit, untrained

BLOCK = 2**23  # number of distances in memory at a time: 64 MB in float64


def fid(real: Tensor, fake: Tensor) -> float:
    r"""Compute the Fréchet distance between Gaussians fitted to two sets of features, in float64.

    .. math:: \|m_1 - m_2\|^2 + \mathrm{tr}\,\Sigma_1 + \mathrm{tr}\,\Sigma_2
              - 2\,\mathrm{Re}\sum\sqrt{\mathrm{eig}(\Sigma_1\Sigma_2)}

    The covariances are unbiased (n − 1). With few samples relative to the dimension the distance is biased upwards, so
    compare only values computed from equal numbers of samples.

    Reference: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
    NeurIPS 2017, https://arxiv.org/abs/1706.08500

    Args:
        real: features (N, d).
        fake: features (M, d).

    Raises:
        ValueError: if there are fewer than two samples, or the features differ in dimension or are not finite.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> fid(x, x + 3)
        9.0
    """
    real, fake = _check_features(real, fake, 2, 2)
    mean_distance = (real.mean(0) - fake.mean(0)).square().sum()
    cov_real, cov_fake = (torch.atleast_2d(x.T.cov()) for x in (real, fake))
    cross_term = torch.linalg.eigvals(cov_real @ cov_fake).sqrt().real.sum()
    return (mean_distance + cov_real.trace() + cov_fake.trace() - 2 * cross_term).item()


def density(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Compute the density, a measure of fidelity: about 1 if real and fake samples have the same distribution.

    It is the mean number of real neighbourhoods that contain a fake sample, divided by k. The neighbourhood of a real
    sample is the open ball up to its k-th nearest other real sample.

    Reference: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020,
    https://arxiv.org/abs/2002.09797

    Args:
        real: features (N, d).
        fake: features (M, d).
        k: number of nearest neighbours.

    Raises:
        ValueError: if there are fewer than k + 1 real samples, or the features differ in dimension or are not finite.
    """
    return _count_neighbours(real, fake, k).sum().item() / (k * len(fake))


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Compute the coverage, a measure of diversity in [0, 1].

    It is the fraction of real samples whose neighbourhood contains a fake sample (Naeem et al., 2020). Arguments and
    errors are those of :func:`density`.
    """
    return (_count_neighbours(real, fake, k) > 0).double().mean().item()


def features(model: Oracle | nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Compute penultimate features.

    Args:
        model: a reference classifier (``load_oracle``, ``small_oracle``), or a timm model for RGB images, which are
            resized to the input size of the model.
        images: (N, 1 or C, H, W), uint8 or float in [0, 1].
        batch_size: images per forward pass.

    Returns:
        Features (N, d), float64 on the CPU.

    Raises:
        ValueError: if the type, shape or range of the images does not match, or the model is not a timm model.
    """
    oracle = model if isinstance(model, Oracle) else Oracle.from_timm(model, type(model).__name__)
    return _map_batches(oracle.features, images, batch_size, "features").double()


def label_reliability(oracle: Oracle, images: Tensor, targets: Tensor, batch_size: int = 256) -> float:
    """Compute the label reliability: the accuracy of a reference classifier on generated images.

    Args:
        oracle: reference classifier trained on real images.
        images: generated images (N, 1 or C, H, W), uint8 or float in [0, 1].
        targets: labels that the images were generated for (N,).
        batch_size: images per forward pass.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: if the type, shape or range of the images does not match, or there is not one label per image.
    """
    if targets.shape != (len(images),):
        raise ValueError(
            f"there are {len(images)} images but targets of shape {tuple(targets.shape)}; expected one label per image"
        )
    predicted = _map_batches(oracle, images, batch_size, "evaluating")
    return (predicted == targets.cpu()).double().mean().item()


def cnn_accuracy(
    images: Tensor,
    targets: Tensor,
    real_images: Tensor,
    real_targets: Tensor,
    num_classes: int,
    *,
    model: str = "resnet18",
    steps: int = 3000,
    batch_size: int = 128,
    hflip: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """Compute CNN-A: the accuracy on real test images of a classifier trained only on generated images.

    The classifier is trained by SGD with momentum 0.9, weight decay 5e-4 and a one-cycle schedule with a maximum
    learning rate of 0.1, on images shifted by up to an eighth of their side. A ResNet with a 7 × 7 stem gets a 3 × 3
    stem without pooling instead, as is usual for CIFAR.

    Args:
        images: generated images, uint8 (N, C, H, W).
        targets: labels that they were generated for (N,).
        real_images: real test images (M, C, H, W), uint8 or float in [0, 1].
        real_targets: their labels (M,).
        num_classes: number of classes K.
        model: name of the timm architecture.
        steps: number of optimiser steps; the papers' 30 epochs on CIFAR are 12,000.
        batch_size: images per step.
        hflip: probability of a horizontal flip in training; keep 0 if a flip can change the class.
        seed: seed of the weights, the order of the images and the augmentation. The global generator is not affected.
        device: device to train on.

    Returns:
        Accuracy in [0, 1].
    """
    channels, height, width = images.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = small_image_stem(timm.create_model(model, num_classes=num_classes, in_chans=channels))
        oracle = untrained(net, channels, (height, width), f"{model} on generated images").to(device)

        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        one_cycle = torch.optim.lr_scheduler.OneCycleLR
        scheduler = one_cycle(optimizer, 0.1, total_steps=steps, cycle_momentum=False)
        fit(oracle, images, targets, optimizer, scheduler, batch_size, seed, hflip)
    return label_reliability(oracle, real_images, real_targets)


def small_image_stem(model: nn.Module) -> nn.Module:
    """Replace a 7 × 7 ResNet stem by a 3 × 3 convolution without pooling, in place.

    Other models are left unchanged.

    Args:
        model: a timm model.

    Returns:
        The same model.
    """
    first = getattr(model, "conv1", None)
    if isinstance(first, nn.Conv2d) and first.kernel_size == (7, 7):
        model.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as in timm
        model.maxpool = nn.Identity()
    return model


def _map_batches(function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int, what: str) -> Tensor:
    """Apply a function to images in [0, 1] batch by batch and concatenate the results on the CPU."""
    _check_images(images)
    scale = 255 if images.dtype == torch.uint8 else 1
    parts = tqdm(images.split(batch_size), what, unit=" batches", leave=False, delay=2)
    return torch.cat([function(part.float() / scale).cpu() for part in parts])


def _count_neighbours(real: Tensor, fake: Tensor, k: int) -> Tensor:
    """Count the fake samples in the neighbourhood of each real sample, (N,) int64."""
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1 neighbour")
    real, fake = _check_features(real, fake, k + 1, 1)

    counts = []
    for start, part in _blocks(real, max(len(real), len(fake))):
        to_real = _distances(part, real)
        to_real[torch.arange(len(part)), torch.arange(start, start + len(part))] = (
            torch.inf
        )  # exclude the sample itself
        radius = to_real.kthvalue(k, dim=1, keepdim=True).values
        counts.append((_distances(part, fake) < radius).sum(1))

    return torch.cat(counts)


def _blocks(x: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Iterate over blocks of rows of ``x`` that have at most ``BLOCK`` distances to ``columns`` samples."""
    rows = max(1, BLOCK // columns)
    starts = tqdm(range(0, len(x), rows), "neighbours", unit=" blocks", leave=False, delay=2)
    return ((start, x[start : start + rows]) for start in starts)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Compute Euclidean distances (N, M).

    They are summed coordinate by coordinate rather than by a matrix product. Equal pairs thus have exactly equal
    distances, and ties are preserved.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _check_features(real: Tensor, fake: Tensor, min_real: int, min_fake: int) -> tuple[Tensor, Tensor]:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        shapes = f"{tuple(real.shape)} and {tuple(fake.shape)}"
        raise ValueError(f"features have shapes {shapes}; expected (N, d) and (M, d), both from the same model")
    if len(real) < min_real or len(fake) < min_fake:
        raise ValueError(
            f"{len(real)} real and {len(fake)} fake samples are too few; expected at least {min_real} real and "
            f"{min_fake} fake"
        )

    for name, x in (("real", real), ("fake", fake)):
        if bad := int((~torch.isfinite(x)).any(1).sum()):
            raise ValueError(f"{bad} of {len(x)} {name} samples have NaN or infinite features; check their images")

    return real.double(), fake.double()


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, C, H, W) with at least one image")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images are {images.dtype} and not all in [0, 1]; expected uint8, or float in [0, 1]")
