"""Images from the class Gaussians, the ways between two images in the latent space, and a map of it."""

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
STRAIGHT = 1e-3  # sine of an angle below which the arc is taken as the line


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
    """Draw one image per label, on the grey levels of the flow.

    The noise belongs to chunks of 256 images, each with a seed of its own: the draws do not depend on the batch size,
    and any chunk can be drawn without those before it.

    Args:
        flow: a trained flow of images.
        y: integer labels (N,).
        temperature: scales the covariance; 0 gives the class means.
        seed: seed of the draws.
        gaussians: full class covariances to draw from (:func:`rfcm`); None for the flow's own diagonal ones.
        batch_size: images that are decoded at a time, 256 at most.
        chunk: number of the chunk that ``y`` starts with.

    Returns:
        uint8 (N, C, H, W) on the CPU.

    Raises:
        ValueError: a flow of vectors, no labels, a negative temperature, or draws that the flow cannot decode.

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
    """Re-estimate the full covariance of every class from the latents of its training images, to draw from.

    A class of N_y images has a covariance of rank N_y − 1: its PCA at that rank, K × rank × D numbers in memory.

    Args:
        flow: a trained flow of images.
        train: the training images.

    Raises:
        ValueError: images of other classes than the flow's in number, or a class without an image.
    """
    if train.num_classes != flow.gaussians.num_classes:
        ours = flow.gaussians.num_classes
        raise ValueError(f"the flow knows {ours} classes but the images have {train.num_classes}; give its own data")
    largest = int(torch.as_tensor(train.targets).bincount().max())
    rank = max(1, min(largest - 1, flow.dim))
    return fit_pca(flow.freeze(), train, flow.gaussians.mean.device, rank)


def choose_pairs(targets: Tensor, count: int, across: bool = False, seed: int = 0) -> Tensor:
    """Positions (count, 2) of random pairs of images, the classes of the first taking turns.

    Args:
        targets: labels (N,).
        count: number of pairs.
        across: pair images of different classes instead of one class.
        seed: seed of the choice.

    Raises:
        ValueError: no class with two images, or a single class where two are needed.
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
    """Walk from one image to another in the latent space.

    Args:
        flow: a trained flow of images.
        images: pairs, uint8 (N, 2, C, H, W).
        targets: their labels (N, 2); the way leads about the class means, see :func:`interpolate_latents`.
        steps: images on the way, both ends among them.
        path: "linear", "rescaled" or "spherical".
        batch_size: images that go through the flow at a time.

    Returns:
        uint8 (N, steps, C, H, W) on the CPU.

    Raises:
        ValueError: fewer than two steps, labels that the flow does not know, unknown path, or a flow of vectors.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}; expected at least 2, the two images themselves")
    flow, mean = flow.freeze(), flow.gaussians.mean
    if not 0 <= int(targets.min()) <= int(targets.max()) < len(mean):
        raise ValueError(f"labels run from {targets.min()} to {targets.max()}; the flow knows 0 to {len(mean) - 1}")
    z = encode(flow, images.flatten(0, 1), batch_size).unflatten(0, (-1, 2))
    weights = torch.linspace(0, 1, steps, device=z.device)
    centres = mean[targets.to(mean.device)]
    walk = interpolate_latents(z[:, 0], z[:, 1], weights, path, centres[:, 0], centres[:, 1])
    return _decode(flow, walk.flatten(0, 1), batch_size).unflatten(0, (-1, steps))


def interpolate_latents(a: Tensor, b: Tensor, weights: Tensor, path: str, centre_a: Tensor, centre_b: Tensor) -> Tensor:
    r"""Points between latents, :math:`\mu_w + s_a (a - \mu_a) + s_b (b - \mu_b)`, the centre moving on a line.

    "linear": shares 1 − w and w, the straight line. "rescaled": these over √((1−w)² + w²), which keeps the radius of
    independent draws that the line shrinks (SPEC §4). "spherical": sin((1−w)θ)/sin θ and sin(wθ)/sin θ, θ the angle
    between the two as seen from their centres (Shoemake, "Animating Rotation with Quaternion Curves", 1985); the line
    where they are parallel.

    Args:
        a: latents (N, D).
        b: latents (N, D).
        weights: shares of ``b``, (S,).
        path: "linear", "rescaled" or "spherical".
        centre_a: class means of ``a``, (N, D).
        centre_b: class means of ``b``, (N, D); those of ``a`` within a class.

    Returns:
        (N, S, D).
    """
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; expected one of {PATHS}")
    p, q = a - centre_a, b - centre_b
    share_p, share_q = _shares(p, q, weights, path)
    centre = torch.lerp(centre_a[:, None], centre_b[:, None], weights[:, None])
    return centre + share_p[..., None] * p[:, None] + share_q[..., None] * q[:, None]


def _shares(p: Tensor, q: Tensor, w: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """Shares of both offsets, (1 or N, S)."""
    line = (1 - w)[None], w[None]
    if path == "linear":
        return line
    if path == "rescaled":
        radius = ((1 - w) ** 2 + w**2).sqrt()
        return line[0] / radius, line[1] / radius
    angle = F.cosine_similarity(p, q).clamp(-1, 1).acos()[:, None]
    straight, sine = angle.sin() < STRAIGHT, angle.sin().clamp(min=STRAIGHT)
    return tuple(torch.where(straight, share, (share * angle).sin() / sine) for share in line)


@torch.no_grad()
def encode(flow: Flow, images: Tensor, batch_size: int = CHUNK) -> Tensor:
    """Latents (N, D) of uint8 images (N, C, H, W), on the device of the flow."""
    _check_event(flow)
    device = flow.gaussians.mean.device
    parts = tqdm(images.split(batch_size), "encoding", unit=" batches", leave=False, delay=2)
    return torch.cat([flow.encode(part.to(device).float() / 255)[0] for part in parts])


def latent_map(flow: Flow, images: Tensor, method: str = "pca", seed: int = 0) -> np.ndarray:
    """Lay the latents of images out in the plane, by PCA over all of them or t-SNE.

    Args:
        flow: a trained flow of images.
        images: uint8 (N, C, H, W).
        method: "pca" (a linear view: distances mean something) or "tsne" (neighbours only).
        seed: seed of the method.

    Returns:
        Coordinates (N, 2).

    Raises:
        ValueError: unknown method, or fewer than four images.
    """
    from sklearn.decomposition import PCA  # imported here: slow, and only maps need it
    from sklearn.manifold import TSNE

    if method not in MAPS:
        raise ValueError(f"method is {method!r}; expected one of {MAPS}")
    if len(images) < 4:
        raise ValueError(f"{len(images)} images do not make a map; expected at least 4")
    z = encode(flow.freeze(), images).cpu().numpy()
    if method == "pca":
        return PCA(2, random_state=seed).fit_transform(z)
    return TSNE(2, perplexity=min(30, (len(z) - 1) / 3), init="pca", random_state=seed).fit_transform(z)


def _decode(flow: Flow, z: Tensor, batch_size: int) -> Tensor:
    x = torch.cat([flow.decode(part) for part in z.split(batch_size)])
    if bad := int((~torch.isfinite(x)).flatten(1).any(1).sum()):
        raise ValueError(f"{bad} of {len(x)} latents decode to NaN or infinite pixels; lower the temperature")
    return (quantise(x, flow.grey_levels) * 255).round().to(torch.uint8).cpu()


def _check_event(flow: Flow) -> None:
    if len(flow.event_shape) != 3:
        raise ValueError(
            f"this flow models vectors of shape {flow.event_shape}, not images; use flow.sample and encode"
        )
