import numpy as np
import pytest
import torch

from flowaug.data.transforms import random_hflip, random_shift
from flowaug.flows.passes import AveragedFlow, ImageTable, class_moments, evaluate, fit_pca
from flowaug.latents.moments import ClassMoments
from tests.conftest import make_flow

CPU = torch.device("cpu")


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (31, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return ImageTable(images, torch.arange(31) % 3, 3, batch_size=7)


def shards(data, count):
    """Return the data set as each of ``count`` processes sees it."""
    return [ImageTable(data.images, data.targets, 3, 7, index, count) for index in range(count)]


def test_moments_of_two_processes_equal_those_of_one(flow, data, monkeypatch):
    monkeypatch.setattr(flow, "dequantise", lambda x, generator: x)  # no noise
    whole = class_moments(flow, data, CPU)
    parts = [class_moments(flow, shard, CPU) for shard in shards(data, 2)]
    merged = parts[0].merge(parts[1])
    assert torch.equal(merged.count, whole.count)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged.variance, whole.variance, rtol=1e-6, atol=1e-6)


def test_evaluate_counts_every_image_once(flow, data):
    with torch.no_grad():
        z, _ = flow.encode(data.images.float() / 255)
        expected = (flow.gaussians.log_joint(z).argmax(1) == data.targets).double().mean().item()
    sums = []
    for shard in shards(data, 2):
        evaluate(flow, shard, CPU, reduce=lambda t: sums.append(t) or t)
    bits, correct, count = (sums[0] + sums[1]).tolist()
    assert count == 31
    assert correct / count == pytest.approx(expected)
    assert np.isfinite(bits)


def test_axes_are_the_principal_components_of_each_class(flow, data):
    pca = fit_pca(flow, data, CPU, rank=2)
    with torch.no_grad():
        z = flow.encode(data.images[data.targets == 1].float() / 255)[0].double()
    z = z - z.mean(0)
    leading = torch.linalg.svd(z, full_matrices=False)[2][:2]
    torch.testing.assert_close(pca.axes[1].double().T @ pca.axes[1].double(), leading.T @ leading, rtol=0, atol=1e-5)


def test_shift_translates_and_repeats_the_border():
    x = torch.zeros(500, 1, 5, 5)
    x[:, :, 2, 2] = 1
    shifted = random_shift(x, 2, torch.Generator().manual_seed(0))
    assert (shifted.sum((1, 2, 3)) == 1).all()
    assert (shifted.mean(0)[0] > 0).all()  # all 25 positions occur
    assert torch.equal(random_shift(x, 0, torch.Generator()), x)
    edge = torch.arange(5.0).expand(8, 1, 5, 5)
    assert random_shift(edge, 4, torch.Generator().manual_seed(1))[:, 0, 0].diff(dim=1).min() >= 0


def test_hflip_mirrors_the_given_fraction():
    x = torch.arange(4.0).expand(2000, 1, 2, 4)
    out = random_hflip(x, 0.25, torch.Generator().manual_seed(0))
    mirrored = (out == x.flip(3)).flatten(1).all(1)
    assert mirrored.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(out[~mirrored], x[~mirrored])


def test_untrained_flow_has_chance_accuracy(data):
    assert evaluate(make_flow(), data, CPU)["nf_acc"] < 0.7


def test_weights_are_the_uniform_mean_from_the_first_swa_step_on(flow):
    averaged = AveragedFlow(flow, decay=0.9, swa_from=3)
    name, values = next(iter(dict(flow.named_parameters()))), []
    for step in range(7):
        parameter = dict(flow.named_parameters())[name]
        parameter.data = torch.full_like(parameter, float(step**2))
        averaged.update(flow, step=step)
        values.append(dict(averaged.module.named_parameters())[name].mean().item())
    assert values[3:] == pytest.approx([9, (9 + 16) / 2, (9 + 16 + 25) / 3, (9 + 16 + 25 + 36) / 4])
    assert 0 <= values[2] < 4  # before it, the exponential average


@pytest.mark.parametrize(("partners", "kept_counts"), [(6, [6, 6, 6]), (None, [11, 10, 10])])
def test_pca_of_two_processes_equals_that_of_one(flow, data, partners, kept_counts):
    moments = [ClassMoments.zeros(3, flow.dim, CPU) for _ in range(3)]
    whole = fit_pca(flow, data, CPU, 3, partners, moments=moments[0])
    parts = [[], []]
    for shard, sums, kept in zip(shards(data, 2), moments[1:], parts, strict=True):
        fit_pca(flow, shard, CPU, 3, partners, lambda t, kept=kept: kept.append(t) or t, sums)
    for name, a, b in zip(("axes", "variance", "mean", "coords"), *parts, strict=True):
        torch.testing.assert_close(a + b, whole.tensors()[name].float(), rtol=0, atol=0, msg=name)
    assert whole.count.tolist() == kept_counts
    merged = moments[1].merge(moments[2])
    assert torch.equal(merged.mean, moments[0].mean)
