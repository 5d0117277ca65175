"""How good are generated images? FID, density and coverage in a feature space, label reliability, CNN-A.

The papers take features from a classifier of the data set itself, so their FID is not Inception's: figures compare only
between the same features.
"""

from collections.abc import Callable, Iterator

import timm
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from flowaug.evaluation.oracle import Oracle, fit, untrained

BLOCK = 2**23  # distances in memory at a time: 64 MB in float64


def fid(real: Tensor, fake: Tensor) -> float:
    r"""Fréchet distance of two Gaussians fitted to features, in float64.

    .. math:: \|m_1 - m_2\|^2 + \mathrm{tr}\,\Sigma_1 + \mathrm{tr}\,\Sigma_2
              - 2\,\mathrm{Re}\sum\sqrt{\mathrm{eig}(\Sigma_1\Sigma_2)}

    with covariances over n − 1 (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium", 2017, https://arxiv.org/abs/1706.08500). With few samples for their dimension it is biased upwards, so
    compare equal numbers only.

    Args:
        real: features (N, d).
        fake: features (M, d).

    Raises:
        ValueError: fewer than two samples, features that differ in dimension or are not finite.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> fid(x, x + 3)
        9.0
    """
    real, fake = _checked(real, fake, 2, 2)
    moved = (real.mean(0) - fake.mean(0)).square().sum()
    first, second = (torch.atleast_2d(x.T.cov()) for x in (real, fake))
    shared = torch.linalg.eigvals(first @ second).sqrt().real.sum()
    return (moved + first.trace() + second.trace() - 2 * shared).item()


def density(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Mean number of real neighbourhoods that a fake sample lies in, over k: fidelity, 1 where both are alike.

    The neighbourhood of a real sample reaches to its k-th nearest other one, without the border (Naeem et al.,
    "Reliable Fidelity and Diversity Metrics for Generative Models", 2020, https://arxiv.org/abs/2002.09797).

    Args:
        real: features (N, d).
        fake: features (M, d).
        k: which neighbour.

    Raises:
        ValueError: fewer than k + 1 real samples, features that differ in dimension or are not finite.
    """
    return _inside(real, fake, k).sum().item() / (k * len(fake))


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> float:
    """Share of the real samples whose neighbourhood holds a fake one: diversity, in [0, 1].

    Naeem et al. 2020; arguments and errors as for :func:`density`.
    """
    return (_inside(real, fake, k) > 0).double().mean().item()


def features(model: Oracle | nn.Module, images: Tensor, batch_size: int = 256) -> Tensor:
    """Penultimate features (N, d), float64 on the CPU.

    Args:
        model: an oracle (``load_oracle``, ``small_oracle``), or a timm model of RGB images at its own size.
        images: (N, 1 or C, H, W), uint8 or float in [0, 1].
        batch_size: images per pass.

    Raises:
        ValueError: images of another kind or number of channels, or a model that is not one of timm.
    """
    oracle = model if isinstance(model, Oracle) else Oracle.of(model, type(model).__name__)
    return _each(oracle.features, images, batch_size, "features").double()


def label_reliability(oracle: Oracle, images: Tensor, targets: Tensor, batch_size: int = 256) -> float:
    """Accuracy of an oracle on generated images against the labels they were generated for.

    Args:
        oracle: a classifier that was trained on real images.
        images: (N, 1 or C, H, W), uint8 or float in [0, 1].
        targets: intended labels (N,).
        batch_size: images per pass.

    Raises:
        ValueError: images of another kind or number of channels, or not one label each.
    """
    if targets.shape != (len(images),):
        raise ValueError(f"{len(images)} images but targets of shape {tuple(targets.shape)}; expected a label for each")
    return (_each(oracle, images, batch_size, "judging") == targets.cpu()).double().mean().item()


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
    """CNN-A: accuracy on real test images of a classifier that was trained on generated ones only.

    SGD with momentum 0.9 and weight decay 5e-4, one cycle up to a learning rate of 0.1, images shifted by up to an
    eighth of their side; ResNets of the 7 × 7 stem take a 3 × 3 convolution without pooling instead, as on CIFAR.

    Args:
        images: generated, uint8 (N, C, H, W).
        targets: the labels they were generated for (N,).
        real_images: real test images, uint8 or float in [0, 1].
        real_targets: their labels.
        num_classes: number of classes K.
        model: architecture of timm.
        steps: optimiser steps; the papers' 30 epochs of CIFAR are 12,000.
        batch_size: images per step.
        hflip: probability that a training image is mirrored; leave it at 0 where that changes what is shown.
        seed: seed of weights, order and augmentation; the global RNG is left as it was.
        device: where to train.

    Returns:
        Accuracy in [0, 1].
    """
    channels, size = images.shape[1], tuple(images.shape[2:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = small_image_stem(timm.create_model(model, num_classes=num_classes, in_chans=channels))
        oracle = untrained(net, channels, size, f"{model} on generated images").to(device)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        one_cycle = torch.optim.lr_scheduler.OneCycleLR
        scheduler = one_cycle(optimizer, 0.1, total_steps=steps, cycle_momentum=False)
        fit(oracle, images, targets, optimizer, scheduler, batch_size, seed, hflip)
    return label_reliability(oracle, real_images, real_targets)


def small_image_stem(model: nn.Module) -> nn.Module:
    """Give a ResNet of the 7 × 7 stem a 3 × 3 convolution without pooling, in place; other models stay as they are."""
    first = getattr(model, "conv1", None)
    if isinstance(first, nn.Conv2d) and first.kernel_size == (7, 7):
        model.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm's ResNet
        model.maxpool = nn.Identity()
    return model


def _each(function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int, what: str) -> Tensor:
    """Apply a function of images in [0, 1] batch by batch; the results on the CPU."""
    _check_images(images)
    scale = 255 if images.dtype == torch.uint8 else 1
    parts = tqdm(images.split(batch_size), what, unit=" batches", leave=False, delay=2)
    return torch.cat([function(part.float() / scale).cpu() for part in parts])


def _inside(real: Tensor, fake: Tensor, k: int) -> Tensor:
    """How many fake samples lie in the neighbourhood of each real one, (N,) int64."""
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1, the nearest other sample")
    real, fake = _checked(real, fake, k + 1, 1)
    counts = []
    for start, part in _blocks(real, max(len(real), len(fake))):
        to_real = _distances(part, real)
        to_real[torch.arange(len(part)), torch.arange(start, start + len(part))] = torch.inf  # not its own neighbour
        radius = to_real.kthvalue(k, dim=1, keepdim=True).values
        counts.append((_distances(part, fake) < radius).sum(1))
    return torch.cat(counts)


def _blocks(x: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
    rows = max(1, BLOCK // columns)
    starts = tqdm(range(0, len(x), rows), "neighbours", unit=" blocks", leave=False, delay=2)
    return ((start, x[start : start + rows]) for start in starts)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances (N, M), summed coordinate by coordinate: equal pairs give equal bits, so ties stay ties."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(real: Tensor, fake: Tensor, least_real: int, least_fake: int) -> tuple[Tensor, Tensor]:
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        shapes = f"{tuple(real.shape)} and {tuple(fake.shape)}"
        raise ValueError(f"features are {shapes}; expected (N, d) and (M, d), both from the same model")
    if len(real) < least_real or len(fake) < least_fake:
        raise ValueError(
            f"{len(real)} real and {len(fake)} fake samples are too few; expected at least {least_real} real and "
            f"{least_fake} fake"
        )
    for name, x in (("real", real), ("fake", fake)):
        if bad := int((~torch.isfinite(x)).any(1).sum()):
            raise ValueError(f"{bad} of {len(x)} {name} samples have NaN or infinite features; look at their images")
    return real.double(), fake.double()


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (N, C, H, W) with at least one image")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images are {images.dtype}, not all in [0, 1]; expected uint8, or float in [0, 1]")
