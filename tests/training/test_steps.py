"""Tests of single training steps, of what is written at the end, and of the plan's figures."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flowaug.data.transforms import Preprocess
from flowaug.pixels import enlarge
from flowaug.training import finetune, train_flow
from flowaug.training.classifier import accuracy, create_loss
from flowaug.training.dry_run import cost_per_image
from flowaug.training.options.classifier import ClassifierTransformOptions
from flowaug.training.pipeline import create_pipeline

QUICK = ["--cpu", "--workers", "0", "--batch-size", "16"]
CLASSIFIER = [*QUICK, "--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--hflip", "0"]
FLOW = [*QUICK, "--model", "mef_tiny", "--model-kwargs", "hidden=8", "--rank", "3"]


@pytest.fixture
def gradients():
    """The gradients (flattened) that each optimizer step receives."""
    steps = []

    def keep(optimizer, _args, _kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        steps.append(torch.cat([p.grad.flatten() for p in parameters]).clone())

    handle = register_optimizer_step_pre_hook(keep)
    yield steps
    handle.remove()


@pytest.mark.parametrize(("main", "options"), [(finetune.main, CLASSIFIER), (train_flow.main, FLOW)])
def test_gradients_are_clipped_to_the_norm_of_the_option(main, options, gradients, tmp_path):
    for name, clip in (("free", "1000000"), ("clipped", "0.001")):
        main([*options, "--steps", "2", "--clip-grad", clip, "--output", str(tmp_path / name)])
    norms = [gradient.norm().item() for gradient in gradients]
    assert min(norms[:2]) > 0.01
    assert norms[2:] == pytest.approx([0.001] * 2, rel=1e-2)
    torch.testing.assert_close(gradients[2] / norms[2], gradients[0] / norms[0], rtol=1e-3, atol=1e-5)


def test_the_gradient_of_an_accumulated_step_is_the_mean_over_its_batches(gradients, tmp_path):
    options = [*CLASSIFIER, "--model", "test_vit", "--steps", "1", "--clip-grad", "1000000", "--hflip", "0"]
    options += ["--scale", "1", "1", "--ratio", "1", "1"]
    finetune.main([*options, "--batch-size", "24", "--output", str(tmp_path / "whole")])
    finetune.main([*options, "--batch-size", "8", "--grad-accum-steps", "3", "--output", str(tmp_path / "parts")])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mixes", [[], ["--mixup", "0.2"]])
def test_label_smoothing_reaches_the_loss(mixes, tmp_path):
    losses = []
    for smoothing in ("0", "0.5"):
        output = tmp_path / smoothing
        finetune.main([*CLASSIFIER, *mixes, "--steps", "1", "--smoothing", smoothing, "--output", str(output)])
        losses.append(json.loads((output / "metrics.json").read_text())["train_loss"])
    assert losses[0] != losses[1]


def test_losses_and_targets_are_smoothed_once():
    logits, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0, 1])
    expected = F.cross_entropy(logits, y, label_smoothing=0.2)
    torch.testing.assert_close(create_loss(False, 0.2)(logits, y), expected)
    transforms = ClassifierTransformOptions(mixup=1e-9, smoothing=0.2)  # weights of almost 0 or 1: labels stay hard
    pipeline = create_pipeline(Preprocess((3, 8, 8), (0.5,) * 3, (0.5,) * 3), transforms, 4, torch.device("cpu"))
    _, targets = pipeline(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), y, 0)
    torch.testing.assert_close(targets.sort(1).values[0], torch.tensor([0.05, 0.05, 0.05, 0.85]))
    soft = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(create_loss(True, 0.2)(logits, targets), soft)


def test_top_1_and_top_5_count_ranks():
    ranks = torch.tensor([0, 0, 1, 4, 5, 7])  # rank of the label among 8 classes
    logits = -torch.arange(8.0).repeat(6, 1)
    images = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)

    class Fixed(torch.nn.Module):
        def forward(self, x):
            return logits[: len(x)]

    values = accuracy(Fixed(), [(images, ranks)], Preprocess((1, 4, 4), (0.5,), (0.5,)), torch.device("cpu"))
    assert values == {"top1": 2 / 6, "top5": 4 / 6, "images": 6}


def test_the_written_configuration_is_that_of_the_model(tmp_path):
    model = "resnet10t"  # timm's mean and standard deviation of ImageNet
    options = [*QUICK, "--model", model, "--no-pretrained", "--steps", "1", "--img-size", "32"]
    finetune.main([*options, "--output", str(tmp_path)])
    written = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    theirs = timm.create_model(f"local-dir:{tmp_path}").default_cfg
    grey = timm.create_model(model).default_cfg
    assert written["mean"] == pytest.approx([sum(grey["mean"]) / 3])
    assert written["std"] != written["mean"]
    assert list(theirs["std"]) == pytest.approx(written["std"])


def test_the_averaged_weights_are_evaluated_and_written(tmp_path, monkeypatch):
    evaluated, name = {}, "fc.weight"

    def keep(model, *arguments):
        evaluated.update({key: value.clone() for key, value in model.state_dict().items()})
        return accuracy(model, *arguments)

    monkeypatch.setattr(finetune, "accuracy", keep)
    runs = {"2": [], "3": [], "averaged": ["--steps", "3", "--model-ema", "--model-ema-decay", "0.5"]}
    weights = {}
    for steps, ema in runs.items():
        length = ["--steps", "3" if ema else steps, "--sched", "step", "--decay-rate", "1", "--warmup-ratio", "0"]
        finetune.main([*CLASSIFIER, *length, *ema, "--output", str(tmp_path / steps)])
        weights[steps] = load_file(tmp_path / steps / "model.safetensors")
    assert weights["averaged"].keys() == evaluated.keys()
    assert all(torch.equal(evaluated[key], value) for key, value in weights["averaged"].items())
    assert weights["averaged"][name].sub(weights["3"][name]).abs().max() > 1e-6
    decay = 1 - 2 ** (-2 / 3)  # timm warms the decay up: 0 at the first two steps
    torch.testing.assert_close(weights["averaged"][name], decay * weights["2"][name] + (1 - decay) * weights["3"][name])


def test_the_plan_has_the_memory_and_the_time_of_the_cost(tmp_path, capsys):
    options = [*CLASSIFIER, "--model", "resnet50", "--steps", "10", "--output", str(tmp_path)]
    finetune.main([*options, "--dry-run"])
    text = capsys.readouterr().out
    model = timm.create_model("resnet50", num_classes=10, in_chans=1)
    cost = cost_per_image(model, (torch.rand(2, 1, 32, 32),))
    memory = 16 * sum(p.numel() for p in model.parameters()) + 16 * cost.activations
    assert float(re.search(r"about (\d+) MiB", text)[1]) == pytest.approx(memory / 2**20, rel=0.02)
    assert float(re.search(r": (\S+) FLOP at", text)[1]) == pytest.approx(3 * cost.flops * 10 * 16, rel=0.05)


def test_changes_are_enlarged_by_bicubic_interpolation():
    step = torch.zeros(1, 1, 8, 8)
    step[..., 4:] = 1
    expected = F.interpolate(step, (32, 32), mode="bicubic", align_corners=False)
    torch.testing.assert_close(enlarge(step, (32, 32)), expected)
    assert expected.min() < -0.01  # bilinear interpolation has no overshoot
