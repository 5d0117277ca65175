import pytest
import torch

from flowaug.latents.pca import ClasswisePCA
from tests import oracles


def _latents(sizes=(30, 40, 25), dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(3.0, 0.2, dim)
    blocks = []
    for label, size in enumerate(sizes):
        rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
        blocks.append(torch.randn(size, dim, generator=generator) * scale @ rotation + label)
    return blocks


def _batch(blocks, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(len(blocks), (n,), generator=generator)
    z = torch.stack([blocks[k][int(torch.randint(len(blocks[k]), (1,), generator=generator))] for k in y])
    return z, y


@pytest.mark.parametrize("sizes", [(30, 40, 25), (8, 9, 12)], ids=["N>D", "N<=D"])
def test_projectors_and_variances_match_the_svd(sizes):
    blocks = _latents(sizes)
    pca = ClasswisePCA.fit(blocks, rank=5)
    for label, z in enumerate(blocks):
        axes, variance = oracles.principal_axes(z, 5)
        ours = pca.axes[label].double()
        # the tolerance is that of axes stored in float32, not of the algorithm
        torch.testing.assert_close(ours.T @ ours, axes.T @ axes, atol=2e-6, rtol=0)
        torch.testing.assert_close(pca.variance[label].double(), variance, atol=0, rtol=1e-6)
        torch.testing.assert_close(pca.mean[label], z.mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("sizes", "least"), [((200, 220), 28), ((20, 30), 19)], ids=["N>D", "N<=D"])
def test_axes_are_orthonormal_for_a_spectrum_over_many_decades(sizes, least):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -9, 40, dtype=torch.float64)
    blocks = [torch.randn(n, 40, generator=generator, dtype=torch.float64) * scale for n in sizes]
    pca = ClasswisePCA.fit(blocks, rank=40)
    gram = pca.axes.double() @ pca.axes.double().mT
    known = pca.variance > 0
    assert known.sum(1).min() >= least
    torch.testing.assert_close(gram, torch.diag_embed(known.double()), atol=1e-6, rtol=0)


def test_coords_of_all_training_samples_are_grouped_by_class():
    blocks = _latents()
    pca = ClasswisePCA.fit(iter(blocks), rank=4)
    assert pca.offsets.tolist() == [0, 30, 70, 95]
    assert pca.count.tolist() == [30, 40, 25]
    assert pca.labels.tolist() == [0] * 30 + [1] * 40 + [2] * 25
    assert pca.coords.dtype == torch.float16
    expected = oracles.project_one_by_one(pca.axes, pca.mean, torch.cat(blocks), pca.labels)
    torch.testing.assert_close(pca.coords.double(), expected, atol=1e-5, rtol=2**-10)  # float16
    for label in range(3):
        rows = pca.coords[pca.offsets[label] : pca.offsets[label + 1]].double()
        torch.testing.assert_close(rows.var(0, unbiased=False), pca.variance[label].double(), atol=0, rtol=1e-3)


@pytest.mark.parametrize("rank", [1, 4, 9, None])
def test_project_matches_the_loop_over_samples(rank):
    blocks = _latents()
    pca, (z, y) = ClasswisePCA.fit(blocks, rank=11), _batch(blocks, 33)
    expected = oracles.project_one_by_one(pca.axes[:, :rank], pca.mean, z, y)
    torch.testing.assert_close(pca.project(z, y, rank).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 4, 11])
def test_combine_matches_the_loop_over_samples(rank):
    blocks = _latents()
    pca, (z, y) = ClasswisePCA.fit(blocks, rank=11), _batch(blocks, 33)
    a = z[:, :rank]
    expected = oracles.combine_one_by_one(pca.axes[:, :rank], a, y)
    torch.testing.assert_close(pca.combine(a, y).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_full_rank_is_lossless_for_training_latents_in_every_grad_mode(mode):
    blocks = _latents((9, 8))
    pca, (z, y) = ClasswisePCA.fit(blocks, rank=8), _batch(blocks, 6)
    with mode():
        back = pca.mean[y] + pca.combine(pca.project(z, y), y)
    torch.testing.assert_close(back, z, atol=1e-5, rtol=0)


def test_small_and_degenerate_classes_are_padded_with_zeros():
    blocks = [torch.randn(1, 6), torch.randn(3, 6), torch.ones(5, 6) / 3, torch.randn(20, 6)]
    pca = ClasswisePCA.fit(blocks, rank=8)
    known = (pca.axes.square().sum(2) > 0.5).sum(1)
    assert known.tolist() == [0, 2, 0, 6]
    assert torch.equal(pca.variance > 0, torch.arange(8) < known[:, None])
    assert pca.coords[:1].eq(0).all()
    assert torch.equal(pca.sample(torch.tensor([0, 2])), pca.mean[torch.tensor([0, 2])])


def test_signs_of_the_axes_are_deterministic():
    blocks = _latents()
    first, flipped = ClasswisePCA.fit(blocks, 4), ClasswisePCA.fit([z.flip(0) for z in blocks], 4)
    torch.testing.assert_close(first.axes, flipped.axes, atol=1e-5, rtol=0)
    largest = first.axes.gather(2, first.axes.abs().argmax(2, keepdim=True))
    assert largest.gt(0).all()


def test_samples_at_full_rank_have_the_class_covariance():
    blocks = _latents((60, 5), dim=4)
    pca, y = ClasswisePCA.fit(blocks, rank=4), torch.zeros(100_000, dtype=torch.int64)
    z = pca.sample(y, generator=torch.Generator().manual_seed(2)).double()
    centered = blocks[0].double() - blocks[0].double().mean(0)
    covariance = centered.T @ centered / 60
    # six standard errors of a covariance entry: √((σᵢᵢσⱼⱼ + σᵢⱼ²)/n)
    error = ((covariance.diag().outer(covariance.diag()) + covariance.square()) / 100_000).sqrt()
    assert ((z.T.cov() - covariance).abs() < 6 * error).all()
    assert torch.equal(pca.sample(y[:2], 0.0), pca.mean[y[:2]])


def test_tensors_round_trip_and_to_moves_every_buffer():
    pca = ClasswisePCA.fit(_latents(), rank=3)
    again = ClasswisePCA.from_tensors(pca.tensors())
    for name, buffer in pca.named_buffers():
        assert torch.equal(buffer, dict(again.named_buffers())[name]), name
    assert {buffer.device.type for buffer in pca.to("meta").buffers()} == {"meta"}
    with pytest.raises(ValueError, match="missing offsets"):
        ClasswisePCA.from_tensors({name: t for name, t in again.tensors().items() if name != "offsets"})


GOOD = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("latents", "rank", "message"),
    [
        ([GOOD, GOOD[:0]], 2, "class 1 has no samples"),
        ([GOOD, GOOD / 0], 2, "class 1 contain NaN or infinity"),
        ([GOOD, GOOD[:, :2]], 2, r"class 1 must be \(N_y, 3\), got \(5, 2\)"),
        ([GOOD], 0, "rank must be at least 1, got 0"),
        ([], 2, "latents is empty"),
        ([GOOD * 1e6], 2, "class 0 exceed the float16 range"),
    ],
)
def test_invalid_latents_raise_an_error_naming_the_class(latents, rank, message):
    with pytest.raises(ValueError, match=message):
        ClasswisePCA.fit(latents, rank)


def test_invalid_arguments_raise():
    pca, y = ClasswisePCA.fit([GOOD, GOOD], rank=2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"rank must be in \[1, 2\], got 3"):
        pca.project(GOOD[:2], y, rank=3)
    with pytest.raises(ValueError, match=r"rank must be in \[1, 2\], got 0"):
        pca.combine(torch.zeros(2, 0), y)
    with pytest.raises(ValueError, match=r"latents \(B, 3\) and labels"):
        pca.project(GOOD[:2, :2], y)
    with pytest.raises(ValueError, match="coordinates"):
        pca.combine(torch.zeros(3, 2), y)
    with pytest.raises(ValueError, match="temperature"):
        pca.sample(y, temperature=-0.1)
    with pytest.raises(ValueError, match="offsets must be non-decreasing from 0 to 10"):
        ClasswisePCA(pca.axes, pca.variance, pca.mean, pca.coords, torch.tensor([0, 5, 9]))
    with pytest.raises(ValueError, match="must have shapes"):
        ClasswisePCA(pca.axes, pca.variance[:1], pca.mean, pca.coords, pca.offsets)
