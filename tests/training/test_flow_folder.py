"""What a training leaves: the mean loss of the steps since the last reading."""

import pytest
import torch
import yaml

from flowaug.training.flow_folder import model_card
from flowaug.training.logs import RunningMean


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
