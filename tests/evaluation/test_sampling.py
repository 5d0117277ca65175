import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowaug import ClasswisePCA, MixPlan, create_flow, mix_latents
from flowaug.data.loaders import mix_seed
from flowaug.evaluation.export import MANIFEST, generate
from flowaug.evaluation.sampling import (
    PATHS,
    choose_pairs,
    encode,
    interpolate,
    interpolate_latents,
    latent_map,
    rfcm,
    sample,
)
from flowaug.flows.passes import ImageTable
from flowaug.mixup.offline import CHUNK
from flowaug.pixels import quantise
from tests import oracles
from tests.conftest import NAMES, make_flow, make_pca


@pytest.fixture(scope="module")
def grey():
    return make_flow((1, 4, 4))


def labels(count):
    return torch.arange(count) % 3


def images(count, shape=(1, 4, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def test_samples_do_not_depend_on_the_batch_size_or_on_previous_chunks(grey):
    y = labels(CHUNK + 40)
    state = torch.get_rng_state()
    whole = sample(grey, y, 0.5, seed=3)
    assert (whole.shape, whole.dtype) == ((CHUNK + 40, 1, 4, 4), torch.uint8)
    assert torch.equal(torch.get_rng_state(), state)
    for batch_size in (7, 100):
        batched = sample(grey, y, 0.5, seed=3, batch_size=batch_size).int()
        assert (batched - whole.int()).abs().max() <= 1  # rounding of matrix products depends on the batch size
    assert torch.equal(sample(grey, y[CHUNK:], 0.5, seed=3, chunk=1), whole[CHUNK:])
    alike = sample(grey, torch.zeros(2 * CHUNK, dtype=torch.int64))
    assert not torch.equal(alike[:CHUNK], alike[CHUNK:])
    assert not torch.equal(sample(grey, y, 0.5, seed=4), whole)


def test_temperature_zero_returns_the_decoded_means(grey):
    mean = quantise(grey.decode(grey.gaussians.mean).detach())
    for seed in (0, 1):
        assert torch.equal(sample(grey, labels(3), 0.0, seed), (mean * 255).round().to(torch.uint8))


def test_samples_are_quantised_to_the_grey_levels_of_the_flow():
    flow = create_flow("mef_tiny", event_shape=(1, 4, 4), num_classes=3, grey_levels=3, steps=1, hidden=8)
    assert set(sample(flow, labels(30)).unique().tolist()) == {0, 128, 255}


def test_samples_have_mean_and_variance_of_their_class():
    flow = create_flow("mef_tiny", event_shape=(1, 4, 4), num_classes=3, steps=1, hidden=8)  # nearly a rotation
    mean, scale = 0.1 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), 1e-4
    centre = flow.encode(torch.full((1, 1, 4, 4), 0.5))[0].detach()
    flow.gaussians.assign_((centre + mean, torch.full((3, 16), scale)))
    y = labels(3 * 400)
    z = encode(flow, sample(flow, y, temperature=0.5))
    means, variances = oracles.class_statistics(z, y, 3)
    torch.testing.assert_close(means, (centre + mean).double(), rtol=0, atol=3e-3)
    assert variances.mean().item() == pytest.approx(0.5 * scale, rel=0.1)


def test_rfcm_samples_with_the_full_covariance_of_the_latents(grey):
    table = ImageTable(images(60), labels(60), 3)
    covariance = rfcm(grey, table)
    assert covariance.rank == 16  # D, with 20 images of each class
    z = encode(grey, table.images)[table.targets == 1].double()
    axes, variance = covariance.axes[1].double(), covariance.variance[1].double()
    torch.testing.assert_close(axes.T @ torch.diag(variance) @ axes, z.T.cov(correction=0), rtol=1e-4, atol=1e-5)
    assert rfcm(grey, table.subset(torch.arange(12))).rank == 3  # N_y − 1, with 4 images of each class
    latents = covariance.sample(labels(9), 0.5, torch.Generator().manual_seed(mix_seed(1, 0)))
    expected = quantise(grey.decode(latents).detach()) * 255
    assert (sample(grey, labels(9), 0.5, 1, covariance) - expected).abs().max() < 1.5
    assert (sample(grey, labels(9), 0.5, 1) - expected).abs().max() > 10


WEIGHTS = torch.linspace(0, 1, 5, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_paths_match_the_formulas(path):
    a, b, first, second = torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latents_on_path = interpolate_latents(a, b, WEIGHTS, path, first, second)
    for i, (j, w) in ((i, pair) for i in range(6) for pair in enumerate(WEIGHTS.tolist())):
        expected = oracles.interpolate_one(a[i], b[i], first[i], second[i], w, path)
        torch.testing.assert_close(latents_on_path[i, j], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(latents_on_path[:, 0], a)
    torch.testing.assert_close(latents_on_path[:, -1], b)


@pytest.mark.parametrize("rescaled", [False, True])
def test_paths_within_a_class_equal_flow_mixup_at_full_rank(rescaled):
    z = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    pca = ClasswisePCA.fit([z], 6)
    pair, y = z[:2], torch.zeros(2, dtype=torch.int64)
    plan = MixPlan(y, torch.full((2, 6), 0.3), torch.tensor([1, 0]), source="batch", rescaled=rescaled)
    latents_on_path = interpolate_latents(
        z[:1], z[1:2], torch.tensor([0.3]), ("linear", "rescaled")[rescaled], pca.mean, pca.mean
    )
    torch.testing.assert_close(latents_on_path[0, 0], mix_latents(pair, y, pca, plan)[0], rtol=1e-4, atol=1e-5)


def test_spherical_path_keeps_the_radius_and_is_linear_for_parallel_latents():
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    zero = torch.zeros(1, 2)
    latents_on_path = interpolate_latents(a, b, WEIGHTS.float(), "spherical", zero, zero)
    torch.testing.assert_close(latents_on_path.norm(dim=2), torch.full((1, 5), 3.0))
    for other in (2 * a, -a):
        latents_on_path = interpolate_latents(a, other, WEIGHTS.float(), "spherical", zero, zero)
        line = torch.lerp(a[:, None], other[:, None], WEIGHTS.float()[:, None])
        torch.testing.assert_close(latents_on_path, line, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
def test_interpolation_starts_and_ends_at_the_images(grey, path):
    pairs = images(6).unflatten(0, (3, 2))
    images_on_path = interpolate(grey, pairs, torch.tensor([[0, 0], [1, 1], [0, 2]]), steps=4, path=path, batch_size=5)
    assert images_on_path.shape == (3, 4, 1, 4, 4)
    assert torch.equal(images_on_path[:, [0, -1]], pairs)
    assert not torch.equal(images_on_path[:, 1], images_on_path[:, 0])


def test_choose_pairs():
    y = torch.tensor([0, 0, 0, 1, 2, 2])
    within = choose_pairs(y, 8)
    assert (y[within[:, 0]] == y[within[:, 1]]).all()
    assert (within[:, 0] != within[:, 1]).all()
    assert y[within[:, 0]].tolist() == [0, 2] * 4  # class 1 has one image
    across = choose_pairs(y, 30, across=True)
    assert (y[across[:, 0]] != y[across[:, 1]]).all()
    assert y[across[:3, 0]].tolist() == [0, 1, 2]
    assert torch.equal(choose_pairs(y, 8), within)
    assert not torch.equal(choose_pairs(y, 8, seed=1), within)


def test_pca_map_is_the_projection_onto_the_leading_components(grey):
    x = images(40)
    points = latent_map(grey, x)
    axes, variance = oracles.principal_axes(encode(grey, x), 2)
    np.testing.assert_allclose(points.var(0), variance.numpy(), rtol=1e-3)
    centred = encode(grey, x).double() - encode(grey, x).double().mean(0)
    np.testing.assert_allclose(np.abs(points), (centred @ axes.T).abs().numpy(), atol=1e-3)


def test_tsne_map_separates_groups_and_is_seeded(grey):
    y = torch.arange(24) % 2
    x = (images(24) // 8 + (220 * y)[:, None, None, None]).to(torch.uint8)
    points = latent_map(grey, x, "tsne", seed=1)
    np.testing.assert_array_equal(latent_map(grey, x, "tsne", seed=1), points)
    near = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(24)
    assert (y[near.argmin(1)] == y).float().mean() > 0.9


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_generated_folder(grey, tmp_path):
    assert generate(grey, 4, tmp_path, temperature=0.5, seed=2) == {"images": 12, "kept": 0}
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == list(NAMES)
    expected = sample(grey, labels(12), 0.5, seed=2)
    for i, image in enumerate(expected):
        with Image.open(tmp_path / "train" / NAMES[i % 3] / f"{i:07d}-1.png") as file:
            np.testing.assert_array_equal(np.asarray(file), image[0].numpy())
    assert json.loads((tmp_path / MANIFEST).read_text())["temperature"] == 0.5


@pytest.mark.parametrize("layout", ["folder", "webdataset"])
def test_interrupted_generation_continues_to_the_same_files(grey, tmp_path, layout):
    options = {"layout": layout, "gaussians": make_pca(grey), "settings": {"rfcm": True}}
    for name in ("whole", "cut"):
        generate(grey, CHUNK // 3 + 9, tmp_path / name, **options)
    files = sorted(p for p in (tmp_path / "cut").rglob("*") if p.suffix in (".png", ".tar"))
    assert len(files) == (282 if layout == "folder" else 2)
    for path in files[1::2]:
        path.unlink()
    counts = generate(grey, CHUNK // 3 + 9, tmp_path / "cut", **options)
    assert counts["images"] + counts["kept"] == 282
    assert 0 < counts["images"] < 282
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    if layout == "folder":  # images of the second chunk equal those of a single call
        expected = sample(grey, labels(282), gaussians=options["gaussians"])[281, 0]
        with Image.open(tmp_path / "cut" / "train" / "cat" / "0000281-1.png") as file:
            np.testing.assert_array_equal(np.asarray(file), expected.numpy())


def test_folders_of_a_flow_without_names_sort_by_label(tmp_path):
    flow = make_flow((1, 4, 4), num_classes=3)
    flow.class_names = None
    generate(flow, 1, tmp_path)
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["000000", "000001", "000002"]


def broken(flow):
    flow = make_flow(flow.event_shape)
    flow.gaussians.mean.fill_(torch.inf)
    return flow


def vectors():
    return create_flow("vector_tiny", event_shape=(4,), num_classes=2)


BAD = [
    (lambda f: sample(f, labels(0)), "no labels"),
    (lambda f: sample(f, labels(2), -1.0), "temperature scales the covariance and must be >= 0, got -1.0"),
    (lambda f: sample(broken(f), labels(2)), "2 of 2 latents decode to NaN or infinite pixels; lower the temperature"),
    (lambda f: sample(vectors(), labels(2)), r"models vectors of shape \(4,\), not images"),
    (lambda f: rfcm(f, ImageTable(images(4), labels(4), 4)), "the flow has 3 classes but the images have 4"),
    (lambda f: interpolate(f, images(2)[None], labels(2)[None], steps=1), "steps is 1; expected at least 2"),
    (lambda f: interpolate(f, images(2)[None], labels(2)[None], path="bent"), "path is 'bent'; expected one of"),
    (
        lambda f: interpolate(f, images(2)[None], labels(2)[None] + 2),
        "the labels range from 2 to 3; expected labels of the flow, 0 to 2",
    ),
    (lambda f: choose_pairs(labels(3), 2), "expected a class of at least two images"),
    (lambda f: choose_pairs(labels(3)[:1].repeat(4), 2, True), "expected at least two classes"),
    (lambda f: latent_map(f, images(9), "umap"), "method is 'umap'"),
    (lambda f: latent_map(f, images(3)), "3 images are too few for a map"),
]


@pytest.mark.parametrize(("run", "message"), BAD)
def test_bad_input(grey, run, message):
    with pytest.raises(ValueError, match=message):
        run(grey)


BAD_DATA_SETS = [
    ({"per_class": 0}, "per_class is 0; expected at least 1"),
    ({"temperature": -1.0}, "must be >= 0"),
    ({"layout": "zip"}, "layout is 'zip'; expected one of"),
]


@pytest.mark.parametrize(("options", "message"), BAD_DATA_SETS)
def test_generation_with_a_bad_argument_writes_nothing(grey, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        generate(grey, **{"per_class": 1, "folder": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_generation_with_other_settings_is_rejected(grey, tmp_path):
    generate(grey, 1, tmp_path)
    with pytest.raises(ValueError, match=r"holds another export: its temperature is 1.0, not 0.5"):
        generate(grey, 1, tmp_path, temperature=0.5)
