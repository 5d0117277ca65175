"""Samples from the class Gaussians, interpolation between images, and two-dimensional maps of the latent space."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from flowaug.data.loaders import mix_seed
from flowaug.flows.flow import Flow
from flowaug.flows.passes import ImageTable, fit_pca
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.offline import CHUNK
from flowaug.pixels import quantise

PATHS = ("linear", "rescaled", "spherical")
MAPS = ("pca", "tsne")
PARALLEL_EPS = 1e-3  # vectors are treated as parallel if the sine of their angle is smaller


@torch.no_grad()
def sample(
    flow: Flow,
    y: Tensor,
    temperature: float = 1.0,
    seed: int = 0,
    gaussians: ClasswisePCA | None = None,
    batch_size: int = CHUNK,
    chunk: int = 0,
) -> Tensor:
    """Draw one image per label, quantised to the grey levels of the flow.

    Each chunk of 256 images has its own seed. The samples therefore do not depend on the batch size, and each chunk can
    be drawn without the previous ones.

    Args:
        flow: a trained flow for images.
        y: integer labels (N,).
        temperature: factor of the covariance; 0 returns the decoded class means.
        seed: seed of the samples.
        gaussians: full class covariances (:func:`rfcm`) to sample from; None for the flow's own diagonal ones.
        batch_size: number of images to decode at a time, at most 256.
        chunk: number of the first chunk in ``y``.

    Returns:
        Images, uint8 (N, C, H, W) on the CPU.

    Raises:
        ValueError: if the flow models vectors, there are no labels, the temperature is negative, or a sample cannot be
            decoded.

    Example:
        >>> from flowaug import load_flow
        >>> sample(load_flow("digits"), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 8, 8])
    """
    if len(y) == 0:
        raise ValueError("no labels to draw images for; pass at least one")
    _check_event(flow)

    flow, source = flow.freeze(), gaussians or flow.gaussians
    images = torch.empty(len(y), *flow.event_shape, dtype=torch.uint8)
    with tqdm(total=len(y), desc="sampling", unit=" images", leave=False, delay=2) as bar:
        for number, (labels, out) in enumerate(zip(y.split(CHUNK), images.split(CHUNK), strict=True), chunk):
            generator = torch.Generator().manual_seed(mix_seed(seed, number))
            latents = source.sample(labels.to(flow.gaussians.mean.device), temperature, generator)
            out.copy_(_decode(flow, latents, batch_size))
            bar.update(len(labels))
    return images


def rfcm(flow: Flow, train: ImageTable) -> ClasswisePCA:
    """Estimate the full covariance of each class from the latents of its training images (RFCM).

    The covariance of a class with N_y images has rank N_y − 1. It is represented by the PCA of that rank, which takes
    K × rank × D numbers of memory.

    Reference: Enescu & Sahbi, ECCV 2024.

    Args:
        flow: a trained flow for images.
        train: training set.

    Returns:
        Principal components to pass to :func:`sample` as ``gaussians``.

    Raises:
        ValueError: if the number of classes differs from the flow's, or a class has no image.
    """
    if train.num_classes != flow.gaussians.num_classes:
        num_classes = flow.gaussians.num_classes
        raise ValueError(
            f"the flow has {num_classes} classes but the images have {train.num_classes}; use the flow's own data set"
        )

    largest = int(torch.as_tensor(train.targets).bincount().max())
    rank = max(1, min(largest - 1, flow.dim))
    return fit_pca(flow.freeze(), train, flow.gaussians.mean.device, rank)


def choose_pairs(targets: Tensor, count: int, across: bool = False, seed: int = 0) -> Tensor:
    """Choose random pairs of images, cycling over the classes of the first image.

    Args:
        targets: labels (N,).
        count: number of pairs.
        across: pair images of different classes instead of the same class.
        seed: seed of the choice.

    Returns:
        Indices (count, 2).

    Raises:
        ValueError: if there is no class with two images, or with ``across`` only one class.
    """
    rng, labels = np.random.default_rng(seed), targets.numpy()
    members = {k: np.flatnonzero(labels == k) for k in np.unique(labels)}
    usable = [k for k, rows in members.items() if across or len(rows) > 1]
    if len(usable) < 1 + across:
        wanted = "at least two classes" if across else "a class of at least two images"
        raise ValueError(f"no pair among {len(labels)} images of {len(members)} classes; expected {wanted}")

    pairs = [_pair(rng, members, usable[i % len(usable)], usable, across) for i in range(count)]
    return torch.from_numpy(np.array(pairs))


def _pair(rng: np.random.Generator, members: dict, first: int, usable: list[int], across: bool) -> list[int]:
    if not across:
        return list(rng.choice(members[first], 2, replace=False))
    second = rng.choice([k for k in usable if k != first])
    return [rng.choice(members[k]) for k in (first, second)]


@torch.no_grad()
def interpolate(
    flow: Flow, images: Tensor, targets: Tensor, steps: int = 9, path: str = "linear", batch_size: int = CHUNK
) -> Tensor:
    """Interpolate between pairs of images in the latent space.

    Args:
        flow: a trained flow for images.
        images: pairs of images, uint8 (N, 2, C, H, W).
        targets: labels (N, 2). Latents are interpolated relative to the class means, see :func:`interpolate_latents`.
        steps: number of images per pair, including both ends.
        path: "linear", "rescaled" or "spherical".
        batch_size: number of images per pass through the flow.

    Returns:
        Images, uint8 (N, steps, C, H, W) on the CPU.

    Raises:
        ValueError: if there are fewer than two steps, a label or the path is unknown, or the flow models vectors.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}; expected at least 2, for both ends")
    flow, mean = flow.freeze(), flow.gaussians.mean
    if not 0 <= int(targets.min()) <= int(targets.max()) < len(mean):
        raise ValueError(
            f"the labels range from {targets.min()} to {targets.max()}; expected labels of the flow, "
            f"0 to {len(mean) - 1}"
        )

    z = encode(flow, images.flatten(0, 1), batch_size).unflatten(0, (-1, 2))
    weights = torch.linspace(0, 1, steps, device=z.device)
    centres = mean[targets.to(mean.device)]
    latents = interpolate_latents(z[:, 0], z[:, 1], weights, path, centres[:, 0], centres[:, 1])
    return _decode(flow, latents.flatten(0, 1), batch_size).unflatten(0, (-1, steps))


def interpolate_latents(a: Tensor, b: Tensor, weights: Tensor, path: str, centre_a: Tensor, centre_b: Tensor) -> Tensor:
    r"""Interpolate between latents: :math:`\mu_w + s_a (a - \mu_a) + s_b (b - \mu_b)`.

    The centre :math:`\mu_w` moves linearly from :math:`\mu_a` to :math:`\mu_b`. The factors depend on the path:

    * "linear": 1 − w and w.
    * "rescaled": 1 − w and w, divided by √((1−w)² + w²). The variance of independent latents is preserved; on the
      straight line it shrinks.
    * "spherical": sin((1−w)θ)/sin θ and sin(wθ)/sin θ, where θ is the angle between both latents relative to their
      centres (Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985). Parallel latents use "linear".

    Args:
        a: latents (N, D).
        b: latents (N, D).
        weights: weights w of ``b``, (S,).
        path: "linear", "rescaled" or "spherical".
        centre_a: class means of ``a``, (N, D).
        centre_b: class means of ``b``, (N, D).

    Returns:
        Latents (N, S, D).

    Raises:
        ValueError: if the path is unknown.
    """
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; expected one of {PATHS}")

    offset_a, offset_b = a - centre_a, b - centre_b
    factor_a, factor_b = _path_factors(offset_a, offset_b, weights, path)
    centre = torch.lerp(centre_a[:, None], centre_b[:, None], weights[:, None])
    return centre + factor_a[..., None] * offset_a[:, None] + factor_b[..., None] * offset_b[:, None]


def _path_factors(a: Tensor, b: Tensor, w: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """Compute the factors of the offsets ``a`` and ``b`` (N, D), (1 or N, S) each."""
    linear = (1 - w)[None], w[None]
    if path == "linear":
        return linear
    if path == "rescaled":
        radius = ((1 - w) ** 2 + w**2).sqrt()
        return linear[0] / radius, linear[1] / radius

    angle = F.cosine_similarity(a, b).clamp(-1, 1).acos()[:, None]
    parallel, sine = angle.sin() < PARALLEL_EPS, angle.sin().clamp(min=PARALLEL_EPS)
    factor_a, factor_b = (torch.where(parallel, factor, (factor * angle).sin() / sine) for factor in linear)
    return factor_a, factor_b


@torch.no_grad()
def encode(flow: Flow, images: Tensor, batch_size: int = CHUNK) -> Tensor:
    """Encode uint8 images (N, C, H, W) to latents (N, D) on the device of the flow."""
    _check_event(flow)
    device = flow.gaussians.mean.device
    parts = tqdm(images.split(batch_size), "encoding", unit=" batches", leave=False, delay=2)
    return torch.cat([flow.encode(part.to(device).float() / 255)[0] for part in parts])


def latent_map(flow: Flow, images: Tensor, method: str = "pca", seed: int = 0) -> np.ndarray:
    """Embed the latents of images in two dimensions, by PCA or t-SNE.

    Args:
        flow: a trained flow for images.
        images: uint8 (N, C, H, W).
        method: "pca" (linear: distances are meaningful) or "tsne" (only neighbourhoods are meaningful).
        seed: seed of the method.

    Returns:
        Coordinates (N, 2).

    Raises:
        ValueError: if the method is unknown or there are fewer than four images.
    """
    from sklearn.decomposition import PCA  # slow to import, and used only here
    from sklearn.manifold import TSNE

    if method not in MAPS:
        raise ValueError(f"method is {method!r}; expected one of {MAPS}")
    if len(images) < 4:
        raise ValueError(f"{len(images)} images are too few for a map; expected at least 4")

    z = encode(flow.freeze(), images).cpu().numpy()
    if method == "pca":
        return PCA(2, random_state=seed).fit_transform(z)
    return TSNE(2, perplexity=min(30, (len(z) - 1) / 3), init="pca", random_state=seed).fit_transform(z)


def _decode(flow: Flow, z: Tensor, batch_size: int) -> Tensor:
    """Decode latents (N, D) to uint8 images on the CPU."""
    x = torch.cat([flow.decode(part) for part in z.split(batch_size)])
    if bad := int((~torch.isfinite(x)).flatten(1).any(1).sum()):
        raise ValueError(f"{bad} of {len(x)} latents decode to NaN or infinite pixels; lower the temperature")
    return (quantise(x, flow.grey_levels) * 255).round().to(torch.uint8).cpu()


def _check_event(flow: Flow) -> None:
    if len(flow.event_shape) != 3:
        raise ValueError(
            f"this flow models vectors of shape {flow.event_shape}, not images; use flow.sample and flow.encode"
        )
