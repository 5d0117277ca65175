"""Trackers and mixed precision of Accelerate."""

import json

import pytest
import torch
from accelerate import tracking
from accelerate.state import AcceleratorState

from flowaug.training import finetune, train_flow
from flowaug.training import runtime as trackers
from tests.conftest import flow_options

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


@pytest.fixture
def configured(monkeypatch):
    """Accelerate as ``accelerate launch --mixed_precision bf16`` configures it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def logit_dtypes(monkeypatch):
    """Data types of the classifier's convolutions in training."""
    seen, forward = set(), torch.nn.Conv2d.forward

    def recorded(self, x):
        y = forward(self, x)
        seen.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.Conv2d, "forward", recorded)
    return seen


CLASSIFIER = [*QUICK, "--workers", "0", "--model", "test_resnet", "--no-pretrained", "--img-size", "32"]


@pytest.mark.usefixtures("configured")
@pytest.mark.parametrize(
    ("given", "precision", "dtype"),
    [([], "bf16", torch.bfloat16), (["--amp", "no"], "no", torch.float32)],
    ids=["configured", "option"],
)
def test_accelerates_mixed_precision_holds_unless_an_option_says_otherwise(
    given, precision, dtype, logit_dtypes, tmp_path, capsys
):
    finetune.main([*CLASSIFIER, *given, "--output", str(tmp_path)])
    assert f"mixed precision {precision}" in capsys.readouterr().out
    assert dtype in logit_dtypes
    assert (torch.bfloat16 in logit_dtypes) == (dtype == torch.bfloat16)
    assert json.loads((tmp_path / "run.json").read_text())["options"]["amp"] == precision


FLOW = [*QUICK, "--workers", "0", "--rank", "3", "--solve-at", "1"]


@pytest.mark.parametrize("through", ["environment", "accelerator"])
def test_a_flow_trains_in_float32_whatever_accelerate_is_configured_with(through, tmp_path, capsys, request):
    train_flow.main([*FLOW, "--output", str(tmp_path / "plain")])
    request.getfixturevalue("configured")
    capsys.readouterr()
    if through == "environment":
        train_flow.main([*FLOW, "--output", str(tmp_path / "mixed")])
    else:  # as `flowaug finetune --amp bf16 --flow-aug` does
        options = flow_options(*FLOW, "--output", str(tmp_path / "mixed"))
        train_flow.train_flow(options, trackers.create_accelerator(True, None, tmp_path, "bf16"))
    assert capsys.readouterr().out.count("mixed precision bf16 does not apply to the flow") == 1
    plain, mixed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "mixed"))
    assert plain == mixed
