"""Test ``wrap_loader`` on loaders of timm's ``create_loader``, with and without prefetcher."""

import argparse
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_dataset, create_loader, create_naflex_loader
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing

from flowaug import FlowMixupTransform, save_flow
from flowaug.timm import FlowAugAction, FlowLoader, wrap_loader
from tests.conftest import NAMES, make_flow, make_pca

PATCH = Path(__file__).resolve().parents[1] / "examples" / "timm_train.patch"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
CONFIG = {"input_size": (3, 8, 8), "mean": MEAN, "std": STD}
PLAIN_CROP = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0}
pytestmark = pytest.mark.filterwarnings(  # timm's reader does not close its files
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
BOTH = pytest.mark.parametrize("prefetcher", [True, False])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in NAMES:
        (root / "train" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / "train" / name / f"{i}.png")
    return root


def dataset(photos):
    return create_dataset("", root=photos, split="train", is_training=True)


def loader(photos, prefetcher=True, **options):
    options = {"mean": MEAN, "std": STD, "num_workers": 0, "is_training": True, **PLAIN_CROP, **options}
    return create_loader(
        options.pop("dataset", None) or dataset(photos),
        (3, 8, 8),
        batch_size=options.pop("batch_size", 4),
        use_prefetcher=prefetcher,
        device=torch.device("cpu"),
        **options,
    )


def one_epoch(wrapped, mixup_fn, seed=0):
    """Return the batches that timm's training loop passes to the model."""
    torch.manual_seed(seed)
    batches = list(wrapped)
    return batches if mixup_fn is None else [mixup_fn(x, y) for x, y in batches]


def mixing(prefetcher, **options):
    """Return Mixup as timm uses it: in the collate function, or in the training loop."""
    options = {"num_classes": 3, "label_smoothing": 0.0, **options}
    return ({"collate_fn": FastCollateMixup(**options)}, None) if prefetcher else ({}, Mixup(**options))


@BOTH
def test_batches_without_augmentation_equal_those_of_timm(photos, flow, pca, prefetcher):
    expected = one_epoch(loader(photos, prefetcher), None)
    actual = one_epoch(*wrap_loader(loader(photos, prefetcher), None, (flow, pca), CONFIG, p=0.0))
    assert len(actual) == len(expected) == 4
    for (x, y), (x0, y0) in zip(actual, expected, strict=True):
        assert torch.equal(x, x0)
        assert torch.equal(y, y0)


@BOTH
def test_images_change_and_labels_do_not(photos, flow, pca, prefetcher):
    expected = one_epoch(loader(photos, prefetcher), None)
    wrapped, mixup_fn = wrap_loader(loader(photos, prefetcher), None, (flow, pca), CONFIG, p=1.0)
    for (x, y), (x0, y0) in zip(one_epoch(wrapped, mixup_fn), expected, strict=True):
        assert torch.equal(y, y0)
        assert not torch.equal(x, x0)
        pixels = x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        assert -1e-5 < pixels.min() < pixels.max() < 1 + 1e-5
    assert wrapped.flow_mixup.counts == {"seen": 16, "augmented": 16, "rejected": 0, "no_partner": 0}


@BOTH
def test_order_of_augmentations(photos, flow, pca, prefetcher):
    options, mixup_fn = mixing(prefetcher)
    original = loader(photos, prefetcher, re_prob=0.5, re_mode="pixel", **options)
    wrapped, mixup_fn = wrap_loader(original, mixup_fn, (flow, pca), CONFIG)
    calls, augment = [], wrapped.augment
    assert isinstance(augment.erasing, RandomErasing)
    assert type(augment.mixup) is Mixup

    def spy(name, stage):
        def call(*batch):
            calls.append((name, *(tuple(part.shape) for part in batch)))
            return stage(*batch)

        call.pca = flow_axes
        return call

    flow_axes = augment.flow_mixup.pca
    augment.flow_mixup, augment.mixup = spy("flow", augment.flow_mixup), spy("mixup", augment.mixup)
    augment.erasing = spy("erasing", augment.erasing)
    x, y = next(iter(wrapped))
    if mixup_fn is not None:
        assert calls == []
        x, y = mixup_fn(x, y)
    assert calls == [("flow", (4, 3, 8, 8), (4,)), ("mixup", (4, 3, 8, 8), (4,)), ("erasing", (4, 3, 8, 8))]
    assert y.shape == (4, 3)


def test_mixup_and_erasing_are_removed_from_the_workers(photos, flow, pca):
    collate = FastCollateMixup(0.3, 0.7, prob=0.6, switch_prob=0.2, mode="pair", label_smoothing=0.1, num_classes=3)
    original = loader(photos, re_prob=0.5, collate_fn=collate)
    erasing = original.random_erasing
    wrapped, mixup_fn = wrap_loader(original, None, (flow, pca), CONFIG)
    assert mixup_fn is None
    assert original.loader.collate_fn is fast_collate
    assert original.random_erasing is None
    assert wrapped.random_erasing.probability == erasing.probability
    assert vars(wrapped.augment.mixup) == vars(collate)


def test_erasing_without_prefetcher_runs_after_flow_mixup(photos, flow, pca):
    original = loader(photos, False, re_prob=1.0, re_mode="pixel")
    assert isinstance(original.dataset.transform.transforms[-1], RandomErasing)
    wrapped, mixup_fn = wrap_loader(original, None, (flow, pca), CONFIG, p=1.0)
    assert not isinstance(original.dataset.transform.transforms[-1], RandomErasing)
    assert mixup_fn.erasing.probability == 1.0
    one_epoch(wrapped, mixup_fn)
    assert wrapped.flow_mixup.counts["augmented"] == 16


@BOTH
@pytest.mark.parametrize("size", [8, (8, 16)])
def test_attributes_are_those_of_the_wrapped_loader(photos, flow, pca, prefetcher, size):
    scheduled = {"input_size_choices": [8, 16], "batch_size_choices": [4, 2]} if size != 8 else {}
    original = loader(photos, prefetcher, re_prob=1.0, **scheduled)
    wrapped, mixup_fn = wrap_loader(original, None, (flow, pca), CONFIG, p=1.0)
    assert len(wrapped) == len(original)
    for name in ("dataset", "sampler", "batch_sampler"):
        assert getattr(wrapped, name) is getattr(original, name)
    shapes = {tuple(x.shape) for x, _ in one_epoch(wrapped, mixup_fn)}
    assert shapes == ({(4, 3, 8, 8)} if size == 8 else {(4, 3, 8, 8), (2, 3, 16, 16)})
    assert wrapped.flow_mixup.counts["augmented"] == wrapped.flow_mixup.counts["seen"]
    assert wrapped.augment.erasing is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = wrapped.nonsense


@BOTH
@pytest.mark.parametrize("workers", [0, 2])
def test_mixup_off_epoch(photos, flow, pca, prefetcher, workers):
    options, mixup_fn = mixing(prefetcher)
    original = loader(photos, prefetcher, num_workers=workers, persistent_workers=workers > 0, **options)
    wrapped, mixup_fn = wrap_loader(original, mixup_fn, (flow, pca), CONFIG)
    assert wrapped.mixup_enabled
    assert any((y.amax(1) < 1).any() for _, y in one_epoch(wrapped, mixup_fn))
    (wrapped if prefetcher else mixup_fn).mixup_enabled = False
    assert not wrapped.mixup_enabled
    for _, y in one_epoch(wrapped, mixup_fn):
        assert y.shape == (4, 3)
        assert (y.amax(1) == 1).all()


def test_mixup_enabled_without_mixup(photos, flow, pca):
    wrapped, _ = wrap_loader(loader(photos), None, (flow, pca), CONFIG)
    wrapped.mixup_enabled = True
    assert wrapped.mixup_enabled is False


def test_half_mode(photos, flow, pca):
    collate = FastCollateMixup(mode="half", num_classes=3)
    wrapped, _ = wrap_loader(loader(photos, collate_fn=collate), None, (flow, pca), CONFIG)
    x, y = next(iter(wrapped))
    assert x.shape == (2, 3, 8, 8)
    assert y.shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images(photos, flow, pca, dtype):
    options, _ = mixing(True)
    wrapped, _ = wrap_loader(loader(photos, img_dtype=dtype, re_prob=1.0, **options), None, (flow, pca), CONFIG, p=1.0)
    torch.manual_seed(0)  # a few orders of the images have one that is rejected
    x, y = next(iter(wrapped))
    assert x.dtype == dtype
    assert y.dtype == torch.float32
    assert wrapped.flow_mixup.counts["augmented"] == 4


def test_grey_images(tmp_path):
    for name in NAMES:
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), 40 * i).save(tmp_path / "train" / name / f"{i}.png")
    flow = make_flow((1, 8, 8))
    data = create_dataset("", root=tmp_path, split="train", is_training=True, input_img_mode="L")
    options = {**PLAIN_CROP, "color_jitter": None, "num_workers": 0, "is_training": True}
    original = create_loader(data, (1, 8, 8), 4, mean=MEAN, std=STD, device=torch.device("cpu"), **options)
    wrapped, _ = wrap_loader(original, None, (flow, make_pca(flow)), {**CONFIG, "input_size": (1, 8, 8)}, p=1.0)
    assert next(iter(wrapped))[0].shape == (4, 1, 8, 8)


def test_flow_as_folder_transform_or_none(photos, flow, pca, tmp_path):
    save_flow(flow, tmp_path / "flow", pca, class_names=list(NAMES))
    wrapped, _ = wrap_loader(loader(photos), None, tmp_path / "flow", CONFIG, p=0.25)
    assert wrapped.flow_mixup.sampler.policy.max_p == 0.25
    transform = FlowMixupTransform(flow, pca, mean=MEAN, std=STD)
    wrapped, _ = wrap_loader(loader(photos), None, transform, CONFIG)
    assert wrapped.flow_mixup is transform
    original, mixup_fn = loader(photos), Mixup(num_classes=3)
    assert wrap_loader(original, mixup_fn) == (original, mixup_fn)


def parsed(*values):
    """What the patch's line makes of ``--flow-aug VALUES``."""
    line = next(line for line in PATCH.read_text().splitlines() if "--flow-aug" in line)
    group = argparse.ArgumentParser()
    exec(line[1:], {"group": group, "FlowAugAction": FlowAugAction})
    return group.parse_args(["--flow-aug", *values] if values else []).flow_aug


@pytest.mark.parametrize(
    "flow",
    ["/runs/flow", "runs/lr=0.1", "runs/my flow", "2024", "None", "True", "007", "1e3", "(1, 2)", "'q'", "hf-hub:o/n"],
)
def test_the_flow_of_the_patch_stays_text(flow):
    assert parsed(f"flow={flow}", "p=0.5", "luminance=True", "partner=batch") == {
        "flow": flow,
        "p": 0.5,
        "luminance": True,
        "partner": "batch",
    }


def test_without_the_option_of_the_patch_nothing_changes():
    assert parsed() == {}
    assert wrap_loader([], None, **parsed()) == ([], None)


@pytest.mark.parametrize("values", [("runs/flow",), ("p=0.5",), ("flow=",), ("flow=a", "p"), ("flow=a", "=1")])
def test_values_that_are_no_pairs_end_with_a_message(values, capsys):
    with pytest.raises(SystemExit):
        parsed(*values)
    assert "expected flow=FOLDER and KEY=VALUE pairs" in capsys.readouterr().err


@pytest.mark.parametrize("flow", [None, 2024, 0.5, True, ["digits"]])
def test_a_flow_that_is_not_text_is_refused(photos, flow):
    with pytest.raises(ValueError, match=r"expected a folder or name as text.*FlowAugAction"):
        wrap_loader(loader(photos), None, flow, CONFIG, p=0.5)


def test_counts_are_logged_after_each_epoch(photos, flow, pca, caplog):
    wrapped, _ = wrap_loader(loader(photos), None, (flow, pca), CONFIG, p=1.0)
    with caplog.at_level(logging.INFO, "flowaug.timm"):
        list(wrapped)
    assert "augmented=16" in caplog.text


def naflex(photos):
    options = {"patch_size": 4, "is_training": True, "num_workers": 0, "device": torch.device("cpu")}
    return create_naflex_loader(dataset(photos), **options)


UNSUPPORTED = [
    (lambda p: (loader(p, dataset=AugMixDataset(dataset(p), 2), num_aug_splits=2), None), {}, "leave out --aug-splits"),
    (lambda p: (naflex(p), None), {}, "leave out --naflex-loader"),
    (lambda p: (loader(p, False), Mixup(multi_label=True)), {}, "multi-label"),
    (lambda p: (loader(p, collate_fn=FastCollateMixup()), Mixup()), {}, "would mix again"),
    (lambda p: (FlowLoader(loader(p), argparse.Namespace(erasing=None)), None), {}, "wrapped already"),
    (lambda p: (loader(p), None), {"data_config": None}, "data_config is missing"),
    (lambda p: (loader(p), None), {"data_config": {**CONFIG, "mean": (0.1, 0.1, 0.1)}}, "the loader normalises with"),
    (lambda p: (loader(p), None), {"class_names": ("ant", "cat", "bee")}, "class 1 is 'cat'"),
]


@pytest.mark.parametrize(("make", "options", "message"), UNSUPPORTED, ids=[row[2] for row in UNSUPPORTED])
def test_unsupported_training(photos, flow, pca, make, options, message):
    original, mixup_fn = make(photos)
    with pytest.raises(ValueError, match=message):
        wrap_loader(original, mixup_fn, (flow, pca), **{"data_config": CONFIG, **options})


def test_loader_that_has_started(photos, flow, pca):
    original = loader(photos, num_workers=1, persistent_workers=True)
    list(original)
    with pytest.raises(ValueError, match="before the first iteration"):
        wrap_loader(original, None, (flow, pca), CONFIG)


def test_transform_with_another_normalisation_or_more_options(photos, flow, pca):
    with pytest.raises(ValueError, match="create it with mean=data_config"):
        wrap_loader(loader(photos), None, FlowMixupTransform(flow, pca), CONFIG)
    with pytest.raises(ValueError, match="pass them when you create it"):
        wrap_loader(loader(photos), None, FlowMixupTransform(flow, pca, mean=MEAN, std=STD), CONFIG, p=0.1)


def test_class_order_differs_from_the_folder(photos, flow, pca):
    flow.class_names = ("ant", "bee", "cow")
    with pytest.raises(ValueError, match="class 2 is 'cat' in the data set but 'cow' in the flow"):
        wrap_loader(loader(photos), None, (flow, pca), CONFIG)
    wrap_loader(loader(photos), None, (flow, pca), CONFIG, class_names=None)


X, Y = torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)
BAD_BATCHES = [
    (({"patches": X}, Y), "--naflex-loader"),
    (([X, X], Y), "--aug-splits"),
    ((X, torch.zeros(4, 3)), r"labels are torch.float32 of shape \(4, 3\)"),
    ((X, torch.zeros(4)), "integer labels"),
    ((X, [Y, Y]), "labels are list"),
]


@pytest.mark.parametrize(("batch", "message"), BAD_BATCHES)
def test_bad_batches(photos, flow, pca, batch, message):
    _, mixup_fn = wrap_loader([batch], None, (flow, pca), CONFIG)
    with pytest.raises(ValueError, match=message):
        mixup_fn(*batch)
