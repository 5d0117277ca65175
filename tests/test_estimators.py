import math

import pytest
import torch

from flowaug.estimators import (
    LR_POLICIES,
    VARIANCE_BOUNDS,
    Glem,
    data_initialisation,
    fpi,
    glem,
    gradient_descent,
    objective,
    pairwise_kld,
    unit_gaussian,
)
from flowaug.gaussians import ClassGaussians, GaussianParameters
from flowaug.moments import ClassMoments
from tests import oracles

LEARN = [("mean",), ("variance",), ("mean", "variance")]


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of tiny products: a second thread only waits, and on a busy machine it waits long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _moments(k, d, seed=0, spread=0.5, n=50):
    """Random class statistics: means of the given spread, variances in [0.3, 1.2]."""
    generator = torch.Generator().manual_seed(seed)
    mean = spread * torch.randn(k, d, generator=generator, dtype=torch.float64)
    variance = 0.3 + 0.9 * torch.rand(k, d, generator=generator, dtype=torch.float64)
    return ClassMoments(torch.full((k,), n), n * mean, n * (variance + mean.square()))


def _statistics(moments):
    return moments.mean, moments.variance


def _gradients(loss, value):
    """Gradient of `loss(mean, variance)` with respect to means and variances."""
    leaves = [tensor.clone().requires_grad_() for tensor in value]
    return torch.autograd.grad(loss(*leaves), leaves)


def _likelihood(moments):
    return lambda mean, variance: objective(GaussianParameters(mean, variance), moments, kld_weight=0.0)


# the divergences and the objective


def test_pairwise_kld_equals_the_pairs_one_by_one():
    mean, variance = _statistics(_moments(7, 33))
    kld = pairwise_kld(mean + 1000.0, variance)  # a common shift must not cost precision
    torch.testing.assert_close(kld, oracles.kld_one_by_one(mean, variance), atol=1e-10, rtol=0)
    assert kld.diagonal().eq(0).all()


def test_pairwise_kld_over_several_blocks_of_dimensions(monkeypatch):
    mean, variance = _statistics(_moments(7, 33))
    monkeypatch.setattr("flowaug.estimators.divergence._BLOCK", 70)
    torch.testing.assert_close(pairwise_kld(mean, variance), oracles.kld_one_by_one(mean, variance), atol=1e-10, rtol=0)


def test_pairwise_kld_in_float32():
    mean, variance = _statistics(_moments(20, 3072))
    single = pairwise_kld((mean + 10).float(), variance.float()).double()
    # eps · Σ|terms|: 1e-7 times about 1e4
    torch.testing.assert_close(single, pairwise_kld(mean, variance), atol=1e-2, rtol=0)


@pytest.mark.parametrize("pi", ["pair", "mean"])
def test_objective_and_its_gradient_equal_the_literal_ones(pi):
    moments, value = _moments(5, 9), GaussianParameters(*_statistics(_moments(5, 9, seed=1)))
    options = {"kld_weight": 3.0, "alpha": 0.7, "pi": pi}

    def literal(mean, variance):
        return oracles.fpi_objective(mean, variance, *_statistics(moments), **options)

    def ours(mean, variance):
        return objective(GaussianParameters(mean, variance), moments, **options)

    torch.testing.assert_close(ours(*value), literal(*value), atol=1e-10, rtol=0)
    torch.testing.assert_close(_gradients(ours, value), _gradients(literal, value), atol=1e-10, rtol=0)


# the fixed-point equations


@pytest.mark.parametrize("pi", ["pair", "mean"])
@pytest.mark.parametrize("learn", LEARN)
def test_one_sweep_equals_the_literal_loops(learn, pi):
    moments, start = _moments(6, 11), _statistics(_moments(6, 11, seed=1))[1]
    options = {"kld_weight": 7.0, "alpha": 3.0, "pi": pi, "damp": 0.5}
    found = fpi(moments, learn=learn, variance=start, variance_bounds=None, memory=0, max_steps=1, **options)
    mean, variance = oracles.fpi_sweep(moments.mean, start, *_statistics(moments), **options)
    expected = (mean if "mean" in learn else moments.mean, variance if "variance" in learn else start)
    torch.testing.assert_close(found.value, GaussianParameters(*expected), atol=1e-10, rtol=0)
    assert found.steps == 1
    assert not found.converged


def test_sweeps_do_not_depend_on_the_blocks_of_dimensions(monkeypatch):
    moments, options = _moments(6, 50), {"kld_weight": 7.0, "memory": 0, "max_steps": 3}
    for isotropic in (False, True):
        whole = fpi(moments, isotropic=isotropic, **options)
        with monkeypatch.context() as patch:
            patch.setattr("flowaug.estimators.divergence._BLOCK", 100)
            blocks = fpi(moments, isotropic=isotropic, **options)
        torch.testing.assert_close(blocks.value, whole.value, atol=1e-10, rtol=0)
        assert blocks.residual == pytest.approx(whole.residual, rel=1e-10)


@pytest.mark.parametrize("pi", ["pair", "mean"])
def test_equations_5_and_6_hold_as_published_at_the_fixed_point(pi):
    moments, options = _moments(6, 40), {"kld_weight": 0.5, "alpha": 10.0, "pi": pi}
    found = fpi(moments, variance_bounds=None, tol=1e-10, **options)
    terms = oracles.fpi_terms(*found.value, *_statistics(moments), **options)
    assert found.converged
    torch.testing.assert_close(found.value.mean, terms["mean"], atol=1e-8, rtol=0)
    published = found.value.variance.square() * terms["A"]  # Σ A Σ = B, not only with the positive splits
    torch.testing.assert_close(published, terms["B"], atol=1e-8, rtol=0)


@pytest.mark.parametrize("pi", ["pair", "mean"])
@pytest.mark.parametrize("learn", LEARN)
@pytest.mark.parametrize(("k", "d", "kld_weight"), [(10, 64, 1.0), (10, 64, 30.0), (100, 3072, 3.0)])
def test_the_gradient_vanishes_inside_the_bounds_and_has_the_right_sign_at_them(k, d, kld_weight, learn, pi):
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
        assert kld_weight == 1.0 or ((low | high).any() and inside.any()), "the bounds must be tested"


def test_without_repulsion_the_fixed_point_is_the_class_statistics():
    moments = _moments(6, 40)
    for options in ({"variance": "data"}, {"variance": "unit"}, {"variance": "unit", "memory": 0}):
        found = fpi(moments, kld_weight=0.0, variance_bounds=None, tol=1e-6, **options)
        assert found.converged
        torch.testing.assert_close(found.value, data_initialisation(moments), atol=1e-9, rtol=0)
    nearly = fpi(moments, kld_weight=1e-7, variance_bounds=None)
    torch.testing.assert_close(nearly.value, data_initialisation(moments), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kld_weight", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("pi", ["pair", "mean"])
def test_equidistant_means_move_to_the_closed_form(kld_weight, pi):
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
def test_converges_for_every_weight(k, kld_weight):
    for learn in LEARN:
        found = fpi(_moments(k, 128), kld_weight=kld_weight, learn=learn)
        assert found.converged, (learn, found[1:])
        low, high = VARIANCE_BOUNDS
        assert "variance" not in learn or found.value.variance.clamp(low, high).equal(found.value.variance)


def test_acceleration_finds_what_the_damped_iteration_finds():
    moments = _moments(10, 256)
    plain = fpi(moments, kld_weight=3.0, memory=0, tol=1e-7)
    fast = fpi(moments, kld_weight=3.0, tol=1e-7)
    assert plain.converged
    assert fast.converged
    assert 2 * fast.steps < plain.steps
    torch.testing.assert_close(fast.value, plain.value, atol=1e-6, rtol=0)


def test_a_solver_that_stops_early_says_so():
    moments = _moments(10, 64)
    for memory in (0, 5):
        found = fpi(moments, kld_weight=30.0, memory=memory, max_steps=4)
        assert found.steps == 4
        assert not found.converged
        assert found.residual > 1e-4
    assert fpi(moments, kld_weight=30.0, max_steps=0).value.mean.equal(moments.mean)


@pytest.mark.parametrize("memory", [0, 5])
def test_without_bounds_a_strong_repulsion_is_not_passed_off_as_converged(memory):
    found = fpi(_moments(3, 4), kld_weight=1e3, variance_bounds=None, memory=memory, max_steps=3000)
    assert not found.converged
    assert all(tensor.isfinite().all() for tensor in found.value)


def test_isotropic_variances_are_stationary_along_the_classes_scale():
    moments = _moments(8, 50)
    found = fpi(moments, kld_weight=0.5, isotropic=True, tol=1e-9)
    _, total = _gradients(lambda m, v: objective(GaussianParameters(m, v), moments, kld_weight=0.5), found.value)
    own = _gradients(_likelihood(moments), found.value)[1]
    assert found.converged
    assert found.value.variance.std(1).max() < 1e-12
    assert total.sum(1).norm() < 1e-6 * own.sum(1).norm()
    shared = fpi(moments, kld_weight=0.5, isotropic=True, learn="mean").value.variance
    torch.testing.assert_close(shared, moments.variance.mean(1, keepdim=True).expand(8, 50))


def test_estimators_leave_moments_and_the_global_rng_alone():
    moments, before = _moments(5, 8), torch.get_rng_state()
    sums = {name: tensor.clone() for name, tensor in moments.tensors().items()}
    for estimate in (fpi, gradient_descent):
        estimate(moments, kld_weight=10.0)
    glem(moments, start="random", generator=torch.Generator().manual_seed(0), steps=5)
    torch.testing.assert_close(moments.tensors(), sums, atol=0, rtol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_value_goes_into_the_class_gaussians():
    gaussians = ClassGaussians(*unit_gaussian(6, 40))
    assert gaussians.mean.eq(0).all()
    gaussians.assign_(fpi(_moments(6, 40), kld_weight=10.0).value)
    assert gaussians.mean.abs().max() > 0.5


# gradient descent


@pytest.mark.parametrize("policy", sorted(LR_POLICIES))
def test_gradient_descent_goes_to_the_fixed_point(policy):
    moments = _moments(10, 64)
    options = {"kld_weight": 0.3, "learn": "mean", "variance": "unit"}
    found = gradient_descent(moments, policy=policy, max_steps=400, tol=1e-6, **options)
    torch.testing.assert_close(found.value, fpi(moments, tol=1e-8, **options).value, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("policy", "power"), [("sublinear", 0.5), ("linear", 1.0), ("superlinear", 2.0)])
def test_gradient_descent_follows_the_gradient_through_the_sigmoid(policy, power):
    moments, (low, high) = _moments(4, 6), VARIANCE_BOUNDS
    found = gradient_descent(moments, kld_weight=2.0, policy=policy, lr=0.05, max_steps=2)
    mean, s = moments.mean, torch.logit((moments.variance - low) / (high - low))

    def loss(mean, s):
        return objective(GaussianParameters(mean, low + (high - low) * s.sigmoid()), moments, kld_weight=2.0)

    for rate in (0.05, 0.05 * 0.5**power):
        gradient = _gradients(loss, (mean, s))
        mean, s = mean - rate * gradient[0], s - rate * gradient[1]
    expected = GaussianParameters(mean, low + (high - low) * s.sigmoid())
    torch.testing.assert_close(found.value, expected, atol=1e-10, rtol=0)


def test_gradient_descent_stays_inside_the_bounds():
    found = gradient_descent(_moments(10, 64), kld_weight=100.0, lr=10.0)
    assert found.value.variance.ge(VARIANCE_BOUNDS[0]).all()
    assert found.value.variance.le(VARIANCE_BOUNDS[1]).all()
    assert not found.converged


# GLEM


@pytest.mark.parametrize("reparametrise", [True, False])
def test_glem_gradient_equals_autograd(reparametrise):
    moments = _moments(4, 6)
    options = {"start": "random", "generator": torch.Generator().manual_seed(0), "normalise": False}
    solver = Glem(4, 6, kld_weight=(3.0, 3.0), reparametrise=reparametrise, **options)
    state = solver.state_dict()

    def loss(mean, raw):
        variance = 1.0 / (1 + torch.exp(-raw)) + 0.25 if reparametrise else raw
        kld = oracles.kld_one_by_one(mean, variance)
        return _likelihood(moments)(mean, variance) - 3.0 * kld.sum()

    expected = _gradients(loss, (state["mean"], state["raw"]))
    torch.testing.assert_close(tuple(solver._gradient(moments).values()), expected, atol=1e-10, rtol=1e-10)


def test_glem_steps_are_those_of_torch_adam():
    moments, solver = _moments(4, 6), Glem(4, 6, steps=20)
    leaves = [solver.state_dict()[name].requires_grad_() for name in ("mean", "raw")]
    adam = torch.optim.Adam(leaves)
    for done in range(8):
        adam.param_groups[0]["lr"] = solver._rate(done)
        for leaf, gradient in zip(leaves, solver._gradient(moments).values(), strict=True):
            leaf.grad = gradient
        adam.step()
        solver.step(moments)
    for leaf, name in zip(leaves, ("mean", "raw"), strict=True):
        torch.testing.assert_close(solver.state_dict()[name], leaf.detach(), atol=1e-10, rtol=0)


def test_glem_without_divergence_goes_to_the_class_statistics():
    moments = _moments(5, 8)
    found = glem(moments, kld_weight=(0.0, 0.0), normalise=False, steps=600)
    torch.testing.assert_close(found.value, data_initialisation(moments), atol=0.05, rtol=0)
    assert found.steps == 600


def test_glem_separates_the_classes_and_the_weight_decides_how_far():
    moments = _moments(10, 64)
    without, weak, strong = (pairwise_kld(*glem(moments, kld_weight=(w, w)).value).mean() for w in (0.0, 0.3, 50.0))
    assert without < weak < strong


def test_glem_starts_where_the_paper_does():
    mean, variance = Glem(3, 4, amplitude=0.5, slope=0.2, floor=0.05).value
    assert mean.eq(0).all()
    torch.testing.assert_close(variance, torch.full((3, 4), 0.3).double())
    random = [Glem(3, 4, start="random", generator=torch.Generator().manual_seed(7)).value for _ in range(2)]
    torch.testing.assert_close(random[0], random[1], atol=0, rtol=0)
    assert random[0].mean.abs().max() <= 1
    assert random[0].variance.ge(0.25).all()
    assert random[0].variance.std() > 0.1


def test_glem_first_step_is_not_blown_up_rounding():
    moments, psi = _moments(11, 64), {"amplitude": 0.5, "slope": 0.2, "floor": 0.05}
    with_kld, without = Glem(11, 64, **psi), Glem(11, 64, kld_weight=(0.0, 0.0), **psi)
    torch.testing.assert_close(with_kld.step(moments), without.step(moments), atol=1e-6, rtol=0)


def test_glem_ablations():
    moments = _moments(10, 64)
    means = glem(moments, learn="mean").value
    assert means.variance.eq(0.75).all()
    assert glem(moments, learn="variance").value.mean.eq(0).all()
    clamped = glem(moments, reparametrise=False).value.variance
    assert clamped.min() == 0.25
    assert clamped.max() == 1.25


def test_glem_continues_from_its_state():
    moments = _moments(5, 8)
    whole, first, second = Glem(5, 8), Glem(5, 8), Glem(5, 8, start="random")
    for _ in range(6):
        whole.step(moments)
    for _ in range(3):
        first.step(moments)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        second.step(moments)
    torch.testing.assert_close(second.value, whole.value, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"lacks 'mean' of shape \(5, 9\)"):
        Glem(5, 9).load_state_dict(first.state_dict())


def test_glem_anneals_weight_and_rate():
    solver = Glem(2, 2, kld_weight=(50.0, 25.0), steps=101, lr=0.1)
    assert [solver._weight(t) for t in (0, 50, 100, 500)] == pytest.approx([50.0, 37.5, 25.0, 25.0])
    assert [solver._rate(t) for t in (0, 9, 10, 55, 100, 500)] == pytest.approx(
        [0.1, 0.1, 0.01, 10**-2.5, 0.001, 0.001]
    )


# bad input


def _replaced(**changes):
    tensors = {name: tensor.clone() for name, tensor in _moments(4, 6).tensors().items()}
    for name, change in changes.items():
        change(tensors[name])
    return ClassMoments.from_tensors(tensors)


def _one_sample(count):
    count[2] = 1


def _absent(count):
    count[1] = 0


def _nan(total):
    total[3, 0] = math.nan


BAD_MOMENTS = {
    "absent": (_replaced(count=_absent), "no sample of class 1 of 4"),
    "single": (_replaced(count=_one_sample), "class 2 has one sample"),
    "nan": (_replaced(total=_nan), "class 3 are not finite"),
    "constant": (
        ClassMoments.of(torch.tensor([[1.0, 2.0], [1.0, 3.0], [0.0, 1.0], [2.0, 2.0]]), torch.tensor([0, 0, 1, 1]), 2),
        "class 0 has zero variance in 1 of 2 dimensions",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_MOMENTS))
def test_bad_moments_are_refused_by_class(case):
    moments, message = BAD_MOMENTS[case]
    for estimate in (data_initialisation, lambda m: fpi(m, kld_weight=1.0), lambda m: glem(m, steps=2)):
        with pytest.raises(ValueError, match=message):
            estimate(moments)


def test_means_with_unit_variances_need_no_variance_of_the_data():
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
        ({"learn": ()}, "learn must hold"),
        ({"learn": ("mean", "std")}, "learn must hold 'mean', 'variance' or both"),
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
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fpi(_moments(4, 6), **{"kld_weight": 1.0, **options})


def test_classes_that_coincide_are_named():
    moments = _moments(4, 6)
    for tensor in (moments.tensors()["total"], moments.tensors()["squares"]):
        tensor[3] = tensor[1]
    with pytest.raises(ValueError, match="classes 1 and 3 have the same Gaussian"):
        fpi(moments, kld_weight=1.0)
    assert fpi(moments, kld_weight=1.0, pi="mean").converged


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradient_descent(_moments(4, 6), kld_weight=1.0, policy="cosine"), "policy must be one of"),
        (lambda: gradient_descent(_moments(4, 6), kld_weight=1.0, variance_bounds=None), "finite variance_bounds"),
        (lambda: Glem(4, 6, kld_weight=(-1.0, 0.0)), "two finite weights"),
        (lambda: Glem(4, 6, steps=0), "steps must be at least 1"),
        (lambda: Glem(4, 6, floor=0.0), "must be positive"),
        (lambda: Glem(4, 6, start="data"), "start must be 'zero' or 'random'"),
        (lambda: Glem(4, 7).step(_moments(4, 6)), r"\(4, 7\), the moments \(4, 6\)"),
    ],
)
def test_bad_options_of_the_baselines_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
