"""Pictures of a flow: samples, and images before and after flow mixup."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from flowaug.evaluation.plots import augmentation_grid, image_grid
from flowaug.evaluation.sampling import sample
from flowaug.flows.flow import Flow
from flowaug.flows.passes import ImageTable, fit_pca
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.plan import MixPlan
from flowaug.mixup.transform import FlowMixupTransform

PREVIEW_WEIGHTS, PREVIEW_SEEDS = (0.25, 0.5, 0.75, 1.0), (1, 2)
PROGRESS_IMAGES, PROGRESS_RANK = 640, 8  # few images and components, to be fast during training


def draw_flow(flow: Flow, pca: ClasswisePCA, val: ImageTable, folder: Path) -> None:
    """Draw ``samples.png``, and ``augmented.png`` with one image per class.

    Args:
        flow: a trained flow for images.
        pca: principal components of its classes.
        val: validation set.
        folder: output folder.
    """
    draw_samples(flow, folder / "samples.png")
    chosen = one_per_class(val.targets)
    transform = FlowMixupTransform(flow, pca)
    draw_augmented(transform, val.images[chosen].float() / 255, val.targets[chosen], folder / "augmented.png")


def draw_progress(flow: Flow, train: ImageTable, val: ImageTable, folder: Path) -> None:
    """Draw the pictures of :func:`draw_flow` during training, with principal components of a few images per class.

    Args:
        flow: the flow in training.
        train: training set.
        val: validation set.
        folder: output folder.
    """
    per_class = max(PROGRESS_IMAGES // train.num_classes, PROGRESS_RANK)
    rows = [torch.nonzero(train.targets == label)[:per_class, 0] for label in range(train.num_classes)]
    few = replace(train.subset(torch.cat(rows)), process_index=0, num_processes=1)
    draw_flow(flow, fit_pca(flow, few, flow.gaussians.mean.device, PROGRESS_RANK), val, folder)


def one_per_class(targets: Tensor, limit: int = 10) -> Tensor:
    """Return the index of the first image of each class, for the first ``limit`` classes in ``targets``."""
    return torch.stack([(targets == label).nonzero()[0, 0] for label in targets.unique()[:limit]])


def draw_samples(
    flow: Flow,
    path: Path,
    temperature: float = 0.7,
    columns: int = 8,
    classes: int = 10,
    seed: int = 0,
    gaussians: ClasswisePCA | None = None,
) -> Path:
    """Draw class-conditional samples as PNG, one row per class.

    Args:
        flow: a trained flow for images.
        path: output file.
        temperature: factor of the covariance.
        columns: number of samples per class.
        classes: number of classes to show; the first ones are shown.
        seed: seed of the samples.
        gaussians: full class covariances (:func:`flowaug.evaluation.sampling.rfcm`) to sample from; None for the
            flow's own diagonal ones.

    Returns:
        The path.
    """
    rows = min(flow.gaussians.num_classes, classes)
    images = sample(flow, torch.arange(rows).repeat_interleave(columns), temperature, seed, gaussians)
    title = f"samples at temperature {temperature:g}" + (", full class covariances" if gaussians else "")
    return image_grid(images.unflatten(0, (rows, columns)), path, class_labels(flow, range(rows)), title=title)


def class_labels(flow: Flow, labels: Iterable[int]) -> list[str]:
    """Return the names of classes for pictures, or their numbers if the flow has no class names."""
    return [flow.class_names[k] if flow.class_names else str(k) for k in labels]


def draw_augmented(transform: FlowMixupTransform, x: Tensor, y: Tensor, path: Path) -> Path:
    """Draw original and mixed images for several weights as PNG, one row per image.

    If the transform draws one weight per principal component, columns with weights drawn as in training follow.

    Args:
        transform: flow mixup; its generator is not used.
        x: images (B, C, H, W) in the format that ``transform`` expects.
        y: labels (B,).
        path: output file.

    Returns:
        The path.
    """
    device = transform.pca.axes.device
    x, y = x.to(device), y.to(device)

    plans = {w: fixed_plan(transform, y, w) for w in PREVIEW_WEIGHTS}
    title = "flow mixup with a training image of the same class; w = weight of the partner"
    if transform.sampler.per_axis:
        plans |= {f"drawn {seed}": drawn_plan(transform, y, seed) for seed in PREVIEW_SEEDS}
        title += "; drawn: one weight per principal component, as in training"

    augmented = {name: transform.pixels(transform.apply(x, y, plan)) for name, plan in plans.items()}
    labels = class_labels(transform.flow, y.tolist())
    return augmentation_grid(transform.pixels(x), None, augmented, labels, path, title=title)


def fixed_plan(transform: FlowMixupTransform, y: Tensor, weight: float, seed: int = 0) -> MixPlan:
    """Create a plan that mixes every image with the same weight along all principal components.

    Args:
        transform: flow mixup.
        y: labels (B,).
        weight: weight of the partner.
        seed: seed of the partners, which are random training images.
    """
    pca = transform.pca
    u = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    count = pca.count[y]
    partner = pca.offsets[y] + torch.minimum((u * count).long(), count - 1)  # rounding can take u * count to count
    index = torch.arange(len(y), device=y.device)
    return MixPlan(index, torch.full((len(y), transform.sampler.policy.max_rank), weight, device=y.device), partner)


def drawn_plan(transform: FlowMixupTransform, y: Tensor, seed: int) -> MixPlan:
    """Draw a plan as in training, but for every image and without the generator of the transform.

    Args:
        transform: flow mixup.
        y: labels (B,).
        seed: seed of the plan.
    """
    sampler = copy.copy(transform.sampler)
    sampler.policy = sampler.policy.always()
    sampler.reseed(seed)
    return sampler(y)
