"""The rivals with which the benchmarks compare flow mixup."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flowaug import ClasswisePCA, GaussianParameters, MixPlan, mix_latents, save_flow
from flowaug.data import ImageDataset

from .conftest import NAMES, make_flow

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
KINDS = ("pixel", "latent", "noise", "gaussian")
OPTIONS = {"pixel": {"alpha": 1.0}, "latent": {"alpha": 1.0}, "noise": {"strength": 0.5}, "gaussian": {"strength": 0.5}}
Y = torch.tensor([2, 0, 1, 2, 0, 1])


@pytest.fixture
def rivals(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import rivals

    return rivals


@pytest.fixture
def train():
    """Twelve shuffled images for each of three classes; mid-grey, so that no decoded image is rejected."""
    rng = np.random.default_rng(0)
    targets = rng.permutation(np.arange(36) % 3)
    return ImageDataset(rng.integers(80, 170, (36, 8, 8, 3), dtype=np.uint8), targets, NAMES)


@pytest.fixture
def source(tmp_path, train):
    """Folder of a flow with narrow Gaussians of different variances and with class PCA at full rank."""
    flow = make_flow()
    with torch.no_grad():
        pca = ClasswisePCA.fit([flow.encode(own(train, k))[0] for k in range(3)], 11)
    variance = torch.rand(3, flow.dim, generator=torch.Generator().manual_seed(3)) + 0.1
    flow.gaussians.assign_(GaussianParameters(pca.mean, 1e-3 * variance))
    return save_flow(flow, tmp_path / "flow", pca, class_names=list(NAMES))


@pytest.fixture
def batch(train):
    """Six training images with the labels ``Y``, in [0, 1] and of 8 bits."""
    rows = [int(np.flatnonzero(train.targets == k)[i]) for i, k in enumerate(Y.tolist())]
    return torch.from_numpy(train.images[rows]).permute(0, 3, 1, 2).float() / 255


def make(rivals, kind, source, train, **keywords):
    options = {"p": 1.0, "max_outside": 1.0, **OPTIONS[kind], **keywords}
    return rivals.create_augmentation(kind, source, train, **options)


def own(train, k):
    """Return the images of a class in the order of the data set, in [0, 1]."""
    return torch.from_numpy(train.images[train.targets == k]).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_unchanged_and_seeds_are_reproducible(rivals, kind, source, train, batch):
    first, again, other = (make(rivals, kind, source, train, seed=seed) for seed in (1, 1, 2))
    x, y = first(batch, Y)
    assert y is Y
    assert (x != batch).flatten(1).any(1).sum() >= 4  # an image may be its own partner
    assert first.counts == {"seen": 6, "augmented": 6, "rejected": 0, "no_partner": 0}
    assert torch.equal(x, again(batch, Y)[0])
    assert not torch.equal(x, other(batch, Y)[0])
    first.reseed(1, 0)
    assert torch.equal(x, first(batch, Y)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_weight_0_leaves_images_unchanged_and_p_is_the_augmented_fraction(rivals, kind, source, train, batch):
    transform = make(rivals, kind, source, train)
    plan = transform.plan(Y)
    weightless = MixPlan(plan.index, torch.zeros_like(plan.weight), plan.partner, plan.noise)
    assert torch.equal(transform.apply(batch, Y, weightless), batch)
    half = make(rivals, kind, source, train, p=0.5)
    half(batch.repeat(50, 1, 1, 1), Y.repeat(50))
    assert 120 < half.counts["augmented"] < 180


def test_pixels_are_mixed_with_an_image_of_the_class(rivals, source, train, batch):
    transform = make(rivals, "pixel", source, train)
    plan = transform.plan(Y)
    mixed = transform.apply(batch, Y, plan)
    for i, k in enumerate(Y.tolist()):
        partner, w = own(train, k)[int(plan.partner[i]) - 12 * k], float(plan.weight[i, 0])
        torch.testing.assert_close(mixed[i], (1 - w) * batch[i] + w * partner, rtol=0, atol=1e-6)


def test_latent_mixup_is_flow_mixup_at_full_rank(rivals, source, train, batch):
    transform = make(rivals, "latent", source, train)
    flow, plan = transform.flow, transform.plan(Y)
    mixed = transform.apply(batch, Y, plan)
    z = flow.encode(batch)[0]
    partners = [own(train, k)[int(row) - 12 * k] for k, row in zip(Y.tolist(), plan.partner, strict=True)]
    w = plan.weight[:, :1]
    expected = flow.decode((1 - w) * z + w * flow.encode(torch.stack(partners))[0])
    torch.testing.assert_close(mixed, expected.clamp(0, 1), rtol=0, atol=1e-5)
    full_rank = flow.decode(mix_latents(z, Y, transform.pca, plan))
    torch.testing.assert_close(mixed, full_rank.clamp(0, 1), rtol=0, atol=0.01)  # pca.coords is in half precision


def test_noise_and_draws_have_the_moments_of_the_class(rivals, source, train, batch):
    x, y = batch[:1].expand(2000, -1, -1, -1), Y[:1].expand(2000)
    for kind in ("noise", "gaussian"):
        transform = make(rivals, kind, source, train)
        flow, gaussians = transform.flow, transform.flow.gaussians
        z = flow.encode(transform.apply(x, y, transform.plan(y)))[0]
        centre = flow.encode(batch[:1])[0][0] if kind == "noise" else gaussians.mean[2]
        variance = gaussians.variance[2] * (0.25 if kind == "noise" else 0.5)
        error = (z.mean(0) - centre) / (variance / 2000).sqrt()
        assert error.abs().mean() < 1.2, kind  # the mean of |N(0, 1)| is √(2/π) = 0.8
        assert abs(float((z.var(0) / variance).mean()) - 1) < 0.05, kind


BAD = [
    ("shuffle", r"unknown augmentation 'shuffle'; expected one of flow, pixel"),
    ("pixel", r"24 images but .* fitted to 36"),
]


@pytest.mark.parametrize(("kind", "message"), BAD)
def test_bad_input(rivals, kind, message, source, train):
    with pytest.raises(ValueError, match=message):
        rivals.create_augmentation(kind, source, train.subset(np.flatnonzero(train.targets != 1)))
