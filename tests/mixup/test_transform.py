import random

import numpy as np
import pytest
import torch
from PIL import Image

from flowaug import FlowMixupTransform, MixPlan
from flowaug.data.images import to_pixels
from tests.conftest import NAMES, make_flow, make_pca

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def batch(count=6, channels=3, size=(8, 8), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 0.2 + 0.6 * torch.rand(count, channels, *size, generator=generator)
    return x, torch.arange(count) % 3


def zero_weight_plan(transform, y):
    """Return a plan with weight 0 for every sample."""
    plan = transform.plan(y)
    return MixPlan(plan.index, torch.zeros_like(plan.weight), plan.partner)


@pytest.fixture
def transform(flow, pca):
    return FlowMixupTransform(flow, pca, p=1.0)


def test_changes_images_and_keeps_labels(transform):
    x, y = batch()
    original = x.clone()
    out, labels = transform(x, y)
    assert labels is y
    assert torch.equal(x, original)
    assert out.shape == x.shape
    assert ((out - x).abs().flatten(1).amax(1) > 1e-3).all()
    assert 0 <= out.min() <= out.max() <= 1
    assert transform.counts == {"seen": 6, "augmented": 6, "refused": 0, "no_partner": 0}


@pytest.mark.parametrize("size", [(8, 8), (20, 13)])
def test_weight_zero_returns_the_image_exactly(transform, size):
    x, y = batch(size=size)
    assert torch.equal(transform.apply(x, y, zero_weight_plan(transform, y)), x)


def test_samples_that_lose_their_label_are_unchanged_and_counted(flow, pca, monkeypatch):
    x, y = batch()
    checked, plain = (FlowMixupTransform(flow, pca, p=1.0, redraws=n) for n in (2, 0))
    margins = iter([1.0, -1.0, -1.0, -1.0])  # of the images, then of three draws
    monkeypatch.setattr(
        "flowaug.latents.gaussians.ClassGaussians.margin", lambda self, z, y: torch.full(y.shape, next(margins))
    )
    assert torch.equal(checked(x, y)[0], x)
    assert checked.counts == {"seen": 6, "augmented": 0, "refused": 6, "no_partner": 0}
    margins = iter([-2.0, -1.0, -1.0, -1.0])  # misclassified, but with a larger margin than the image
    checked.reseed(0, 0)
    assert torch.equal(checked(x, y)[0], plain(x, y)[0])


def test_same_size_is_decode_of_the_mixed_latents(transform):
    from flowaug import mix_latents
    from flowaug.pixels import quantise

    x, y = batch()
    x = quantise(x)
    plan = transform.plan(y)
    expected = transform.flow.decode(mix_latents(transform.flow.encode(x)[0], y, transform.pca, plan)).clamp(0, 1)
    torch.testing.assert_close(transform.apply(x, y, plan), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 23), (5, 6)])
def test_images_are_resized_like_the_training_images_of_the_flow(transform, size, monkeypatch):
    # A limited range of values, because PIL clips between its two passes.
    pixels = np.random.default_rng(0).integers(80, 176, (6, *size, 3), dtype=np.uint8)
    files = torch.stack([to_pixels(Image.fromarray(image), (8, 8), 3) for image in pixels])
    encoded, encode = [], transform.flow.encode
    monkeypatch.setattr(transform.flow, "encode", lambda x: encoded.append(x) or encode(x))
    transform(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.arange(6) % 3)
    torch.testing.assert_close(encoded[0] * 255, files.float(), rtol=0, atol=1.001)
    assert (encoded[0] * 255 - files).abs().mean() < 0.25


def test_dtypes_and_memory_layouts_give_the_same_images(transform):
    x, y = batch()
    x = (x * 255).round() / 255
    plan = transform.plan(y)
    expected = transform.apply(x, y, plan)
    byte = transform.apply((x * 255).round().to(torch.uint8), y, plan)
    assert byte.dtype == torch.uint8
    torch.testing.assert_close(byte.float() / 255, expected, rtol=0, atol=0.51 / 255)
    for dtype, bound in ((torch.bfloat16, 4e-3), (torch.float16, 1e-3), (torch.float64, 1e-6)):
        out = transform.apply(x.to(dtype), y, plan)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected.double(), rtol=0, atol=bound)
    last = transform.apply(x.to(memory_format=torch.channels_last), y, plan)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, expected, rtol=0, atol=1e-6)


def test_normalised_input(flow, pca):
    x, y = batch()
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    plain = FlowMixupTransform(flow, pca, p=1.0)
    plan = plain.plan(y)
    out = FlowMixupTransform(flow, pca, p=1.0, mean=MEAN, std=STD).apply((x - mean) / std, y, plan)
    torch.testing.assert_close(out * std + mean, plain.apply(x, y, plan), rtol=0, atol=1e-5)


def test_luminance_changes_all_channels_equally():
    flow = make_flow((1, 8, 8))
    x, y = batch()
    transform = FlowMixupTransform(flow, make_pca(flow), p=1.0, luminance=True)
    change = transform(x, y)[0] - x
    unclamped = ((x + change > 0) & (x + change < 1)).all(1)
    torch.testing.assert_close(change[:, 0][unclamped], change[:, 2][unclamped], rtol=0, atol=1e-5)
    assert change.abs().max() > 1e-3


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("partner", ["bank", "batch", "gaussian"])
def test_any_batch_size(flow, pca, partner, count):
    x, y = batch(count)
    transform = FlowMixupTransform(flow, pca, p=1.0, partner=partner)
    out = transform(x, y)[0]
    assert out.shape == x.shape
    counts = transform.counts
    assert counts["seen"] == count
    if partner == "batch":
        assert counts["no_partner"] == {0: 0, 1: 1, 5: 1}[count]
    else:
        assert counts["augmented"] == count


def test_autocast_and_inference_mode_have_no_effect(transform):
    x, y = batch()
    plan = transform.plan(y)
    expected = transform.apply(x, y, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transform.apply(x, y, plan), expected)
    with torch.inference_mode():
        assert torch.equal(transform.apply(x, y, plan), expected)


def test_classifier_can_train_on_the_result(transform):
    x, y = batch()
    layer = torch.nn.Conv2d(3, 1, 3)
    layer(transform(x, y)[0]).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_invalid_samples_are_unchanged_and_counted(transform):
    x, y = batch()
    transform(x, y)
    x[1, 0, 3, 3] = float("nan")
    x[4] = 40.0
    out, _ = transform(x, y)
    assert torch.equal(out[[1, 4]].nan_to_num(7), x[[1, 4]].nan_to_num(7))
    assert torch.isfinite(out[[0, 2, 3, 5]]).all()
    assert transform.counts == {"seen": 12, "augmented": 10, "refused": 2, "no_partner": 0}


def test_decodes_out_of_range_are_rejected(transform, monkeypatch):
    x, y = batch()
    monkeypatch.setattr(transform.flow, "decode", lambda z: torch.full((len(z), 3, 8, 8), 1e6))
    assert torch.equal(transform(x, y)[0], x)
    assert transform.counts["refused"] == 6


def test_global_generators_are_unchanged(transform):
    # This test is about the legacy global state of numpy.
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    transform(*batch())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
    assert random.getstate() == states[2]


def test_state_dict_repeats_the_draws(flow, pca):
    import json

    x, y = batch()
    transform = FlowMixupTransform(flow, pca, p=0.5, seed=3)
    transform(x, y)
    state = json.loads(json.dumps(transform.state_dict()))
    expected = transform(x, y)[0]
    other = FlowMixupTransform(flow, pca, p=0.5, seed=99)
    other.load_state_dict(state)
    assert torch.equal(other(x, y)[0], expected)
    assert other.counts == transform.counts


def test_unknown_labels_are_skipped_on_request(flow, pca):
    x, y = batch()
    y[2] = 77
    transform = FlowMixupTransform(flow, pca, p=1.0, unknown="skip")
    out, _ = transform(x, y)
    assert torch.equal(out[2], x[2])
    assert transform.counts["no_partner"] == 1
    assert transform.counts["augmented"] == 5


def test_repr_shows_the_counts(transform):
    transform(*batch())
    assert "augmented=6" in repr(transform)


def test_policy_from_a_json_file(flow, pca, tmp_path):
    import json

    path = tmp_path / "policy.json"
    path.write_text(json.dumps({"bee": {"p": 0.0}}))
    x, y = batch()
    out, _ = FlowMixupTransform(flow, pca, p=1.0, policy=path)(x, y)
    assert ((out != x).flatten(1).any(1) == (y != 1)).all()
    path.write_text("{")
    with pytest.raises(ValueError, match=r"policy\.json is not valid JSON"):
        FlowMixupTransform(flow, pca, policy=str(path))


def test_autocast_applies_to_the_flow_on_request(flow, pca):
    x, y = batch()
    plain, cast = (FlowMixupTransform(flow, pca, p=1.0, autocast=a) for a in (False, True))
    plan = plain.plan(y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact, rounded = plain.apply(x, y, plan), cast.apply(x, y, plan)
    assert 0 < (exact - rounded).abs().max() < 0.2


X, Y = batch()
BAD_CALLS = [
    (X[0], Y, ValueError, "expected images"),
    (X.long(), Y, TypeError, "floating-point or uint8"),
    (X, Y.float(), ValueError, "expected integer labels"),
    (X, torch.nn.functional.one_hot(Y), ValueError, "flow mixup needs hard labels"),
    (X, Y[:4], ValueError, "y has 4 labels but x has 6 images"),
    (X[:, :1], Y, ValueError, "images have 1 channels but the flow was trained on 3"),
    (X, Y + 1, ValueError, "the labels range from 1 to 3 but the flow has 3 classes"),
    (X * 255, Y, ValueError, "expected|not \\[0, 1\\]"),
    ((X - 0.5) / 0.1, Y, ValueError, "mean and std"),
]


@pytest.mark.parametrize(("x", "y", "error", "message"), BAD_CALLS)
def test_bad_call(transform, x, y, error, message):
    with pytest.raises(error, match=message):
        transform(x, y)


BAD_OPTIONS = [
    (dict(unknown="ignore"), "expected 'error' or 'skip'"),
    (dict(mean=(0.5,)), "both mean and std"),
    (dict(mean=(0.5,), std=(0.0,)), "std positive"),
    (dict(class_names=("ant", "cat", "bee")), "class 1 is 'cat' in the data set but 'bee' in the flow"),
    (dict(class_names=NAMES[:2]), "the flow has 3 classes but the data set has 2"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(flow, pca, options, message):
    with pytest.raises(ValueError, match=message):
        FlowMixupTransform(flow, pca, **options)


def test_principal_components_of_another_flow(flow):
    with pytest.raises(ValueError, match="load both from the same folder"):
        FlowMixupTransform(flow, make_pca(make_flow((1, 8, 8))))
