"""Where the class Gaussians of a training come from: every estimator, every ablation, from the command line."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch

from flowaug import create_flow, load_flow
from flowaug.evaluation.oracle import Oracle
from flowaug.flows.checkpoint import WEIGHTS
from flowaug.flows.passes import ImageTable
from flowaug.training import finetune, train_flow
from flowaug.training.gaussian_schedule import split_by_class
from tests.conftest import flow_options

QUICK = ["--images-per-class", "12", "--steps", "8", "--eval-every", "8", "--batch-size", "32", "--rank", "2", "--cpu"]
SOLVED = ["--solve-at", "4"]
GLEM = ["--estimator", "glem", "--glem-merge-at", "4", "--glem-every", "2"]
ABLATIONS = {
    "means and variances": [*SOLVED, "--learn", "both", "--kld-pi", "mean", "--kld-alpha", "1"],
    "one variance per class": [*SOLVED, "--learn", "both", "--isotropic"],
    "gradient descent": [*SOLVED, "--estimator", "gradient", "--lr-policy", "superlinear", "--gaussian-lr", "0.05"],
    "the data's own": [*SOLVED, "--estimator", "data"],
    "one Gaussian for all": ["--estimator", "unit"],
    "glem": GLEM,
    "glem, divergence off": [*GLEM, "--kld-weight", "0"],
    "glem, clamped": [*GLEM, "--clamp-variances"],
    "glem, means": [*GLEM, "--learn", "means"],
    "glem, variances": [*GLEM, "--learn", "variances"],
    "glem, random start": [*GLEM, "--glem-start", "random"],
}
MOVES = {
    "gradient descent": {"mean"},
    "glem, variances": {"variance"},
    "glem, means": {"mean"},
    "one Gaussian for all": set(),
}


def run(folder, *options):
    train_flow.main([*QUICK, *options, "--output", str(folder)])
    return load_flow(folder), json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_estimator_trains(name, tmp_path):
    flow, metrics = run(tmp_path, *ABLATIONS[name])
    assert ("class_gaussians" in metrics) == (name != "one Gaussian for all")
    gaussians = {"mean": flow.gaussians.mean, "variance": flow.gaussians.variance}
    differ = {k for k, v in gaussians.items() if (v - v[:1]).abs().max() > 1e-6}  # between the classes
    assert differ == MOVES.get(name, {"mean", "variance"})


def test_fixed_point_keeps_unit_variances(tmp_path):
    flow, metrics = run(tmp_path, *SOLVED)
    assert (flow.gaussians.variance == 1).all()
    assert metrics["class_gaussians"]["converged"]


def test_posterior_weight_trades_likelihood_for_classification(tmp_path):
    options = ["--images-per-class", "60", "--steps", "50", "--solve-at", "10", "--lr", "0.02", "--ema-decay", "0.9"]
    likelihood, hybrid = (
        run(tmp_path / weight, *options, "--kld-weight", "30", "--posterior-weight", weight)[1] for weight in ("0", "4")
    )
    assert hybrid["nf_acc"] > likelihood["nf_acc"]
    assert hybrid["bits_per_dim"] > likelihood["bits_per_dim"]


def test_the_posterior_learns_what_a_teacher_says(tmp_path):
    """A teacher of random weights calls nearly all images alike: the flow then classifies worse than by labels."""
    teacher = tmp_path / "teacher"
    options = ["--model", "test_resnet", "--steps", "1", "--lr", "0", "--images-per-class", "12", "--cpu"]
    finetune.main([*options, "--no-pretrained", "--img-size", "32", "--output", str(teacher)])
    options = ["--images-per-class", "60", "--steps", "50", "--solve-at", "10", "--lr", "0.02", "--ema-decay", "0.9"]
    options += ["--kld-weight", "30", "--posterior-weight", "40"]
    labels = run(tmp_path / "labels", *options)[1]
    taught = run(tmp_path / "taught", *options, "--teacher", str(teacher))[1]
    assert taught["nf_acc"] < labels["nf_acc"] - 0.1


def test_several_teachers_take_turns():
    """The loss is linear in soft labels, so that on average the flow learns the teachers' mean."""
    teachers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        teachers.append(Oracle.from_timm(timm.create_model("test_resnet", num_classes=3), "random", size=32))
    options = flow_options("--hflip", "0.5")
    training = SimpleNamespace(options=options, dtype=torch.float32, teachers=teachers)
    x = torch.rand(4, 3, 32, 32)
    said = [train_flow.FlowTraining.soft_labels(training, step, x) for step in range(3)]
    one, other = (teacher.probabilities(x, mirrored=True) for teacher in teachers)
    assert not torch.allclose(one, other)
    assert all(torch.equal(*pair) for pair in zip(said, (one, other, one), strict=True))
    flow, y = create_flow("mef_tiny", event_shape=(3, 32, 32), num_classes=3, hidden=8), torch.tensor([0, 1, 2, 2])
    flow.gaussians.mean.normal_()
    loss, other_loss = (flow(x, y, 2.0, soft).sum() for soft in (one, other))
    torch.testing.assert_close(flow(x, y, 2.0, (one + other) / 2).sum(), (loss + other_loss) / 2)


def test_glem_resumes_to_the_same_weights(tmp_path, killed_at):
    run(tmp_path / "whole", *GLEM)
    killed_at(3, lambda options: run(tmp_path / "cut", *options), [*GLEM, "--save-every", "1"])
    run(tmp_path / "cut", *GLEM, "--save-every", "1")
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--estimator", "data", "--kld-weight", "3"], "does not use --kld-weight"),
        (["--estimator", "glem", "--solve-at", "3"], "does not use --solve-at"),
        (["--posterior-weight", "-1"], "--posterior-weight is '-1'; expected a number of at least 0"),
        (["--posterior-weight", "nan"], "--posterior-weight is 'nan'; expected a number"),
        (["--posterior-weight", "1", "--estimator", "unit"], "--posterior-weight needs classes"),
        (["--teacher", "test_resnet", "other"], "--teacher needs --posterior-weight"),
        (["--teacher", "nowhere", "--posterior-weight", "1"], "the reference classifier 'nowhere' cannot be loaded"),
        (["--glem-fraction", "0.2"], "--estimator fpi does not use --glem-fraction"),
        (["--estimator", "glem", "--glem-fraction", "1.5"], "expected a number of more than 0 and less than 1"),
        (["--estimator", "glem", "--kld-weight", "-1"], "--kld-weight is '-1'; expected a number of at least 0"),
        (["--estimator", "glem", "--images-per-class", "3"], "class 0 has 3 images; GLEM needs at least 4"),
    ],
)
def test_options_that_disagree(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train_flow.main([*QUICK, *options, "--output", str(tmp_path)])


def test_split_selects_a_fraction_of_every_class():
    targets = torch.arange(60) % 3
    table = ImageTable(torch.arange(60, dtype=torch.uint8)[:, None, None, None], targets, 3)
    held = split_by_class(table, 0.1, seed=0)
    first, second = table.subset(~held), table.subset(held)
    assert second.targets.bincount().tolist() == [2, 2, 2]
    assert sorted(first.images.flatten().tolist() + second.images.flatten().tolist()) == list(range(60))
    assert torch.equal(first.images.flatten() % 3, first.targets)
