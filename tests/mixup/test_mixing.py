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


def sampler(pca, partner="bank", p=1.0, alpha=1.0, seed=0, rank=0, **keywords):
    policy = MixPolicy(p, alpha, keywords.pop("axes", None), keywords.pop("policy", None), ("a", "b", "c"), 3, pca.rank)
    form = (keywords.pop("per_axis", False), keywords.pop("rescaled", False))
    return PlanSampler(pca, policy, partner, *form, seed, rank, keywords.pop("redraws", 0))


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("per_axis", [False, True])
@pytest.mark.parametrize("source", ["bank", "batch", "gaussian"])
def test_mixing_equals_the_formula_sample_by_sample(latents, source, per_axis, rescaled):
    pca = ClasswisePCA.fit(latents, rank=4)
    z = torch.cat([rows[:5] for rows in latents]).float()
    y = torch.arange(3).repeat_interleave(5)
    plan = sampler(pca, source, per_axis=per_axis, rescaled=rescaled)(y)
    mixed = mix_latents(z, y, pca, plan)
    expected = torch.stack([mix_one(z, y, pca, plan, i) for i in range(len(z))])
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=2e-5)
    assert (mixed - z).abs().max() > 0.1


@pytest.mark.parametrize("source", ["bank", "batch", "gaussian"])
def test_the_first_choice_is_the_same_whatever_comes_after(latents, source):
    pca, y = ClasswisePCA.fit(latents, rank=4), torch.arange(3).repeat(5)
    one, more = (sampler(pca, source, p=0.7, per_axis=True, redraws=n)(y) for n in (0, 3))
    assert (len(one.redraws), len(more.redraws)) == (0, 3)
    assert torch.equal(one.partner, more.partner)
    assert torch.equal(one.weight, more.weight)
    for choice in more.redraws:
        assert torch.equal(choice.index, one.index)
        assert torch.equal((choice.weight != 0).any(1), (one.weight != 0).any(1))
    assert not any(torch.equal(choice.weight, one.weight) for choice in more.redraws)


def test_labels_are_kept_by_the_first_choice_that_does_sample_by_sample(latents):
    pca, y = ClasswisePCA.fit(latents, rank=4), torch.arange(3).repeat_interleave(40)
    z = torch.cat([rows[torch.arange(40) % len(rows)] for rows in latents]).float()
    gaussians = ClassGaussians(1.5 * torch.randn(3, 10, generator=torch.Generator().manual_seed(1)), torch.ones(3, 10))
    plan = sampler(pca, per_axis=True, redraws=2)(y)
    mixed, kept = mix_keeping_labels(z, y, pca, plan, gaussians)
    taken = []
    for i in range(len(z)):
        others = [k for k in range(3) if k != y[i]]
        odds = lambda v, i=i, others=others: (joint := gaussians.log_joint(v[i : i + 1])[0])[y[i]] - joint[others].max()  # noqa: E731
        tries = [mix_latents(z, y, pca, choice) for choice in (plan, *plan.redraws)]
        good = [n for n, moved in enumerate(tries) if odds(moved) >= min(float(odds(z)), 0)]
        taken.append(good[0] if good else None)
        assert torch.equal(mixed[i], tries[good[0]][i] if good else z[i])
        assert bool(kept[i]) == bool(good)
    assert {0, 1, 2, None} <= set(taken)


def test_full_rank_scalar_weight_is_plain_latent_mixup(latents):
    pca = ClasswisePCA.fit(latents, rank=9)  # 9 of 10 axes; class 2 has 30 samples, so take a 9-dim. partner
    z, y = latents[1][:2].float(), torch.ones(2, dtype=torch.int64)
    plan = MixPlan(torch.arange(2), torch.full((2, 9), 0.3), torch.tensor([1, 0]), source="batch")
    span = pca.axes[1]
    step = (z.flip(0) - z) @ span.T @ span
    torch.testing.assert_close(mix_latents(z, y, pca, plan), z + 0.3 * step, rtol=0, atol=1e-5)


def test_weight_one_takes_the_partners_coordinates_and_keeps_the_rest(latents):
    pca = ClasswisePCA.fit(latents, rank=3)
    z, y = latents[2][:1].float(), torch.tensor([2])
    partner = pca.offsets[2] + 7
    mixed = mix_latents(z, y, pca, MixPlan(torch.arange(1), torch.ones(1, 3), partner[None]))
    torch.testing.assert_close(pca.project(mixed, y)[0], pca.coords[partner].float(), rtol=0, atol=1e-4)
    rest = lambda v: v - pca.combine(pca.project(v, y), y)  # noqa: E731
    torch.testing.assert_close(rest(mixed), rest(z), rtol=0, atol=1e-5)


def test_bank_partners_are_of_the_class_and_cover_it(latents):
    pca = ClasswisePCA.fit(latents, rank=2)
    y = torch.randint(0, 3, (4000,), generator=torch.Generator().manual_seed(0))
    partner = sampler(pca)(y).partner
    assert torch.equal(pca.labels[partner], y)
    assert len(partner.unique()) == 45


def test_batch_partners_share_the_label_and_are_never_the_sample_itself(latents):
    pca = ClasswisePCA.fit(latents, rank=2)
    y = torch.tensor([0, 1, 1, 2, 2, 2, 1])
    for seed in range(20):
        plan = sampler(pca, "batch", seed=seed)(y)
        moving = (plan.weight != 0).any(1)
        assert moving.tolist() == [False] + [True] * 6  # label 0 stands alone
        assert torch.equal(y[plan.partner[moving]], y[moving])
        assert (plan.partner != torch.arange(7))[moving].all()


def test_share_of_samples_follows_p_and_weights_follow_beta(latents):
    pca = ClasswisePCA.fit(latents, rank=2)
    y = torch.zeros(20_000, dtype=torch.int64)
    plan = sampler(pca, p=0.3, alpha=0.5)(y)
    assert len(plan.index) / len(y) == pytest.approx(0.3, abs=0.02)
    weight = plan.weight[:, 0].double()
    assert weight.mean().item() == pytest.approx(0.5, abs=0.02)
    assert weight.var().item() == pytest.approx(0.125, abs=0.01)  # of Beta(½, ½)


def test_policy_per_class(latents):
    pca = ClasswisePCA.fit(latents, rank=4)
    policy = {"a": {"p": 0.0}, "b": {"rank": 2, "alpha": 0.1}, "c": {"p": 1.0}}
    y = torch.arange(3).repeat_interleave(500)
    plan = sampler(pca, p=0.5, policy=policy)(y)
    label, moving = y[plan.index], plan.weight != 0
    assert not moving[label == 0].any()
    assert not moving[label == 1][:, 2:].any()
    assert moving[label == 1][:, :2].any(1).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert moving[label == 2].all()
    extreme = (plan.weight[label == 1][:, 0] - 0.5).abs() > 0.45
    assert extreme.float().mean() > 0.5  # Beta(0.1, 0.1) sits at the ends


def test_a_class_of_one_has_no_partner():
    pca = ClasswisePCA.fit([torch.randn(1, 6), torch.randn(5, 6)], rank=2)
    policy = MixPolicy(1.0, 1.0, None, None, None, 2, 2)
    plan = PlanSampler(pca, policy, "bank", False, False, 0, 0)(torch.tensor([0, 1]))
    assert (plan.weight != 0).any(1).tolist() == [False, True]


def test_seed_and_rank_decide(latents):
    pca = ClasswisePCA.fit(latents, rank=2)
    y = torch.zeros(50, dtype=torch.int64)
    weights = [sampler(pca, seed=s, rank=r)(y).weight for s, r in ((0, 0), (0, 0), (1, 0), (0, 1))]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_mixing_never_builds_a_copy_of_the_axes_per_sample():
    generator = torch.Generator().manual_seed(0)
    classes, rank, dim, size = 8, 32, 96, 64  # few classes: the table itself is small
    pca = ClasswisePCA.fit(torch.randn(classes, 50, dim, generator=generator), rank)
    z, y = torch.randn(size, dim, generator=generator), torch.randint(0, classes, (size,), generator=generator)
    plan = MixPlan(torch.arange(size), torch.rand(size, rank, generator=generator), pca.offsets[y])
    with LargestTensor() as largest:
        mix_latents(z, y, pca, plan)
    assert size * dim <= largest.numel <= 8 * size * dim < size * dim * rank


BAD_POLICIES = [
    (dict(p=1.5), "probability from 0 to 1"),
    (dict(alpha=0.0), "positive number"),
    (dict(axes=9), "the 4 axes fitted"),
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
