import pytest
import torch

from flowaug.latents.estimators import (
    LR_POLICIES,
    VARIANCE_BOUNDS,
    Glem,
    data_initialisation,
    fpi,
    glem,
    gradient_descent,
    objective,
    pairwise_kld,
)
from flowaug.latents.gaussians import GaussianParameters
from tests import oracles
from tests.latents.test_estimators import _gradients, _likelihood, _moments

# gradient descent


@pytest.mark.parametrize("policy", sorted(LR_POLICIES))
def test_gradient_descent_reaches_the_fixed_point(policy):
    moments = _moments(10, 64)
    options = {"kld_weight": 0.3, "learn": "mean", "variance": "unit"}
    found = gradient_descent(moments, policy=policy, max_steps=400, tol=1e-6, **options)
    torch.testing.assert_close(found.value, fpi(moments, tol=1e-8, **options).value, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("policy", "power"), [("sublinear", 0.5), ("linear", 1.0), ("superlinear", 2.0)])
def test_gradient_descent_steps_match_autograd(policy, power):
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


def test_gradient_descent_respects_the_bounds():
    found = gradient_descent(_moments(10, 64), kld_weight=100.0, lr=10.0)
    assert found.value.variance.ge(VARIANCE_BOUNDS[0]).all()
    assert found.value.variance.le(VARIANCE_BOUNDS[1]).all()
    assert not found.converged


# GLEM


@pytest.mark.parametrize("reparametrise", [True, False])
def test_glem_gradient_matches_autograd(reparametrise):
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


def test_glem_steps_match_torch_adam():
    moments, solver = _moments(4, 6), Glem(4, 6, steps=20)
    leaves = [solver.state_dict()[name].requires_grad_() for name in ("mean", "raw")]
    adam = torch.optim.Adam(leaves)
    for done in range(8):
        adam.param_groups[0]["lr"] = solver._learning_rate(done)
        for leaf, gradient in zip(leaves, solver._gradient(moments).values(), strict=True):
            leaf.grad = gradient
        adam.step()
        solver.step(moments)
    for leaf, name in zip(leaves, ("mean", "raw"), strict=True):
        torch.testing.assert_close(solver.state_dict()[name], leaf.detach(), atol=1e-10, rtol=0)


def test_glem_without_divergence_reaches_the_class_statistics():
    moments = _moments(5, 8)
    found = glem(moments, kld_weight=(0.0, 0.0), normalise=False, steps=600)
    torch.testing.assert_close(found.value, data_initialisation(moments), atol=0.05, rtol=0)
    assert found.steps == 600


def test_glem_class_divergence_increases_with_the_weight():
    moments = _moments(10, 64)
    without, weak, strong = (pairwise_kld(*glem(moments, kld_weight=(w, w)).value).mean() for w in (0.0, 0.3, 50.0))
    assert without < weak < strong


def test_glem_initial_parameters():
    mean, variance = Glem(3, 4, amplitude=0.5, slope=0.2, floor=0.05).value
    assert mean.eq(0).all()
    torch.testing.assert_close(variance, torch.full((3, 4), 0.3).double())
    random = [Glem(3, 4, start="random", generator=torch.Generator().manual_seed(7)).value for _ in range(2)]
    torch.testing.assert_close(random[0], random[1], atol=0, rtol=0)
    assert random[0].mean.abs().max() <= 1
    assert random[0].variance.ge(0.25).all()
    assert random[0].variance.std() > 0.1


def test_glem_normalization_does_not_amplify_rounding_errors():
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


def test_glem_resumes_from_a_state_dict():
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
    with pytest.raises(ValueError, match=r"expected 'mean' of shape \(5, 9\), got shape \(5, 8\)"):
        Glem(5, 9).load_state_dict(first.state_dict())


def test_glem_schedules_of_weight_and_learning_rate():
    solver = Glem(2, 2, kld_weight=(50.0, 25.0), steps=101, lr=0.1)
    assert [solver._annealed_weight(t) for t in (0, 50, 100, 500)] == pytest.approx([50.0, 37.5, 25.0, 25.0])
    assert [solver._learning_rate(t) for t in (0, 9, 10, 55, 100, 500)] == pytest.approx(
        [0.1, 0.1, 0.01, 10**-2.5, 0.001, 0.001]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gradient_descent(_moments(4, 6), kld_weight=1.0, policy="cosine"), "policy must be one of"),
        (lambda: gradient_descent(_moments(4, 6), kld_weight=1.0, variance_bounds=None), "finite variance_bounds"),
        (lambda: Glem(4, 6, kld_weight=(-1.0, 0.0)), "two finite weights"),
        (lambda: Glem(4, 6, steps=0), "steps must be at least 1"),
        (lambda: Glem(4, 6, floor=0.0), "must be positive"),
        (lambda: Glem(4, 6, start="data"), "start must be 'zero' or 'random'"),
        (lambda: Glem(4, 7).step(_moments(4, 6)), r"expected moments of shape \(K, D\) = \(4, 7\), got \(4, 6\)"),
    ],
)
def test_invalid_options_of_descent_and_glem_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
