import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowaug import FlowMixupTransform
from flowaug.data import ImageDataset
from flowaug.evaluation.label_preservation import label_preservation, write_report
from flowaug.evaluation.metrics import fid
from flowaug.evaluation.oracle import Oracle, load_oracle, small_oracle
from flowaug.evaluation.pictures import draw_augmented, drawn_plan, fixed_plan
from tests.conftest import NAMES, make_flow, make_pca

WEIGHTS = (0.0, 0.5, 1.0)


class Brightness(torch.nn.Module):
    """Classify dark images as 0, medium ones as 1, bright ones as 2; the features are the channel means."""

    def forward_features(self, x):
        return x.mean((2, 3))

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else -(x.mean(1, keepdim=True) - torch.tensor([0.2, 0.5, 0.8])).abs()

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def oracle(model=None):
    return Oracle(model or Brightness(), (3, 8, 8), (0.0,), (1.0,), "brightness")


def bright_images(count=9, noise=15):
    pixels = np.random.default_rng(0).integers(-noise, noise + 1, (count, 8, 8, 3)) + 128
    targets = np.arange(count) % 3
    return (pixels + (targets - 1)[:, None, None, None] * 76).astype(np.uint8), targets


@pytest.fixture
def transform(flow, pca):
    return FlowMixupTransform(flow, pca, p=1.0)


@pytest.fixture
def batch():
    pixels, targets = bright_images()
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(targets)


def test_report_equals_a_direct_computation(transform, batch):
    images, targets = batch
    report = label_preservation(transform, oracle(), images, targets, WEIGHTS)
    assert report["original"] == {"accuracy": 1.0, "per_class": [1.0, 1.0, 1.0]}
    x = images.float() / 255
    for row in report["weights"]:
        augmented = transform.apply(x, targets, fixed_plan(transform, targets, row["weight"]))
        correct = oracle()(augmented) == targets
        assert row["accuracy"] == pytest.approx(correct.double().mean().item())
        assert row["kept"] == row["accuracy"]
        assert row["per_class"] == [correct[targets == k].double().mean().item() for k in range(3)]
        assert row["rms_distance"] == pytest.approx((augmented - x).square().mean().sqrt().item(), abs=1e-6)
        means = (image.mean((2, 3)) for image in (x, augmented))
        assert row["fid"] == pytest.approx(fid(*means), abs=1e-6)


def test_drawn_row_augments_as_in_training(flow, pca, batch, monkeypatch):
    images, targets = batch
    transform = FlowMixupTransform(flow, pca, p=0.1, per_axis=True, rescaled=True, redraws=1)
    drawn = label_preservation(transform, oracle(), images, targets, (), seed=3)["drawn"]
    x = images.float() / 255
    augmented = transform.apply(x, targets, drawn_plan(transform, targets, 3))
    assert drawn["changed"] == (augmented != x).flatten(1).any(1).double().mean().item() > 0.1
    assert drawn["rms_distance"] == pytest.approx((augmented - x).square().mean().sqrt().item(), abs=1e-6)
    margins = iter([-1.0, -2.0, -2.0])  # of the images, then of two draws
    monkeypatch.setattr(
        "flowaug.latents.gaussians.ClassGaussians.margin", lambda self, z, y: torch.full(y.shape, next(margins))
    )
    lost = label_preservation(transform, oracle(), images, targets, (), seed=3)["drawn"]
    assert (lost["changed"], lost["accuracy"]) == (0, 1.0)


def test_preview_with_per_axis_weights_shows_draws_for_every_image(flow, pca, batch, tmp_path):
    x, y = batch[0][:3].float() / 255, batch[1][:3]
    one, each = (FlowMixupTransform(flow, pca, p=0.1, per_axis=per_axis) for per_axis in (False, True))
    state = each.sampler.rng.bit_generator.state
    plan = drawn_plan(each, y, 1)
    assert plan.chosen.all()
    assert len(plan.index) == 3
    assert len(plan.weight.unique()) == plan.weight.numel()
    pictures = [draw_augmented(t, x, y, tmp_path / f"{t is each}.png") for t in (one, each)]
    with Image.open(pictures[0]) as narrow, Image.open(pictures[1]) as wide:
        assert wide.width > narrow.width
    assert each.sampler.rng.bit_generator.state == state
    assert each.sampler.policy.max_p == 0.1


def test_partners_of_a_fixed_plan_stay_in_their_class(transform, batch, monkeypatch):
    monkeypatch.setattr("torch.rand", lambda count, generator: torch.ones(count))  # as if rounded up
    targets, pca = batch[1], transform.pca
    plan = fixed_plan(transform, targets, 0.5)
    assert torch.equal(plan.partner, pca.offsets[targets + 1] - 1)


def test_distance_is_zero_at_weight_zero_and_increases_with_the_weight(transform, batch):
    rows = label_preservation(transform, oracle(), *batch, WEIGHTS)["weights"]
    assert (rows[0]["changed"], rows[0]["rms_distance"], rows[0]["accuracy"]) == (0, 0, 1)
    assert abs(rows[0]["fid"]) < 1e-6 < rows[1]["fid"] < rows[2]["fid"]
    assert rows[0]["rms_distance"] < rows[1]["rms_distance"] < rows[2]["rms_distance"]


def test_rejected_images_do_not_count_as_changed(transform, batch, monkeypatch):
    monkeypatch.setattr(transform.flow, "decode", lambda z: torch.full((len(z), 3, 8, 8), 1e6))
    row = label_preservation(transform, oracle(), *batch, (1.0,))["weights"][0]
    assert (row["changed"], row["rms_distance"]) == (0, 0)


def test_classifier_that_is_always_wrong(transform, batch):
    images, _ = batch
    report = label_preservation(transform, oracle(), images, torch.full((9,), 2), (0.5,))
    assert report["original"]["per_class"] == [None, None, pytest.approx(1 / 3)]
    report = label_preservation(transform, oracle(), images[:1], torch.tensor([2]), (0.5,))
    assert (report["weights"][0]["kept"], report["weights"][0]["fid"]) == (None, None)


def test_classifier_without_features(transform, batch):
    with pytest.raises(ValueError, match="use a timm model"):
        label_preservation(transform, oracle(torch.nn.Flatten()), *batch)


def test_no_images(transform, batch):
    with pytest.raises(ValueError, match="there are 0 images and 0 labels"):
        label_preservation(transform, oracle(), batch[0][:0], batch[1][:0])


def test_rgb_images_with_a_grey_flow_require_luminance(batch):
    flow = make_flow((1, 8, 8))
    pca = make_pca(flow)
    with pytest.raises(ValueError, match="luminance=True"):
        label_preservation(FlowMixupTransform(flow, pca), oracle(), *batch)
    rows = label_preservation(FlowMixupTransform(flow, pca, luminance=True), oracle(), *batch, (0.5,))["weights"]
    assert rows[0]["changed"] == 1


def test_files(transform, batch, tmp_path):
    report = label_preservation(transform, oracle(), *batch, WEIGHTS)
    path = write_report(report, ("ant|hill", *NAMES[1:]), tmp_path, "a flow on images")
    text = path.read_text()
    assert "| accuracy | 1.0000 | 1.0000 |" in text
    assert "w = 1 | as drawn |" in text
    assert "| FID | – | 0.0000 |" in text
    assert "| ant\\|hill | 1.0000 |" in text
    assert json.loads((tmp_path / "labels.json").read_text())["weights"] == report["weights"]
    with Image.open(tmp_path / "labels.png") as image:
        assert image.width > 300


def test_small_oracle_learns_and_is_cached(tmp_path):
    data = ImageDataset(*bright_images(60), NAMES, name="bright")
    state = torch.get_rng_state()
    first = small_oracle(data, tmp_path, (8, 8), 3, steps=30)
    assert torch.equal(torch.get_rng_state(), state)
    images, targets = bright_images(30, noise=10)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    predicted = first(x)
    assert (predicted == torch.from_numpy(targets)).float().mean() > 0.9
    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    assert torch.equal(small_oracle(data, tmp_path, (8, 8), 3, steps=30)(x), predicted)
    assert path.stat().st_mtime_ns == stamp


def test_oracle_from_a_checkpoint(tmp_path):
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("test_resnet", num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = load_oracle("test_resnet", 3, 3, tmp_path / "model.safetensors", 32)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(loaded.preprocess(x)).argmax(1))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_oracle("test_resnet", 5, 3, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no weights at 'nowhere"):
        load_oracle("test_resnet", 3, 3, "nowhere.pth")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_oracle("no_such_model", 3, 3, tmp_path / "model.safetensors")


def test_probabilities_are_averaged_over_an_image_and_its_flip():
    class Left(torch.nn.Module):
        def forward(self, x):
            return torch.stack([x[..., :4].sum((1, 2, 3)), x[..., 4:].sum((1, 2, 3))], 1) * 0.01

    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    one, both = (oracle(Left()).probabilities(x, mirrored) for mirrored in (False, True))
    torch.testing.assert_close(one, Left()(x).softmax(1))
    torch.testing.assert_close(both, (one + one.flip(1)) / 2)
    assert oracle(Left()).probabilities(x, dtype=torch.bfloat16).dtype == torch.float32


def test_grey_images_with_an_rgb_classifier():
    assert oracle()(torch.full((2, 1, 8, 8), 0.8)).tolist() == [2, 2]
    with pytest.raises(ValueError, match="takes 3 channels"):
        oracle()(torch.zeros(2, 2, 8, 8))


def test_grey_flow_on_grey_images():
    flow = make_flow((1, 8, 8))
    transform = FlowMixupTransform(flow, make_pca(flow))
    report = label_preservation(transform, oracle(), torch.full((3, 1, 8, 8), 128, dtype=torch.uint8), torch.arange(3))
    assert report["original"]["accuracy"] == pytest.approx(1 / 3)
