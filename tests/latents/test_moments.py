import pytest
import torch

from flowaug.latents.moments import ClassMoments
from tests import oracles


def _labelled(n=200, dim=7, num_classes=5, shift=0.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % num_classes
    scale = torch.linspace(0.5, 2.0, dim, dtype=dtype)
    z = torch.randn(n, dim, generator=generator, dtype=dtype) * scale + y[:, None] + shift
    order = torch.randperm(n, generator=generator)
    return z[order], y[order]


def test_mean_and_variance_match_the_reference():
    z, y = _labelled()
    moments = ClassMoments.of(z, y, 5)
    mean, variance = oracles.class_statistics(z, y, 5)
    torch.testing.assert_close(moments.mean, mean, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(moments.variance, variance, atol=1e-12, rtol=1e-12)
    assert moments.count.tolist() == [40] * 5


def test_merge_and_update_match_a_single_pass():
    z, y = _labelled()
    whole = ClassMoments.of(z, y, 5)
    first, second = ClassMoments.of(z[:90], y[:90], 5), ClassMoments.of(z[90:], y[90:], 5)
    merged = first.merge(second)
    streamed = ClassMoments.zeros(5, 7).update(z[:90], y[:90]).update(z[90:], y[90:])
    for other in (merged, streamed, second.merge(first)):
        torch.testing.assert_close(other.tensors(), whole.tensors(), atol=0, rtol=1e-13)
    assert int(first.count.sum()) == 90, "merge must not modify its operands"


def test_tensors_can_be_all_reduced_in_place():
    z, y = _labelled()
    first, second = ClassMoments.of(z[:90], y[:90], 5), ClassMoments.of(z[90:], y[90:], 5)
    for ours, theirs in zip(first.tensors().values(), second.tensors().values(), strict=True):
        ours += theirs  # as dist.all_reduce does
    torch.testing.assert_close(first.variance, ClassMoments.of(z, y, 5).variance)
    again = ClassMoments.from_tensors(first.tensors())
    assert torch.equal(again.variance, first.variance)


@pytest.mark.parametrize("shift", [1e2, 1e4])
def test_variance_is_accurate_for_a_mean_far_from_zero(shift):
    z, y = _labelled(n=1000, shift=shift)
    variance = ClassMoments.of(z, y, 5).variance
    expected = oracles.class_statistics(z, y, 5)[1]
    # the relative error of E[z²] − m² is at most N_y · eps · (mean/std)²; N_y is 200, the smallest std about 0.5
    torch.testing.assert_close(variance, expected, atol=0, rtol=200 * 2.2e-16 * (shift / 0.5) ** 2)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1234.567, -7e5])
def test_variance_of_a_constant_is_zero(value):
    z = torch.full((999, 3), value)
    assert torch.equal(ClassMoments.of(z, torch.zeros(999, dtype=torch.int64), 1).variance, torch.zeros(1, 3).double())


def test_half_precision_latents_are_summed_in_float64():
    z, y = _labelled(n=4000, dtype=torch.float64)
    half = z.to(torch.bfloat16)
    mean, variance = oracles.class_statistics(half.double(), y, 5)
    moments = ClassMoments.of(half, y, 5)
    torch.testing.assert_close(moments.mean, mean, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(moments.variance, variance, atol=1e-12, rtol=1e-12)


GOOD_Z, GOOD_Y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
NAN_Z = torch.zeros(4, 3).index_fill(0, torch.tensor([2]), float("nan"))


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (GOOD_Z, torch.tensor([0, 1, 7, 0]), r"label 7 is out of range; with 3 classes, labels must be in \[0, 2\]"),
        (GOOD_Z, torch.tensor([0, -1, 2, 0]), r"label -1 is out of range; with 3 classes, labels must be in \[0, 2\]"),
        (GOOD_Z, GOOD_Y.float(), "integer class indices, got torch.float32"),
        (GOOD_Z, GOOD_Y[:3], r"expected 4 labels of shape \(4,\), got \(3,\)"),
        (GOOD_Z, torch.zeros(4, 3, dtype=torch.int64), r"got \(4, 3\)"),
        (GOOD_Z.view(4, 3, 1), GOOD_Y, "flatten"),
        (GOOD_Z.long(), GOOD_Y, "floating point"),
        (NAN_Z, GOOD_Y, r"class 2, first at row 2"),
    ],
)
def test_invalid_batches_raise(z, y, message):
    with pytest.raises(ValueError, match=message):
        ClassMoments.of(z, y, 3)


def test_an_invalid_batch_changes_nothing():
    moments = ClassMoments.of(GOOD_Z, GOOD_Y, 3)
    with pytest.raises(ValueError, match="not finite"):
        moments.update(NAN_Z, GOOD_Y)
    with pytest.raises(ValueError, match=r"must be \(B, 3\), got \(4, 2\)"):
        moments.update(GOOD_Z[:, :2], GOOD_Y)
    assert int(moments.count.sum()) == 4


def test_an_empty_class_raises_an_error_naming_it():
    moments = ClassMoments.of(GOOD_Z, torch.tensor([0, 1, 3, 0]), 5)
    for attribute in ("mean", "variance"):
        with pytest.raises(ValueError, match="no samples for class 2, 4 of 5"):
            getattr(moments, attribute)


def test_shapes_that_do_not_match_raise():
    with pytest.raises(ValueError, match=r"different shapes \(K, D\): \(2, 3\) and \(2, 4\)"):
        ClassMoments.zeros(2, 3).merge(ClassMoments.zeros(2, 4))
    with pytest.raises(ValueError, match="at least 1"):
        ClassMoments.zeros(0, 3)
    with pytest.raises(ValueError, match="count, total and squares must have shapes"):
        ClassMoments(torch.zeros(2), torch.zeros(3, 4), torch.zeros(3, 4))
