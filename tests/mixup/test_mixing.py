import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowaug import ClassGaussians, ClasswisePCA, MixPlan, mix_latents
from flowaug.mixup.mixing import mix_keeping_labels
from flowaug.mixup.plan import MixPolicy, PlanSampler
from tests.oracles import mix_one


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 10, generator=generator, dtype=torch.float64) + 3 * k for k, n in enumerate((6, 9, 30))]


def sampler(pca, partner="bank", p=1.0, alpha=1.0, seed=0, process_index=0, **keywords):
    rank, per_class = keywords.pop("rank", None), keywords.pop("policy", None)
    policy = MixPolicy(p, alpha, rank, per_class, ("a", "b", "c"), 3, pca.rank)
    options = (keywords.pop("per_axis", False), keywords.pop("rescaled", False))
    return PlanSampler(pca, policy, partner, *options, seed, process_index, keywords.pop("redraws", 0))


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("per_axis", [False, True])
@pytest.mark.parametrize("source", ["bank", "batch", "gaussian"])
def test_mixing_matches_a_reference_for_each_sample(latents, source, per_axis, rescaled):
    pca = ClasswisePCA.fit(latents, rank=4)
    z = torch.cat([rows[:5] for rows in latents]).float()
    y = torch.arange(3).repeat_interleave(5)
    plan = sampler(pca, source, per_axis=per_axis, rescaled=rescaled)(y)
    mixed = mix_latents(z, y, pca, plan)
    expected = torch.stack([mix_one(z, y, pca, plan, i) for i in range(len(z))])
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=2e-5)
    assert (mixed - z).abs().max() > 0.1


def test_gaussian_partners_need_noise(latents):
    pca, index = ClasswisePCA.fit(latents, rank=4), torch.arange(3)
    plan = MixPlan(index, torch.ones(3, 4), torch.zeros_like(index), source="gaussian")
    with pytest.raises(ValueError, match="no noise; pass standard normal draws"):
        mix_latents(torch.zeros(3, 10), index, pca, plan)


@pytest.mark.parametrize("source", ["bank", "batch", "gaussian"])
def test_first_draw_does_not_depend_on_the_number_of_redraws(latents, source):
    pca, y = ClasswisePCA.fit(latents, rank=4), torch.arange(3).repeat(5)
    one, more = (sampler(pca, source, p=0.7, per_axis=True, redraws=n)(y) for n in (0, 3))
    assert (len(one.redraws), len(more.redraws)) == (0, 3)
    assert torch.equal(one.partner, more.partner)
    assert torch.equal(one.weight, more.weight)
    for draw in more.redraws:
        assert torch.equal(draw.index, one.index)
        assert torch.equal((draw.weight != 0).any(1), (one.weight != 0).any(1))
    assert not any(torch.equal(draw.weight, one.weight) for draw in more.redraws)


def test_each_sample_takes_the_first_draw_that_keeps_its_label(latents):
    pca, y = ClasswisePCA.fit(latents, rank=4), torch.arange(3).repeat_interleave(40)
    z = torch.cat([rows[torch.arange(40) % len(rows)] for rows in latents]).float()
    gaussians = ClassGaussians(1.5 * torch.randn(3, 10, generator=torch.Generator().manual_seed(1)), torch.ones(3, 10))
    plan = sampler(pca, per_axis=True, redraws=2)(y)
    mixed, kept = mix_keeping_labels(z, y, pca, plan, gaussians)
    taken = []
    for i in range(len(z)):

        def margin(v, i=i):
            others = [k for k in range(3) if k != y[i]]
            joint = gaussians.log_joint(v[i : i + 1])[0]
            return joint[y[i]] - joint[others].max()

        draws = [mix_latents(z, y, pca, draw) for draw in (plan, *plan.redraws)]
        valid = [n for n, latents in enumerate(draws) if margin(latents) >= min(float(margin(z)), 0)]
        taken.append(valid[0] if valid else None)
        assert torch.equal(mixed[i], draws[valid[0]][i] if valid else z[i])
        assert bool(kept[i]) == bool(valid)
    assert {0, 1, 2, None} <= set(taken)


def test_scalar_weight_at_full_rank_equals_latent_mixup(latents):
    pca = ClasswisePCA.fit(latents, rank=9)  # class 1 has 9 samples, so its rank is at most 8 of 10
    z, y = latents[1][:2].float(), torch.ones(2, dtype=torch.int64)
    plan = MixPlan(torch.arange(2), torch.full((2, 9), 0.3), torch.tensor([1, 0]), source="batch")
    span = pca.axes[1]
    step = (z.flip(0) - z) @ span.T @ span
    torch.testing.assert_close(mix_latents(z, y, pca, plan), z + 0.3 * step, rtol=0, atol=1e-5)


def test_weight_one_takes_the_partners_coordinates_and_keeps_the_residual(latents):
    pca = ClasswisePCA.fit(latents, rank=3)
    z, y = latents[2][:1].float(), torch.tensor([2])
    partner = pca.offsets[2] + 7
    mixed = mix_latents(z, y, pca, MixPlan(torch.arange(1), torch.ones(1, 3), partner[None]))
    torch.testing.assert_close(pca.project(mixed, y)[0], pca.coords[partner].float(), rtol=0, atol=1e-4)
    residual = lambda v: v - pca.combine(pca.project(v, y), y)  # noqa: E731
    torch.testing.assert_close(residual(mixed), residual(z), rtol=0, atol=1e-5)


def test_bank_partners_have_the_same_label_and_cover_the_class(latents):
    pca = ClasswisePCA.fit(latents, rank=2)
    y = torch.randint(0, 3, (4000,), generator=torch.Generator().manual_seed(0))
    partner = sampler(pca)(y).partner
    assert torch.equal(pca.labels[partner], y)
    assert len(partner.unique()) == 45


def test_batch_partners_have_the_same_label_and_differ_from_the_sample(latents):
    pca = ClasswisePCA.fit(latents, rank=2)
    y = torch.tensor([0, 1, 1, 2, 2, 2, 1])
    for seed in range(20):
        plan = sampler(pca, "batch", seed=seed)(y)
        mixed = (plan.weight != 0).any(1)
        assert mixed.tolist() == [False] + [True] * 6  # label 0 occurs once
        assert torch.equal(y[plan.partner[mixed]], y[mixed])
        assert (plan.partner != torch.arange(7))[mixed].all()


def test_fraction_of_samples_is_p_and_weights_are_beta_distributed(latents):
    pca = ClasswisePCA.fit(latents, rank=2)
    y = torch.zeros(20_000, dtype=torch.int64)
    plan = sampler(pca, p=0.3, alpha=0.5)(y)
    assert len(plan.index) / len(y) == pytest.approx(0.3, abs=0.02)
    weight = plan.weight[:, 0].double()
    assert weight.mean().item() == pytest.approx(0.5, abs=0.02)
    assert weight.var().item() == pytest.approx(0.125, abs=0.01)  # variance of Beta(½, ½)


def test_policy_per_class(latents):
    pca = ClasswisePCA.fit(latents, rank=4)
    policy = {"a": {"p": 0.0}, "b": {"rank": 2, "alpha": 0.1}, "c": {"p": 1.0}}
    y = torch.arange(3).repeat_interleave(500)
    plan = sampler(pca, p=0.5, policy=policy)(y)
    label, mixed = y[plan.index], plan.weight != 0
    assert not mixed[label == 0].any()
    assert not mixed[label == 1][:, 2:].any()
    assert mixed[label == 1][:, :2].any(1).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert mixed[label == 2].all()
    extreme = (plan.weight[label == 1][:, 0] - 0.5).abs() > 0.45
    assert extreme.float().mean() > 0.5  # most of Beta(0.1, 0.1) is near 0 and 1
    extreme = (plan.weight[label == 2][:, 0] - 0.5).abs() > 0.45
    assert extreme.float().mean().item() == pytest.approx(0.1, abs=0.05)  # Beta(1, 1) is uniform


def test_class_with_one_sample_has_no_partner():
    pca = ClasswisePCA.fit([torch.randn(1, 6), torch.randn(5, 6)], rank=2)
    policy = MixPolicy(1.0, 1.0, None, None, None, 2, 2)
    plan = PlanSampler(pca, policy, "bank", False, False, 0, 0)(torch.tensor([0, 1]))
    assert (plan.weight != 0).any(1).tolist() == [False, True]


def test_draws_depend_on_seed_and_process_index(latents):
    pca = ClasswisePCA.fit(latents, rank=2)
    y = torch.zeros(50, dtype=torch.int64)
    weights = [sampler(pca, seed=s, process_index=i)(y).weight for s, i in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


class LargestTensor(TorchDispatchMode):
    """Record the size of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_mixing_does_not_copy_the_components_for_each_sample():
    generator = torch.Generator().manual_seed(0)
    classes, rank, dim, size = 8, 32, 96, 64  # few classes, so that the components themselves are small
    pca = ClasswisePCA.fit(torch.randn(classes, 50, dim, generator=generator), rank)
    z, y = torch.randn(size, dim, generator=generator), torch.randint(0, classes, (size,), generator=generator)
    plan = MixPlan(torch.arange(size), torch.rand(size, rank, generator=generator), pca.offsets[y])
    with LargestTensor() as largest:
        mix_latents(z, y, pca, plan)
    assert size * dim <= largest.numel <= 8 * size * dim < size * dim * rank


BAD_POLICIES = [
    (dict(p=1.5), "probability from 0 to 1"),
    (dict(alpha=0.0), "positive number"),
    (dict(rank=9), "from 1 to 4, the number of principal components fitted"),
    (dict(partner="nearest"), "expected one of"),
    (dict(policy={"d": {"p": 1}}), "names a class 'd'"),
    (dict(policy={"a": {"prob": 1}}), "keys among"),
    (dict(policy={"a": {"p": -1}}), "probability from 0 to 1"),
    (dict(redraws=-1), r"redraws is -1; expected 0"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD_POLICIES)
def test_bad_policy(latents, keywords, message):
    with pytest.raises(ValueError, match=message):
        sampler(ClasswisePCA.fit(latents, rank=4), **keywords)
