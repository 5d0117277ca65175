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
    assert transform.counts == {"seen": 6, "augmented": 6, "rejected": 0, "no_partner": 0}


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
    assert checked.counts == {"seen": 6, "augmented": 0, "rejected": 6, "no_partner": 0}
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


def test_a_greyscale_flow_receives_the_luma_of_pillow():
    flow = make_flow((1, 8, 8))
    transform = FlowMixupTransform(flow, make_pca(flow), luminance=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    grey = transform._to_flow(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255)
    expected = torch.from_numpy(np.asarray(image.convert("L")).copy())[None, None] / 255
    torch.testing.assert_close(grey, expected, rtol=0, atol=1.01 / 255)


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
    assert transform.counts == {"seen": 12, "augmented": 10, "rejected": 2, "no_partner": 0}


def test_decodes_out_of_range_are_rejected(transform, monkeypatch):
    x, y = batch()
    monkeypatch.setattr(transform.flow, "decode", lambda z: torch.full((len(z), 3, 8, 8), 1e6))
    assert torch.equal(transform(x, y)[0], x)
    assert transform.counts["rejected"] == 6


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


class Constant(torch.utils.data.Dataset):
    """Equal images of one class: what differs between batches is the random choices alone."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return torch.full((3, 8, 8), 0.5), 1


def batches_of_workers(transform, seed, epochs=2, persistent=False):
    """Batches that a data loader's two workers augment, epoch by epoch."""
    loader = torch.utils.data.DataLoader(
        Constant(),
        batch_size=8,
        num_workers=2,
        collate_fn=lambda samples: transform(*torch.utils.data.default_collate(samples))[0],
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=persistent,
    )
    return [batch.numpy().tobytes() for _ in range(epochs) for batch in loader]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_of_a_data_loader_draw_differently_in_each_worker_and_epoch(flow, pca, persistent):
    transform = FlowMixupTransform(flow, pca, p=1.0, max_outside=1.0)
    first = batches_of_workers(transform, seed=3, persistent=persistent)
    assert len(set(first)) == 8
    counts = transform.counts
    assert counts["seen"] == 64
    assert counts["augmented"] + counts["rejected"] == 64
    assert batches_of_workers(FlowMixupTransform(flow, pca, p=1.0, max_outside=1.0), 3, persistent=persistent) == first
    assert not set(batches_of_workers(FlowMixupTransform(flow, pca, p=1.0, max_outside=1.0), seed=4)) & set(first)


def test_reseeding_in_a_worker_goes_before_the_workers_seed(flow, pca):
    transform = FlowMixupTransform(flow, pca, p=1.0, max_outside=1.0)

    def collate(samples):
        transform.reseed(5)
        return transform(*torch.utils.data.default_collate(samples))[0]

    loader = torch.utils.data.DataLoader(Constant(), batch_size=8, num_workers=2, collate_fn=collate)
    assert len({batch.numpy().tobytes() for batch in loader}) == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type(flow, pca, dtype):
    transform, y = FlowMixupTransform(flow, pca, p=1.0, seed=1), torch.tensor([0, 1, 2, 1])
    same = FlowMixupTransform(flow, pca, p=1.0, seed=1)
    x = torch.rand(4, 3, 8, 8)
    out, labels = transform(x, y.to(dtype))
    assert labels.dtype == dtype
    assert torch.equal(out, same(x, y)[0])


def test_two_transforms_of_one_pca_live_on_their_own_devices(flow, pca):
    first, second = FlowMixupTransform(flow, pca), FlowMixupTransform(flow, pca)
    first.to("meta")
    second(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    assert pca.axes.device.type == "cpu"


def test_a_transform_made_in_inference_mode_works_outside_of_it(flow, pca):
    with torch.inference_mode():
        transform = FlowMixupTransform(flow, pca, p=1.0)
    transform(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    assert transform.counts["seen"] == 2


def test_constants_may_be_tensors_and_arrays(flow, pca):
    for kind in (tuple, np.array, torch.tensor):
        transform = FlowMixupTransform(flow, pca, mean=kind([0.5, 0.4, 0.3]), std=kind([0.2, 0.2, 0.2]))
        assert transform.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected an integer of at least 1"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"redraws": 1.5}, "redraws is 1.5"),
        ({"seed": -1}, "seed is -1; expected an integer of at least 0"),
        ({"seed": None}, "seed is None"),
        ({"process_index": -1}, "process_index is -1"),
        ({"max_outside": float("nan")}, "max_outside is nan; expected a fraction"),
        ({"max_outside": -1}, "max_outside is -1"),
        ({"p": "half"}, "p is 'half'; expected a number"),
        ({"mean": [0.5], "std": [float("inf")]}, "one finite number per channel"),
        ({"mean": [0.5], "std": np.array([0.0])}, "std positive"),
        ({"policy": [1]}, r"the policy \[1\] is no mapping"),
        ({"policy": {"ant": {"p": None}}}, "p is None; expected a number"),
    ],
)
def test_bad_numbers_are_refused_when_a_transform_is_created(flow, pca, keywords, message):
    with pytest.raises(ValueError, match=message):
        FlowMixupTransform(flow, pca, **keywords)


def test_arrays_lists_and_constants_of_other_channels_get_a_clear_error(flow, pca):
    transform = FlowMixupTransform(flow, pca)
    with pytest.raises(TypeError, match="the images are ndarray, expected a tensor"):
        transform(np.zeros((2, 3, 8, 8), np.float32), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="the labels are list, expected a tensor"):
        transform(torch.rand(2, 3, 8, 8), [0, 1])
    with pytest.raises(ValueError, match="mean and std have 2 channels but the images have 3"):
        FlowMixupTransform(flow, pca, mean=[0.5, 0.5], std=[1, 1])(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))


def test_the_rank_may_be_a_number_of_numpy(flow, pca):
    assert FlowMixupTransform(flow, pca, rank=np.int64(2)).plan(torch.tensor([0])).weight.shape[1] == 2
