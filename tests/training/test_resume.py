"""Interrupted and finished runs: signals, damaged states, changed data and options, finished folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flowaug.flows.checkpoint import WEIGHTS
from flowaug.training import finetune, train_flow
from flowaug.training.resume import FINISHED, PREVIOUS_STATE, STATE, TrainingState, load_state, save_state

FLOW = ["--model", "mef_tiny", "--image-size", "8", "--steps", "6", "--batch-size", "8", "--rank", "2", "--cpu"]
CLASSIFIER = [
    "--model",
    "test_resnet",
    "--no-pretrained",
    "--img-size",
    "32",
    "--steps",
    "5",
    "--batch-size",
    "6",
    "--cpu",
]
COMMANDS = [(train_flow.main, FLOW), (finetune.main, CLASSIFIER)]


@pytest.fixture
def photos(tmp_path):
    """Two classes of RGB images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (9, 9, 3), dtype=np.uint8) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


class Counter:
    """The smallest part of a training."""

    def __init__(self, value=0.0):
        self.value = torch.tensor([value])

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"].reshape(1)


def state_of(folder, part, **changes):
    return TrainingState(folder, {"options": {"lr": 1.0}, "training set": "abc", **changes}, part)


def saved(folder, steps=(3, 4)):
    part = Counter()
    for step in steps:
        part.value = torch.tensor([float(step)])
        state_of(folder, part).save(step)


@pytest.mark.parametrize(("main", "options"), COMMANDS)
def test_a_finished_run_is_not_trained_again_nor_overwritten(photos, tmp_path, capsys, main, options):
    command = ["--data-dir", str(photos), *options, "--workers", "0", "--output", str(tmp_path / "out")]
    main(command)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert FINISHED in files
    assert STATE not in files
    capsys.readouterr()
    main(command)
    assert "finished already" in capsys.readouterr().out
    for changed, name in ((["--lr", "0.5"], "option lr"), (["--resume", "never", "--seed", "3"], "option seed")):
        with pytest.raises(SystemExit, match=f"holds a finished run with another {name}; choose another --output"):
            main([*command, *changed])
    (photos / "train" / "ant" / "0.png").write_bytes((photos / "train" / "bee" / "0.png").read_bytes() + b" ")
    with pytest.raises(SystemExit, match="holds a finished run with another training set"):
        main(command)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    main([*command, "--overwrite"])
    assert (tmp_path / "out" / FINISHED).read_bytes() != files[FINISHED]


@pytest.mark.parametrize(("main", "options"), COMMANDS)
def test_an_interrupted_run_on_other_data_is_refused(photos, tmp_path, killed_at, main, options):
    command = ["--data-dir", str(photos), *options, "--workers", "0", "--save-every", "1"]
    command += ["--output", str(tmp_path / "out")]
    killed_at(3, main, command)
    for split in ("train", "val"):
        (photos / split / "ant").rename(photos / split / "zebra")
    with pytest.raises(SystemExit, match="belongs to a run with another training set, validation set; undo the change"):
        main(command)


def test_a_flow_of_the_same_name_with_other_weights_is_noticed(photos, tmp_path, killed_at):
    for seed in ("0", "1"):
        output = ["--seed", seed, "--output", str(tmp_path / seed)]
        train_flow.main(["--data-dir", str(photos), *FLOW, "--workers", "0", *output])
    shutil.copytree(tmp_path / "0", tmp_path / "flow")
    command = ["--data-dir", str(photos), *CLASSIFIER, "--workers", "0", "--flow-aug", str(tmp_path / "flow")]
    command += ["--save-every", "1", "--output", str(tmp_path / "out")]
    killed_at(3, finetune.main, command)
    shutil.copytree(tmp_path / "1", tmp_path / "flow", dirs_exist_ok=True)
    with pytest.raises(SystemExit, match="belongs to a run with another flow;"):
        finetune.main(command)


def test_states_come_back_and_the_one_before_is_kept(tmp_path):
    saved(tmp_path)
    part = Counter()
    assert state_of(tmp_path, part).restore(10) == 4
    assert part.value == 4
    assert load_state(tmp_path / PREVIOUS_STATE)["step"] == 3


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def change_tree(old, new):
    def change(path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        metadata["tree"] = metadata["tree"].replace(old, new)
        save_file(load_file(path), path, metadata)

    return change


DAMAGE = {
    "one bit": flip_a_bit,
    "truncated": cut,
    "empty": lambda path: path.write_bytes(b""),
    "no state": lambda path: path.write_bytes(b"no safetensors"),
    "another step": change_tree('"step", {"value": ', '"step", {"value": 9'),
    "no tree": change_tree("[", ""),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, damage):
    saved(tmp_path)
    damage(tmp_path / STATE)
    part, messages = Counter(), []
    assert state_of(tmp_path, part).restore(10, messages.append) == 3
    assert part.value == 3
    assert bool(messages) == (tmp_path / STATE).exists()
    damage(tmp_path / PREVIOUS_STATE)
    if (tmp_path / STATE).exists():
        with pytest.raises(ValueError, match="pass --resume never to start from the beginning"):
            state_of(tmp_path, part).restore(10, messages.append)


def test_a_state_beyond_the_end_or_of_other_parts_is_damaged(tmp_path):
    saved(tmp_path, steps=(4,))
    with pytest.raises(ValueError, match="after step 4 of 2"):
        state_of(tmp_path, Counter()).restore(2, lambda _: None)
    with pytest.raises(ValueError, match="does not fit this run"):
        state_of(tmp_path, torch.nn.Linear(1, 1)).restore(10, lambda _: None)


def test_another_number_of_processes_is_refused(tmp_path):
    state_of(tmp_path, Counter(), **{"number of processes": 2}).save(1)
    with pytest.raises(ValueError, match="another number of processes"):
        state_of(tmp_path, Counter(), **{"number of processes": 1}).restore(10)


def test_states_keep_numbers_texts_and_tensors_of_any_shape(tmp_path):
    state = {"a": [1, 2.5, None, "x"], "b": {"c": torch.tensor(3), "d": torch.zeros(0, 2, dtype=torch.bfloat16)}}
    save_state(tmp_path / STATE, state)
    back = load_state(tmp_path / STATE)
    assert back["a"] == state["a"]
    assert back["b"]["c"] == 3
    assert back["b"]["d"].shape == (0, 2)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_state_and_the_run_resumes_to_the_same_weights(photos, tmp_path, signum, code):
    options = ["finetune", "--data-dir", str(photos), *CLASSIFIER, "--steps", "60", "--workers", "0", "--hflip", "0.5"]
    command = [sys.executable, "-m", "flowaug", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = [*command, "--output", str(tmp_path / "whole")]
    subprocess.run(whole, env=environment, check=True, capture_output=True)
    cut_run = [*command, "--output", str(tmp_path / "cut")]
    process = subprocess.Popen(cut_run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "cut" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run the same command again to resume" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    again = subprocess.run(cut_run, env=environment, check=True, capture_output=True, text=True)
    assert "resuming" in again.stdout
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    rows = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("cut", "whole")]
    assert json.loads(rows[0].splitlines()[-1]) == json.loads(rows[1].splitlines()[-1])
