"""Tests that ``finetune`` evaluates as timm does, that an epoch is one pass, and that images get the input size."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config

from flowaug.data import load_dataset
from flowaug.data.transforms import DataConfig, eval_transform, train_transform
from flowaug.mixup.offline import AugmentedCopies
from flowaug.training import finetune
from flowaug.training.classifier import StepPlan, create_classifier
from flowaug.training.options import ClassifierOptions, ClassifierTrainingOptions, FinetuneOptions
from flowaug.training.pipeline import loaded_size

OWN = {"own": [], "0.875": ["--crop-pct", "0.875"], "squash": ["--crop-mode", "squash", "--interpolation", "bilinear"]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of images of mixed sizes and shapes; the first file is a thumbnail."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(12):
                height, width = (3, 3) if i == 0 else rng.integers(20, 90, 2)
                pixels = rng.integers(0, 200, (height, width, 3)) + 30 * label
                Image.fromarray(pixels.astype(np.uint8)).resize((int(width), int(height))).save(folder / f"{i:02d}.png")
    return root


def accuracy_by_timm(folder, photos):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    data = create_dataset("", root=str(photos / "val"), transform=transform)
    with torch.no_grad():
        return [int(model(x[None]).argmax(1)) == y for x, y in data]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves image files open
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("crop", OWN.values(), ids=OWN)
def test_timm_gets_the_same_accuracy_from_the_written_folder(photos, tmp_path, crop):
    options = ["--model", "test_resnet", "--no-pretrained", "--steps", "8", "--batch-size", "8", "--img-size", "48"]
    options += ["--data-dir", str(photos), "--cpu", "--workers", "0", "--lr", "0.01", *crop]
    finetune.main([*options, "--output", str(tmp_path)])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    right = accuracy_by_timm(tmp_path, photos)
    assert metrics["images"] == len(right) == 24
    assert metrics["top1"] == sum(right) / len(right)


@pytest.mark.parametrize(
    ("model", "crop_pct", "crop_mode"),
    [
        ("tf_efficientnet_lite0", 0.875, "center"),
        ("resnet18.a1_in1k", 0.95, "center"),
        ("eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", 1.0, "squash"),
    ],
)
def test_the_data_configuration_is_that_of_the_model(model, crop_pct, crop_mode):
    with torch.device("meta"):
        theirs = resolve_data_config({}, model=timm.create_model(model))
    _, config = create_classifier(ClassifierOptions(model=model, pretrained=False), 2, 3)
    assert (config.crop_pct, config.crop_mode) == (crop_pct, crop_mode) == (theirs["crop_pct"], theirs["crop_mode"])
    assert (config.mean, config.std, config.interpolation) == (theirs["mean"], theirs["std"], theirs["interpolation"])
    assert config.input_size == theirs["input_size"]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))
    x = (eval_transform(config)(image).float() / 255 - torch.tensor(config.mean)[:, None, None]) / torch.tensor(
        config.std
    )[:, None, None]
    torch.testing.assert_close(x, create_transform(**theirs)(image))


def test_one_small_file_does_not_shrink_the_others(photos):
    data = load_dataset(data_dir=photos)
    assert data.image_size == (3, 3)
    assert loaded_size(DataConfig((3, 48, 48), (0.5,) * 3, (0.5,) * 3), data) == (48, 48)


def test_small_images_in_memory_are_loaded_as_they_are():
    config, digits = DataConfig((1, 32, 32), (0.5,), (0.5,)), load_dataset("digits")
    assert loaded_size(config, digits) == (8, 8)
    assert loaded_size(DataConfig((1, 4, 4), (0.5,), (0.5,)), digits) == (4, 4)
    assert AugmentedCopies.fixed_size.fget(type("Copies", (), {"dataset": digits})) == (8, 8)


def test_an_option_of_the_transform_changes_only_what_it_names():
    """Colour jitter and auto-augment do not switch on random crops."""
    corners = np.zeros((20, 30, 3), np.uint8)
    corners[0, 0] = corners[-1, -1] = 255
    image = Image.fromarray(corners).resize((120, 80), Image.Resampling.NEAREST)
    transforms = FinetuneOptions.from_values({"scale": None, "ratio": None, "hflip": 0, "color_jitter": 0.1}).transforms
    out = train_transform((20, 20), 3, transforms)(image).float()
    assert out[:, 0, 0].min() > 100
    assert out[:, -1, -1].min() > 100


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_an_epoch_is_a_pass_whatever_the_accumulation(accumulation):
    plan = StepPlan(ClassifierTrainingOptions(epochs=4, grad_accum_steps=accumulation), batches=3)
    assert plan.passes() == 4
    assert sum(plan.batches_of(step) for step in range(plan.steps)) == 12
    assert max(plan.batches_of(step) for step in range(plan.steps)) == min(accumulation, 3)
    evaluated = [done for done in range(1, plan.steps + 1) if plan.is_evaluated(done)]
    assert [plan.batches_before(done) for done in evaluated] == [3, 6, 9, 12]


@pytest.mark.parametrize("accumulation", ["1", "2", "4"])
def test_each_image_is_visited_once_per_epoch(photos, tmp_path, accumulation):
    options = ["--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--epochs", "3", "--batch-size", "8"]
    options += ["--data-dir", str(photos), "--cpu", "--workers", "0", "--grad-accum-steps", accumulation]
    options += ["--flow-aug", "--recipe", "default", "--quick"]
    options = [option for option in options if option not in ("--epochs", "3")] + ["--epochs", "3"]
    finetune.main([*options, "--output", str(tmp_path / accumulation)])
    metrics = json.loads((tmp_path / accumulation / "metrics.json").read_text())
    assert metrics["flow_aug"]["seen"] == 3 * 24
