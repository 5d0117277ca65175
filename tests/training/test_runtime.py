"""Numbers reach the tracker of Accelerate that ``--log-with`` names."""

import pytest
from accelerate import tracking

from flowaug.training import finetune
from flowaug.training import runtime as trackers

QUICK = ["--steps", "2", "--batch-size", "16", "--images-per-class", "4", "--cpu"]


class Notebook(tracking.GeneralTracker):
    """Stands for a tracker whose package is installed."""

    name, requires_logging_directory = "wandb", False
    rows, config = [], {}

    def __init__(self, run_name, **_):
        super().__init__()
        self.run_name = run_name

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        Notebook.config.update(values)

    def log(self, values, step=None, **_):
        Notebook.rows.append((step, values))


@pytest.fixture
def notebook(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Notebook)
    for module in (tracking, trackers):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [tracking.LoggerType.WANDB])
    return Notebook


def test_rows_and_options_reach_the_tracker(notebook, tmp_path):
    finetune.main(["--log-with", "wandb", *QUICK, "--output", str(tmp_path)])
    assert notebook.config["batch_size"] == 16
    step, values = notebook.rows[-1]
    assert step == 2
    assert {"train_loss", "top1"} <= values.keys()
