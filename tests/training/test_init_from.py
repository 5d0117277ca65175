"""A flow that starts from a trained one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowaug import load_flow
from flowaug.training import train_flow

QUICK = ["--images-per-class", "12", "--batch-size", "32", "--rank", "2", "--cpu", "--eval-every", "9"]


def run(folder, *options):
    train_flow.main([*QUICK, *options, "--output", str(folder)])
    return load_flow(folder), json.loads((folder / "metrics.json").read_text())


def test_it_takes_the_bijection_and_solves_for_its_own_gaussians_before_the_first_step(tmp_path):
    flow, metrics = run(tmp_path, "--init-from", "digits", "--lr", "0", "--steps", "1", "--kld-weight", "3")
    trained = load_flow("digits")
    for name, value in trained.bijection.state_dict().items():
        assert torch.equal(flow.bijection.state_dict()[name], value)
    assert metrics["class_gaussians"]["converged"]
    assert (flow.gaussians.mean - trained.gaussians.mean).abs().max() > 0.1
    assert metrics["nf_acc"] > 0.95  # 120 labels, no step: what the trained flow knew


def test_images_of_another_shape_are_refused(tmp_path):
    for name in ("ant", "bee"):
        for split in ("train", "val"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(np.full((9, 9, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    options = ["--data-dir", str(tmp_path), "--init-from", "digits", "--steps", "1"]
    with pytest.raises(SystemExit, match=r"takes images of shape \(1, 8, 8\), the data have \(3, 8, 8\)"):
        train_flow.main([*options, "--cpu", "--output", str(tmp_path / "out")])
