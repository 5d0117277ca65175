import pytest
import torch

from flowaug.latents.estimators import objective, pairwise_kld
from flowaug.latents.gaussians import GaussianParameters
from tests import oracles
from tests.latents.test_estimators import _gradients, _moments, _statistics


def test_pairwise_kld_matches_torch_distributions():
    mean, variance = _statistics(_moments(7, 33))
    kld = pairwise_kld(mean + 1000.0, variance)  # a common offset must not reduce the precision
    torch.testing.assert_close(kld, oracles.kld_one_by_one(mean, variance), atol=1e-10, rtol=0)
    assert kld.diagonal().eq(0).all()


def test_pairwise_kld_does_not_depend_on_the_block_size(monkeypatch):
    mean, variance = _statistics(_moments(7, 33))
    monkeypatch.setattr("flowaug.latents.estimators.divergence._BLOCK", 70)
    torch.testing.assert_close(pairwise_kld(mean, variance), oracles.kld_one_by_one(mean, variance), atol=1e-10, rtol=0)


def test_pairwise_kld_in_float32():
    mean, variance = _statistics(_moments(20, 3072))
    single = pairwise_kld((mean + 10).float(), variance.float()).double()
    # rounding error: eps · Σ|terms| is 1e-7 times about 1e4
    torch.testing.assert_close(single, pairwise_kld(mean, variance), atol=1e-2, rtol=0)


@pytest.mark.parametrize("pi", ["pair", "mean"])
def test_objective_and_gradient_match_the_reference(pi):
    moments, value = _moments(5, 9), GaussianParameters(*_statistics(_moments(5, 9, seed=1)))
    options = {"kld_weight": 3.0, "alpha": 0.7, "pi": pi}

    def reference(mean, variance):
        return oracles.fpi_objective(mean, variance, *_statistics(moments), **options)

    def ours(mean, variance):
        return objective(GaussianParameters(mean, variance), moments, **options)

    torch.testing.assert_close(ours(*value), reference(*value), atol=1e-10, rtol=0)
    torch.testing.assert_close(_gradients(ours, value), _gradients(reference, value), atol=1e-10, rtol=0)
