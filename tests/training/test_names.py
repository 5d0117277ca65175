"""Names of folders and classes that are not UTF-8, markup, or both, through both trainings."""

import json
import os
import subprocess
import sys

import pytest
import torch

from flowaug import load_flow
from flowaug.data import load_dataset
from flowaug.training import classifier, finetune
from tests.conftest import write_photos
from tests.training.test_scripts import QUICK, QUICK_FLOW, ROOT

NAMES = (os.fsdecode(b"caf\xe9"), "$x^2", "<b>|`", "a\nb", "Ä" * 40, "日本")


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / os.fsdecode(b"\xfcber <i>")
    try:
        root.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    return write_photos(root, NAMES)


def run(*arguments):
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flowaug", *map(os.fsencode, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)


def test_strange_names_lose_nothing(strange, tmp_path):
    small = ["--model", "mef_tiny", "--image-size", "8", *QUICK_FLOW]
    flow, output = tmp_path / "flow", tmp_path / "out"
    result = run("train-flow", "--data-dir", str(strange), *small, "--output", str(flow))
    assert result.returncode == 0, result.stderr
    result = run("finetune", "--data-dir", str(strange), *QUICK, "--flow-aug", str(flow), "--output", str(output))
    assert result.returncode == 0, result.stderr
    assert rb"\udcfcber <i>" in result.stdout
    classes = sorted(NAMES)
    assert load_flow(flow).class_names == tuple(classes) == load_dataset(data_dir=strange).class_names
    assert json.loads((output / "config.json").read_text(encoding="utf-8"))["label_names"] == classes
    assert (output / "augmented.png").is_file()
    again = run("finetune", "--data-dir", str(strange), *QUICK, "--flow-aug", str(flow), "--output", str(output))
    assert b"finished already" in again.stdout


def test_weights_are_written_before_anything_else(photos, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("no JSON")

    monkeypatch.setattr(classifier, "write_json", fail)
    options = ["--data-dir", str(photos), *QUICK, "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="no JSON"):
        finetune.main(options)
    assert (tmp_path / "model.safetensors").is_file()
    monkeypatch.undo()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
    finetune.main(options)
    assert (tmp_path / "metrics.json").is_file()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), ("ant", "bee"))
