import math

import pytest
import torch

from flowaug.latents.gaussians import ClassGaussians, GaussianParameters
from tests import oracles


def _gaussians(k=4, d=6, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = spread * torch.randn(k, d, generator=generator)
    return ClassGaussians(mean, torch.rand(k, d, generator=generator) + 0.25)


def _points(n, d, seed=1):
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_log_prob_matches_torch_distributions():
    gaussians, z, y = _gaussians().double(), _points(9, 6).double(), torch.arange(9) % 4
    expected = oracles.class_log_densities(z, gaussians.mean, gaussians.variance)
    torch.testing.assert_close(gaussians.log_prob(z, y), expected[torch.arange(9), y], atol=1e-10, rtol=0)


def test_log_joint_is_log_density_plus_log_prior():
    gaussians, z = _gaussians().double(), _points(9, 6).double()
    expected = oracles.class_log_densities(z, gaussians.mean, gaussians.variance) - math.log(4)
    torch.testing.assert_close(gaussians.log_joint(z), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(gaussians.posterior(z), expected.softmax(1), atol=1e-10, rtol=0)


def test_log_posterior_with_temperature_and_soft_labels():
    gaussians, z, y = _gaussians().double(), _points(9, 6).double(), torch.arange(9) % 4
    log_density = oracles.class_log_densities(z, gaussians.mean, gaussians.variance)
    for temperature in (1.0, 7.0):
        expected = (log_density / temperature).log_softmax(1)[torch.arange(9), y]
        torch.testing.assert_close(gaussians.log_posterior(z, y, temperature), expected, atol=1e-10, rtol=0)
    soft = torch.rand(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = (soft * (log_density / 7.0).log_softmax(1)).sum(1)
    torch.testing.assert_close(gaussians.log_posterior(z, soft, 7.0), expected, atol=1e-10, rtol=0)


def test_separation_is_the_mean_kld_of_unit_gaussians():
    mean = _gaussians().mean.double()
    pairs = torch.cdist(mean, mean).square() / 2
    separation = ClassGaussians(mean, torch.ones_like(mean)).double().separation()
    torch.testing.assert_close(separation, pairs.sum() / 12, atol=1e-5, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_log_joint_in_float32_far_from_the_origin(offset):
    gaussians = _gaussians(k=20, d=3072, spread=0.1)
    gaussians.assign_(GaussianParameters(gaussians.mean + offset, gaussians.variance))
    z = gaussians.sample(torch.arange(20), generator=torch.Generator().manual_seed(2))
    exact = ClassGaussians(gaussians.mean, gaussians.variance).double().log_joint(z.double())
    # 3072 terms of size 1 to 10: eps · Σ|term| is 1e-7 · 1e4. Without centering the error would be 1e3.
    torch.testing.assert_close(gaussians.log_joint(z).double(), exact, atol=2e-2, rtol=0)


def test_log_joint_ignores_autocast():
    gaussians, z = _gaussians(d=64), _points(8, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gaussians.log_joint(z)
    assert torch.equal(mixed, gaussians.log_joint(z))


def test_density_integrates_to_one():
    gaussians = _gaussians(k=2, d=1, spread=1.0).double()
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = gaussians.log_joint(grid[:, None]).logsumexp(1).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-10)


def test_log_prob_is_differentiable_in_the_latents():
    gaussians, z = _gaussians().double(), _points(3, 6).double().requires_grad_()
    y = torch.tensor([0, 1, 3])
    (grad,) = torch.autograd.grad(gaussians.log_prob(z, y).sum(), z)
    expected = -(z - gaussians.mean[y]) / gaussians.variance[y]
    torch.testing.assert_close(grad, expected.detach(), atol=1e-12, rtol=0)


def test_samples_have_the_class_mean_and_scaled_variance():
    gaussians, y = _gaussians(k=2, d=3), torch.arange(2).repeat_interleave(40_000)
    z = gaussians.sample(y, temperature=0.5, generator=torch.Generator().manual_seed(3))
    mean, variance = oracles.class_statistics(z, y, 2)
    # six standard errors: σ √(τ/n) for the mean, τ σ² √(2/n) for the variance
    assert ((mean - gaussians.mean).abs() < 6 * (gaussians.variance / 80_000).sqrt()).all()
    assert ((variance / (0.5 * gaussians.variance) - 1).abs() < 6 * (2 / 40_000) ** 0.5).all()


def test_sampling_at_temperature_zero_and_with_a_generator():
    gaussians, y = _gaussians(), torch.tensor([3, 1])
    before = torch.get_rng_state()
    assert torch.equal(gaussians.sample(y, 0.0, torch.Generator()), gaussians.mean[y])
    first = gaussians.sample(y, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, gaussians.sample(y, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(torch.get_rng_state(), before)


def test_assign_copies_into_the_existing_buffers():
    gaussians = _gaussians()
    buffer, mean = gaussians.mean, torch.zeros(4, 6, dtype=torch.float64)
    assert gaussians.assign_(GaussianParameters(mean, torch.ones(4, 6).double())) is gaussians
    mean.fill_(9.0)
    assert buffer is gaussians.mean
    assert buffer.eq(0).all()
    assert buffer.dtype == torch.float32
    assert set(gaussians.state_dict()) == {"mean", "variance"}
    assert list(gaussians.parameters()) == []


ONES = torch.ones(4, 6)
BAD_ROW = ONES.clone().index_fill_(0, torch.tensor([2]), float("nan"))
ZERO_ROW = ONES.clone().index_fill_(0, torch.tensor([1]), 0.0)


@pytest.mark.parametrize(
    ("mean", "variance", "message"),
    [
        (BAD_ROW, ONES, "class 2 has a non-finite mean"),
        (ONES, BAD_ROW, "class 2 has a non-finite or non-positive variance"),
        (ONES, ZERO_ROW, "class 1 has a non-finite or non-positive variance"),
        (ONES, -ONES, "class 0 has a non-finite or non-positive variance .*4 of 4"),
        (ONES, ONES.double() * 1e-60, "class 0 has a non-finite or non-positive variance"),
        (ONES, ONES * math.inf, "class 0 has a non-finite or non-positive variance"),
        (ONES, torch.ones(4), r"must both be \(K, D\), got \(4, 6\) and \(4,\)"),
    ],
)
def test_invalid_parameters_raise_and_change_nothing(mean, variance, message):
    gaussians = _gaussians()
    before = gaussians.mean.clone()
    with pytest.raises(ValueError, match=message):
        gaussians.assign_(GaussianParameters(mean, variance))
    with pytest.raises(ValueError, match=message):
        ClassGaussians(mean, variance)
    assert torch.equal(gaussians.mean, before)


def test_invalid_batches_raise():
    gaussians, z, y = _gaussians(), _points(3, 6), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"expected means of shape \(K, D\) = \(4, 6\), got \(3, 6\)"):
        gaussians.assign_(GaussianParameters(torch.ones(3, 6), torch.ones(3, 6)))
    with pytest.raises(ValueError, match=r"must be \(B, 6\), got \(3, 5\)"):
        gaussians.log_joint(z[:, :5])
    with pytest.raises(ValueError, match=r"expected 3 labels of shape \(3,\), got \(2,\)"):
        gaussians.log_prob(z, y[:2])
    with pytest.raises(ValueError, match="temperature"):
        gaussians.sample(y, temperature=-1.0)
    with pytest.raises(ValueError, match="temperature"):
        gaussians.sample(y, temperature=math.nan)
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        gaussians.log_prob(z, y - 1)
