"""What a training leaves: the mean loss of the steps since the last reading, a warning of a flow without classes."""

import json

import pytest
import torch
import yaml

from flowaug.training import train_flow
from flowaug.training.flow_folder import model_card
from flowaug.training.logs import RunningMean, chance_warning


def mean_of(*losses):
    mean = RunningMean(torch.device("cpu"))
    for loss in losses:
        mean.update(torch.tensor(loss))
    return mean


def test_a_mean_begins_anew_when_it_was_read():
    mean = mean_of(4.0, 2.0)
    assert mean.read() == 3.0
    mean.update(torch.tensor(0.5))
    assert mean.read() == 0.5


def test_a_resumed_mean_goes_on_from_the_losses_not_yet_read():
    resumed = RunningMean(torch.device("cpu"))
    resumed.load_state_dict(mean_of(4.0, 2.0).state_dict())
    resumed.update(torch.tensor(0.0))
    assert resumed.read() == 2.0


HOSTILE = [
    "x</title><script>alert(1)</script>",
    "a\n# Owned",
    "a: {b: [c",
    "---\n!!python/object:os.system x",
    "x\u2028---",
    "caf\udce9",
    "[click](http://a/)",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_cannot_change_the_model_card(flow, pca, name):
    card = model_card(flow, pca, name, {"data_dir": name}, {name: 0.5})
    card.encode()
    start, facts, body = card.split("---\n", 2)
    assert start == ""
    assert set(yaml.safe_load(facts)) == {"library_name", "model_name", "tags"}
    if name != "caf\udce9":
        assert yaml.safe_load(facts)["model_name"] == f"Flow for {name}"
    text = body.split("```json")[0]
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert len(headings) == 3
    assert "<script>" not in text
    assert "[click]" not in text


@pytest.mark.parametrize(
    ("accuracy", "counts", "warns"),
    [
        (0.1, [100] * 10, True),
        (0.115, [100] * 10, True),  # within two standard errors of 0.1
        (0.13, [100] * 10, False),
        (0.9, [90, 10], True),  # always the frequent class
        (0.97, [90, 10], False),
        (0.6, [3, 3, 3], True),  # nine images cannot tell
        (1.0, [3, 3, 3], False),
        (0.5, [5, 0], True),  # a class without validation images
    ],
)
def test_accuracy_at_chance_is_warned_of(accuracy, counts, warns):
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert bool(chance_warning(accuracy, targets, len(counts))) == warns


@pytest.mark.parametrize(("length", "warns"), [(["--steps", "2"], True), (["--quick"], False)])
def test_a_flow_that_has_not_learned_the_classes_says_so(length, warns, tmp_path, capsys):
    options = [*length, "--estimator", "unit"] if warns else length
    train_flow.main([*options, "--rank", "2", "--cpu", "--output", str(tmp_path)])
    metrics, printed = json.loads((tmp_path / "metrics.json").read_text()), capsys.readouterr().out
    assert ("warning" in metrics) == ("is not above chance" in printed) == warns
    if warns:
        assert metrics["warning"].startswith(f"NF-Acc is {metrics['nf_acc']:.3f} on 359 validation images")
        assert "is not above chance" in (tmp_path / "README.md").read_text()
