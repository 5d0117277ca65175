import numpy as np
import pytest
import timm
import torch

from flowaug.evaluation.metrics import cnn_accuracy, coverage, density, features, fid, label_reliability
from flowaug.evaluation.oracle import Oracle, load_oracle, small_oracle
from tests import oracles
from tests.conftest import NAMES

# numbers of real and fake samples, dimension, k
CASES = {
    "alike": (40, 40, 3, 5),
    "uneven": (30, 17, 4, 3),
    "few": (7, 9, 12, 2),  # fewer samples than dimensions
    "line": (25, 30, 1, 1),
    "ties": (36, 20, 2, 4),  # rounded, so that distances are equal
}


def samples(name):
    n, m, d, k = CASES[name]
    generator = torch.Generator().manual_seed(n)
    real, fake = torch.randn(n, d, generator=generator), 0.3 + 0.8 * torch.randn(m, d, generator=generator)
    return ((3 * real).round(), (3 * fake).round(), k) if name == "ties" else (real, fake, k)


@pytest.mark.parametrize("name", CASES)
def test_fid_matches_the_matrix_square_root(name):
    real, fake, _ = samples(name)
    assert fid(real, fake) == pytest.approx(float(oracles.frechet_distance(real, fake)), rel=1e-6)
    assert fid(real, real) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_fid_matches_torchmetrics(name):
    frechet = pytest.importorskip("torchmetrics.image.fid").FrechetInceptionDistance
    real, fake, _ = samples(name)
    identity = torch.nn.Flatten()
    identity.num_features = real.shape[1]
    metric = frechet(feature=identity, normalize=False).set_dtype(torch.float64)
    metric.update(real.double()[:, :, None, None], real=True)
    metric.update(fake.double()[:, :, None, None], real=False)
    assert fid(real, fake) == pytest.approx(float(metric.compute()), rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_density_and_coverage_match_the_definition_for_any_block_size(name, monkeypatch):
    real, fake, k = samples(name)
    expected = oracles.density_and_coverage(real, fake, k)
    for block in (1, 100, 2**23):
        monkeypatch.setattr("flowaug.evaluation.metrics.BLOCK", block)
        assert (density(real, fake, k), coverage(real, fake, k)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"ties"}))  # rounding errors of sklearn's distances break ties
def test_density_and_coverage_match_prdc(name, capsys):
    compute = pytest.importorskip("prdc").compute_prdc
    real, fake, k = samples(name)
    expected = compute(real.double().numpy(), fake.double().numpy(), k)
    assert density(real, fake, k) == pytest.approx(expected["density"], rel=1e-6)
    assert coverage(real, fake, k) == pytest.approx(expected["coverage"], rel=1e-6)


def test_metrics_distinguish_a_missing_mode_from_noise():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 2, generator=generator) + 10 * (torch.arange(200) % 2)[:, None]
    one_mode, noisy = real[::2] + 0.01, real + 5 * torch.randn(200, 2, generator=generator)
    assert density(real, one_mode) > 0.9
    assert 0.4 < coverage(real, one_mode) < 0.6
    assert density(real, noisy) < 0.5
    assert fid(real, one_mode) > fid(real, real + 0.01)


GOOD = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
BAD = [
    (lambda: fid(GOOD, GOOD[:, :2]), r"features have shapes \(8, 3\) and \(8, 2\); expected .* same model"),
    (lambda: fid(GOOD, GOOD[0]), r"expected \(N, d\) and \(M, d\)"),
    (lambda: fid(GOOD, GOOD[:1]), r"8 real and 1 fake samples are too few; expected at least 2 real and 2 fake"),
    (lambda: density(GOOD[:5], GOOD, 5), r"5 real and 8 fake samples are too few; expected at least 6 real"),
    (lambda: coverage(GOOD, GOOD[:0]), r"0 fake samples are too few"),
    (lambda: coverage(GOOD, GOOD, 0), r"k is 0; expected at least 1"),
    (lambda: fid(GOOD, GOOD / 0), r"8 of 8 fake samples have NaN or infinite features"),
    (lambda: features(tiny(), torch.zeros(2, 3, 8)), r"shape \(2, 3, 8\); expected \(N, C, H, W\)"),
    (lambda: features(tiny(), torch.zeros(0, 3, 8, 8)), r"at least one image"),
    (lambda: features(tiny(), torch.full((2, 3, 8, 8), 200.0)), r"not all in \[0, 1\]; expected uint8"),
    (lambda: features(tiny(), torch.full((2, 3, 8, 8), torch.nan)), r"not all in \[0, 1\]"),
    (lambda: features(tiny(), torch.zeros(2, 2, 8, 8)), r"takes 3 channels but the images have 2"),
    (
        lambda: features(classifier(torch.nn.Flatten()), images(2)[0]),
        "Flatten has no forward_features .* use a timm model",
    ),
    (lambda: label_reliability(tiny(), images(4)[0], torch.zeros(3)), r"4 images but targets of shape \(3,\)"),
]


@pytest.mark.parametrize(("compute", "message"), BAD)
def test_bad_input(compute, message):
    with pytest.raises(ValueError, match=message):
        compute()


def tiny(channels=3):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, in_chans=channels)
    return Oracle.from_timm(model, "tiny", channels, 32)


def classifier(model):
    return Oracle(model, (3, 8, 8), (0.0,), (1.0,), "classifier")


def images(count, seed=0):
    """Dark, grey and bright images, uint8, and their labels."""
    rng = np.random.default_rng(seed)
    targets = np.arange(count) % 3
    pixels = rng.integers(-15, 16, (count, 3, 8, 8)) + 128 + (targets - 1)[:, None, None, None] * 76
    return torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(targets)


def test_features_are_the_input_of_the_last_layer():
    oracle, (x, _) = tiny(), images(5)
    out = features(oracle, x, batch_size=2)
    assert (out.shape, out.dtype) == ((5, oracle.model.num_features), torch.float64)
    logits = oracle.model(oracle.preprocess(x.float() / 255))
    torch.testing.assert_close(oracle.model.fc(out.float()), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features(oracle, x.float() / 255), out, rtol=1e-5, atol=1e-6)


def test_features_of_a_timm_model_and_of_grey_images():
    x, _ = images(2)
    model = tiny().model
    bare = features(model, x)
    torch.testing.assert_close(bare, features(Oracle.from_timm(model, "bare"), x))
    assert not torch.allclose(bare, features(tiny(), x))  # 160 pixels a side, not 32
    grey = x[:, :1]
    torch.testing.assert_close(features(tiny(), grey), features(tiny(), grey.expand(-1, 3, -1, -1)))
    assert features(tiny(1), grey).shape == (2, 96)


def test_features_of_a_checkpoint_of_other_classes(tmp_path):
    from safetensors.torch import save_file

    model = timm.create_model("test_resnet").eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    oracle = load_oracle("test_resnet", None, 3, tmp_path / "model.safetensors", 32)
    x, _ = images(3)
    torch.testing.assert_close(features(oracle, x), features(Oracle.from_timm(model, "same", 3, 32), x))


def test_label_reliability_is_the_accuracy():
    class Brightness(torch.nn.Module):
        def forward(self, x):
            return -(x.mean((1, 2, 3))[:, None] - torch.tensor([0.2, 0.5, 0.8])).abs()

    oracle, (x, y) = classifier(Brightness()), images(9)
    assert label_reliability(oracle, x, y, batch_size=4) == 1
    assert label_reliability(oracle, x, torch.zeros(9, dtype=torch.int64)) == pytest.approx(1 / 3)


def test_cnn_accuracy_learns_from_the_generated_images():
    options = {"model": "test_resnet", "steps": 20, "batch_size": 16, "hflip": 0.5}
    (x, y), real = images(60), images(30, seed=1)
    assert cnn_accuracy(x, y, *real, 3, **options) > 0.9
    assert cnn_accuracy(x, (y + 1) % 3, *real, 3, **options) < 0.1


def test_cnn_accuracy_is_seeded_and_does_not_change_the_global_generator(monkeypatch):
    monkeypatch.setattr("flowaug.evaluation.metrics.label_reliability", lambda oracle, *rest: oracle.model.fc.weight)
    (x, y), state = images(30), torch.get_rng_state()
    first, again, other = (
        cnn_accuracy(x, y, x, y, 3, model="test_resnet", steps=2, batch_size=8, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_cnn_accuracy_gives_a_resnet18_the_stem_for_small_images(monkeypatch):
    seen = []
    monkeypatch.setattr("flowaug.evaluation.metrics.fit", lambda oracle, *rest: seen.append(oracle.model))
    x, y = images(3)
    cnn_accuracy(x[:, :1], y, x[:, :1], y, 3)
    (model,) = seen
    stem = model.conv1
    assert (stem.in_channels, stem.kernel_size, stem.stride) == (1, (3, 3), (1, 1))
    assert model.forward_features(torch.zeros(1, 1, 32, 32)).shape == (1, 512, 4, 4)


def test_small_oracle_gives_features(tmp_path):
    from flowaug.data import ImageDataset

    pixels, targets = images(12)
    data = ImageDataset(pixels.permute(0, 2, 3, 1).numpy(), targets.numpy(), NAMES)
    oracle = small_oracle(data, tmp_path, (8, 8), 3, steps=2)
    assert features(oracle, pixels).shape == (12, 96)
