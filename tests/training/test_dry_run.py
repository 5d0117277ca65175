import json
from pathlib import Path

import torch
from torch import nn

from flowaug.training import finetune, train_flow
from flowaug.training.dry_run import copies_memory, cost_per_image, measured_speed


def test_cost_of_a_known_network():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    cost = cost_per_image(model, (torch.rand(4, 10),))
    assert cost.flops == 2 * (10 * 20 + 20 * 5)
    assert cost.activations == 4 * (10 + 20)  # the input, and ReLU's result, which both need; weights do not count
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_cost_grows_with_the_network_not_with_the_batch():
    small, large = (nn.Conv2d(3, c, 3, padding=1) for c in (4, 8))
    costs = [cost_per_image(m, (torch.rand(b, 3, 8, 8),)).flops for m in (small, large) for b in (2, 6)]
    assert costs[0] == costs[1] == costs[2] / 2 == costs[3] / 2


def test_speed_is_positive():
    assert measured_speed(torch.device("cpu"), torch.float32, 0.01) > 1e6


def test_dry_run_of_a_flow_prints_its_plan_and_writes_nothing(tmp_path, capsys):
    train_flow.main(["--dry-run", "--cpu", "--output", str(tmp_path / "out")])
    text = capsys.readouterr().out
    for part in (
        "1438 training and 359 validation images, 10 classes; the first image is 8×8×1",
        "mef_tiny",
        "λ' = 10",
        "1400 steps of 64",
        "MiB per process",
        "FLOP",
    ):
        assert part in text
    assert not Path(tmp_path / "out").exists()


def test_dry_run_of_a_classifier_says_which_flow(tmp_path, capsys):
    output = ["--cpu", "--output", str(tmp_path / "out")]
    finetune.main(["--dry-run", "--model", "eva02_tiny_patch14_224", "--no-pretrained", "--flow-aug", *output])
    text = capsys.readouterr().out
    assert "digits, mef_tiny, images (1, 8, 8); p = 0.5, alpha = 0.3, one weight per principal component" in text
    assert "eva02_tiny_patch14_224, 5.43 M parameters, input (1, 224, 224)" in text
    finetune.main(["--dry-run", "--images-per-class", "5", "--flow-aug", *output])
    assert "trained first: mef_tiny, at most 1400 steps" in capsys.readouterr().out
    finetune.main(["--dry-run", *output])
    assert "flow       none" in capsys.readouterr().out
    assert not Path(tmp_path / "out").exists()


def test_copies_and_the_images_themselves_take_the_size_of_the_flows_images():
    assert copies_memory(3, 2**20, (4, 16, 16)) == "; --flow-aug-copies takes 4.0 GiB of memory"
    assert copies_memory(None, 2**20, (4, 16, 16)) == ""


def test_dry_run_finds_a_run_to_resume(tmp_path, capsys):
    (tmp_path / "state.safetensors").write_bytes(json.dumps({}).encode())
    finetune.main(["--dry-run", "--cpu", "--output", str(tmp_path)])
    assert "resumes the interrupted run there" in capsys.readouterr().out
