import itertools
import math

import pytest
import torch

from flowaug.latents.estimators import (
    VARIANCE_BOUNDS,
    data_initialisation,
    fpi,
    glem,
    gradient_descent,
    objective,
)
from flowaug.latents.estimators.divergence import kernel, pairwise_kld
from flowaug.latents.estimators.fpi import make_problem
from flowaug.latents.gaussians import ClassGaussians, GaussianParameters
from flowaug.latents.moments import ClassMoments
from tests import oracles

LEARN = [("mean",), ("variance",), ("mean", "variance")]


def _moments(k, d, seed=0, spread=0.5, n=50):
    """Return random class moments: means with the given standard deviation, variances in [0.3, 1.2]."""
    generator = torch.Generator().manual_seed(seed)
    mean = spread * torch.randn(k, d, generator=generator, dtype=torch.float64)
    variance = 0.3 + 0.9 * torch.rand(k, d, generator=generator, dtype=torch.float64)
    return ClassMoments(torch.full((k,), n), n * mean, n * (variance + mean.square()))


def _statistics(moments):
    return moments.mean, moments.variance


def _gradients(loss, value):
    """Compute the gradient of ``loss(mean, variance)`` with respect to means and variances."""
    leaves = [tensor.clone().requires_grad_() for tensor in value]
    return torch.autograd.grad(loss(*leaves), leaves)


def _likelihood(moments):
    return lambda mean, variance: objective(GaussianParameters(mean, variance), moments, kld_weight=0.0)


# fixed-point equations


@pytest.mark.parametrize("pi", ["pair", "mean"])
@pytest.mark.parametrize("learn", LEARN)
def test_one_sweep_matches_the_reference_loops(learn, pi):
    moments, start = _moments(6, 11), _statistics(_moments(6, 11, seed=1))[1]
    options = {"kld_weight": 7.0, "alpha": 3.0, "pi": pi, "damp": 0.5}
    found = fpi(moments, learn=learn, variance=start, variance_bounds=None, memory=0, max_steps=1, **options)
    mean, variance = oracles.fpi_sweep(moments.mean, start, *_statistics(moments), **options)
    expected = (mean if "mean" in learn else moments.mean, variance if "variance" in learn else start)
    torch.testing.assert_close(found.value, GaussianParameters(*expected), atol=1e-10, rtol=0)
    assert found.steps == 1
    assert not found.converged


@pytest.mark.parametrize(("kld_weight", "isotropic"), [(0.1, False), (0.3, False), (0.3, True)])
def test_exact_step_leads_to_the_minimum_along_each_coordinate(kld_weight, isotropic):
    moments = _moments(6, 11)
    options = {"alpha": 3.0, "pi": "pair", "learn": ("mean", "variance"), "variance_bounds": None}
    options |= {"kld_weight": kld_weight, "isotropic": isotropic, "variance": "data"}
    problem, x = make_problem(moments, exact=True, **options)
    weights = kernel(pairwise_kld(*problem.value(x)), kld_weight, 3.0, "pair")

    def gradient_after(k, d, block, change):  # along one coordinate, with the pair weights fixed
        changed = x.clone()
        changed[block, k, slice(None) if isotropic and block else d] += change
        changed.requires_grad_()
        value = GaussianParameters(changed[0], changed[1].exp())
        loss = objective(value, moments, kld_weight=0.0) - (weights * pairwise_kld(*value)).sum()
        gradient = torch.autograd.grad(loss, changed)[0][block, k]
        return float(gradient.sum() if isotropic and block else gradient[d])

    step, inside = problem.evaluate(x).step, 0
    for block, k, d in itertools.product(range(2), range(6), range(11)):
        change = float(step[block, k, d])
        assert change * gradient_after(k, d, block, 0.0) < 0
        if block == 0 or abs(change) < 0.99 * math.log(2):
            inside += 1
            assert abs(gradient_after(k, d, block, change)) < 1e-9
    assert inside > 66


def test_sweeps_do_not_depend_on_the_block_size(monkeypatch):
    moments, options = _moments(6, 50), {"kld_weight": 7.0, "memory": 0, "max_steps": 3}
    for isotropic in (False, True):
        whole = fpi(moments, isotropic=isotropic, **options)
        with monkeypatch.context() as patch:
            patch.setattr("flowaug.latents.estimators.divergence._BLOCK", 100)
            blocks = fpi(moments, isotropic=isotropic, **options)
        torch.testing.assert_close(blocks.value, whole.value, atol=1e-10, rtol=0)
        assert blocks.residual == pytest.approx(whole.residual, rel=1e-10)


@pytest.mark.parametrize("pi", ["pair", "mean"])
def test_published_equations_5_and_6_hold_at_the_fixed_point(pi):
    moments, options = _moments(6, 40), {"kld_weight": 0.5, "alpha": 10.0, "pi": pi}
    found = fpi(moments, variance_bounds=None, tol=1e-10, **options)
    terms = oracles.fpi_terms(*found.value, *_statistics(moments), **options)
    assert found.converged
    torch.testing.assert_close(found.value.mean, terms["mean"], atol=1e-8, rtol=0)
    # Σ A Σ = B with the published A and B, not only with A⁺ and B⁺
    published = found.value.variance.square() * terms["A"]
    torch.testing.assert_close(published, terms["B"], atol=1e-8, rtol=0)


@pytest.mark.parametrize("pi", ["pair", "mean"])
@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize(("k", "d", "kld_weight"), [(10, 64, 1.0), (10, 64, 30.0), (100, 3072, 3.0)])
def test_gradient_vanishes_inside_the_bounds_and_has_the_right_sign_at_them(k, d, kld_weight, learn, pi):
    moments = _moments(k, d)
    found = fpi(moments, kld_weight=kld_weight, learn=learn, pi=pi, tol=2e-8, max_steps=1000)
    assert found.converged, found[1:]
    total = _gradients(
        lambda m, v: objective(GaussianParameters(m, v), moments, kld_weight=kld_weight, pi=pi), found.value
    )
    own = _gradients(_likelihood(moments), found.value)
    low, high = ((found.value.variance - bound).abs() < 1e-12 for bound in VARIANCE_BOUNDS)
    if "mean" in learn:
        assert total[0].norm() <= 1e-6 * own[0].norm()
    if "variance" in learn:
        inside = ~(low | high)
        assert total[1][inside].norm() <= 1e-6 * own[1][inside].norm()
        assert total[1][low].ge(0).all()
        assert total[1][high].le(0).all()
        assert kld_weight == 1.0 or ((low | high).any() and inside.any()), "no variance at the bounds or inside"


def test_without_repulsion_the_fixed_point_equals_the_class_statistics():
    moments = _moments(6, 40)
    for options in ({"variance": "data"}, {"variance": "unit"}, {"variance": "unit", "memory": 0}):
        found = fpi(moments, kld_weight=0.0, variance_bounds=None, tol=1e-6, **options)
        assert found.converged
        torch.testing.assert_close(found.value, data_initialisation(moments), atol=1e-9, rtol=0)
    nearly = fpi(moments, kld_weight=1e-7, variance_bounds=None)
    torch.testing.assert_close(nearly.value, data_initialisation(moments), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kld_weight", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("pi", ["pair", "mean"])
def test_equidistant_means_reach_the_closed_form_solution(kld_weight, pi):
    k, alpha, r0 = 6, 2.0, 1.5
    mean = torch.zeros(k, 10, dtype=torch.float64)
    mean[:, :k] = r0 / 2**0.5 * torch.eye(k, dtype=torch.float64)  # pairwise distance r0
    moments = ClassMoments(torch.full((k,), 4), 4 * mean, 4 * (mean.square() + 1))
    found = fpi(moments, kld_weight=kld_weight, alpha=alpha, pi=pi, learn="mean", variance="unit", tol=1e-8)
    c = math.exp(-1 / alpha) / alpha
    apart = (r0 + math.sqrt(r0**2 + 16 * kld_weight * c * k)) / 2  # r*
    R0 = r0 * math.sqrt((k - 1) / (2 * k))
    radius = (R0 + math.sqrt(R0**2 + 8 * kld_weight * c * (k - 1))) / 2  # R*
    assert found.converged
    torch.testing.assert_close(
        torch.pdist(found.value.mean), torch.full((15,), apart, dtype=torch.float64), atol=0, rtol=1e-6
    )
    radii = (found.value.mean - found.value.mean.mean(0)).norm(dim=1)
    torch.testing.assert_close(radii, torch.full((k,), radius, dtype=torch.float64), atol=0, rtol=1e-6)
    assert torch.equal(found.value.variance, torch.ones(k, 10, dtype=torch.float64))


@pytest.mark.parametrize("kld_weight", [1.0, 10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("k", [10, 100])
def test_fpi_converges_for_every_weight(k, kld_weight):
    for learn in LEARN:
        found = fpi(_moments(k, 128), kld_weight=kld_weight, learn=learn)
        assert found.converged, (learn, found[1:])
        low, high = VARIANCE_BOUNDS
        assert "variance" not in learn or found.value.variance.clamp(low, high).equal(found.value.variance)


def test_accelerated_and_damped_solver_agree():
    moments = _moments(10, 256)
    plain = fpi(moments, kld_weight=3.0, memory=0, tol=1e-7)
    fast = fpi(moments, kld_weight=3.0, tol=1e-7)
    assert plain.converged
    assert fast.converged
    assert 2 * fast.steps < plain.steps
    torch.testing.assert_close(fast.value, plain.value, atol=1e-6, rtol=0)


def test_stopping_early_is_reported_as_not_converged():
    moments = _moments(10, 64)
    for memory in (0, 5):
        found = fpi(moments, kld_weight=30.0, memory=memory, max_steps=4)
        assert found.steps == 4
        assert not found.converged
        assert found.residual > 1e-4
    assert fpi(moments, kld_weight=30.0, max_steps=0).value.mean.equal(moments.mean)


@pytest.mark.parametrize("memory", [0, 5])
def test_strong_repulsion_without_bounds_does_not_report_convergence(memory):
    found = fpi(_moments(3, 4), kld_weight=1e3, variance_bounds=None, memory=memory, max_steps=3000)
    assert not found.converged
    assert all(tensor.isfinite().all() for tensor in found.value)


def test_isotropic_variances_are_stationary_in_the_scale_of_each_class():
    moments = _moments(8, 50)
    found = fpi(moments, kld_weight=0.5, isotropic=True, tol=1e-9)
    _, total = _gradients(lambda m, v: objective(GaussianParameters(m, v), moments, kld_weight=0.5), found.value)
    own = _gradients(_likelihood(moments), found.value)[1]
    assert found.converged
    assert found.value.variance.std(1).max() < 1e-12
    assert total.sum(1).norm() < 1e-6 * own.sum(1).norm()
    shared = fpi(moments, kld_weight=0.5, isotropic=True, learn="mean").value.variance
    torch.testing.assert_close(shared, moments.variance.mean(1, keepdim=True).expand(8, 50))


def test_estimators_do_not_change_the_moments_or_the_global_rng():
    moments, before = _moments(5, 8), torch.get_rng_state()
    sums = {name: tensor.clone() for name, tensor in moments.tensors().items()}
    for estimate in (fpi, gradient_descent):
        estimate(moments, kld_weight=10.0)
    glem(moments, start="random", generator=torch.Generator().manual_seed(0), steps=5)
    torch.testing.assert_close(moments.tensors(), sums, atol=0, rtol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_result_can_be_assigned_to_class_gaussians():
    gaussians = ClassGaussians(torch.zeros(6, 40), torch.ones(6, 40))
    assert gaussians.mean.eq(0).all()
    gaussians.assign_(fpi(_moments(6, 40), kld_weight=10.0).value)
    assert gaussians.mean.abs().max() > 0.5


# invalid input


def _modified(**changes):
    tensors = {name: tensor.clone() for name, tensor in _moments(4, 6).tensors().items()}
    for name, change in changes.items():
        change(tensors[name])
    return ClassMoments.from_tensors(tensors)


def _one_sample(count):
    count[2] = 1


def _empty(count):
    count[1] = 0


def _nan(total):
    total[3, 0] = math.nan


BAD_MOMENTS = {
    "empty": (_modified(count=_empty), "no samples for class 1 of 4"),
    "single": (_modified(count=_one_sample), "class 2 has only one sample"),
    "nan": (_modified(total=_nan), "class 3 are not finite"),
    "constant": (
        ClassMoments.of(torch.tensor([[1.0, 2.0], [1.0, 3.0], [0.0, 1.0], [2.0, 2.0]]), torch.tensor([0, 0, 1, 1]), 2),
        "class 0 has zero variance in 1 of 2 dimensions",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_MOMENTS))
def test_invalid_moments_raise_an_error_naming_the_class(case):
    moments, message = BAD_MOMENTS[case]
    for estimate in (data_initialisation, lambda m: fpi(m, kld_weight=1.0), lambda m: glem(m, steps=2)):
        with pytest.raises(ValueError, match=message):
            estimate(moments)


def test_means_only_with_unit_variances_does_not_need_the_data_variance():
    moments = BAD_MOMENTS["constant"][0]
    assert fpi(moments, kld_weight=1.0, learn="mean", variance="unit").converged
    assert fpi(BAD_MOMENTS["single"][0], kld_weight=1.0, learn="mean", variance="unit").converged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kld_weight": -1.0}, r"kld_weight \(λ'\) must be finite and >= 0, got -1.0"),
        ({"kld_weight": math.nan}, "got nan"),
        ({"alpha": 0.0}, "alpha must be finite and > 0"),
        ({"pi": "median"}, "pi must be 'pair' .* or 'mean' .*, got 'median'"),
        ({"learn": ()}, "learn must be"),
        ({"learn": ("mean", "std")}, "learn must be 'mean', 'variance' or a tuple of both"),
        ({"variance": "identity"}, "variance must be 'data', 'unit' or"),
        ({"variance": torch.ones(4, 5)}, r"initial variances must be \(4, 6\)"),
        ({"variance": torch.zeros(4, 6)}, "finite and positive"),
        ({"variance_bounds": (1.25, 0.25)}, r"0 <= low < high, got \(1.25, 0.25\)"),
        ({"variance_bounds": (-1.0, 0.25)}, "0 <= low < high"),
        ({"damp": 0.0}, "damp must be in"),
        ({"damp": 1.5}, "damp must be in"),
        ({"memory": -1}, "must be >= 0"),
        ({"tol": math.nan}, "must be >= 0"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        fpi(_moments(4, 6), **{"kld_weight": 1.0, **options})


def test_identical_classes_raise_an_error_naming_them():
    moments = _moments(4, 6)
    for tensor in (moments.tensors()["total"], moments.tensors()["squares"]):
        tensor[3] = tensor[1]
    with pytest.raises(ValueError, match="classes 1 and 3 have identical Gaussians"):
        fpi(moments, kld_weight=1.0)
    assert fpi(moments, kld_weight=1.0, pi="mean").converged
