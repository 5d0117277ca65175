"""Two processes with gloo, as ``torchrun --nproc_per_node 2`` starts them, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from flowaug.data.transforms import Preprocess
from flowaug.training.classifier import accuracy

ROOT = Path(__file__).resolve().parents[2]
FLOW = ["train_flow.py", "--images-per-class", "9", "--init-from", "digits", "--lr", "0", "--steps", "1", "--rank", "4"]
CLASSIFIER = ["finetune.py", "--model", "test_vit", "--no-pretrained", "--img-size", "32", "--images-per-class", "9"]
CLASSIFIER += ["--opt", "sgd", "--lr", "0.1", "--steps", "4"]


def run(processes, output, *options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, *options, "--cpu", "--output", str(output)]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads((output / "metrics.json").read_text())


def test_evaluation_exchanges_nothing_before_its_end(tmp_path, monkeypatch):
    """A wrapped model would send its buffers at every batch, and hang where processes differ in batches."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        inner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 3))
        model = DistributedDataParallel(inner)
        monkeypatch.setattr(DistributedDataParallel, "forward", lambda self, x: pytest.fail("the wrapper was called"))
        loader = [(torch.zeros(2, 3, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))]
        values = accuracy(model, loader, Preprocess((3, 2, 2), (0.5,) * 3, (0.5,) * 3), torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()
    assert values["images"] == 2
    assert inner.training


@pytest.fixture(scope="module")
def flows(tmp_path_factory):
    """The same flow, its Gaussians solved for and its axes fitted by one and by two processes."""
    folders = [tmp_path_factory.mktemp(f"flow{n}") for n in (1, 2)]
    metrics = [run(n, folder, *FLOW, "--partners-per-class", "7") for n, folder in enumerate(folders, 1)]
    return folders, metrics


@pytest.mark.parametrize("name", ["moments.safetensors", "model.safetensors"])
def test_moments_and_fixed_point_are_those_of_one_process(flows, name):
    one, two = (load_file(folder / name) for folder in flows[0])
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-6, atol=1e-6, msg=key)


def test_class_axes_are_those_of_one_process(flows):
    one, two = (load_file(folder / "pca.safetensors") for folder in flows[0])
    projectors = [p["axes"].double().transpose(1, 2) @ p["axes"].double() for p in (one, two)]
    torch.testing.assert_close(*projectors, rtol=0, atol=1e-6)
    assert torch.equal(one["offsets"], two["offsets"])
    assert one["offsets"].tolist() == list(range(0, 71, 7))
    torch.testing.assert_close(one["coords"], two["coords"], rtol=1e-3, atol=1e-3)  # half precision


def test_numbers_on_the_val_split_are_those_of_one_process(flows):
    one, two = flows[1]
    assert two["nf_acc"] == one["nf_acc"]
    assert two["bits_per_dim"] == pytest.approx(one["bits_per_dim"], abs=1e-6)
    assert one["class_gaussians"]["converged"]


@pytest.mark.parametrize("augment", [[], ["--flow-aug", "digits", "--flow-aug-copies", "3"]], ids=["plain", "copies"])
def test_two_processes_average_their_gradients_and_evaluate_each_image_once(tmp_path, augment):
    one = run(1, tmp_path / "one", *CLASSIFIER, *augment, "--batch-size", "16")
    two = run(2, tmp_path / "two", *CLASSIFIER, *augment, "--batch-size", "8")
    assert one.get("flow_aug") == two.get("flow_aug")
    assert (one["images"], two["images"]) == (359, 359)
    assert two["top1"] == one["top1"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for key, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_two_processes_train_a_missing_flow_together_and_go_on(tmp_path):
    metrics = run(2, tmp_path / "out", *CLASSIFIER, "--batch-size", "8", "--flow-aug", "--quick")
    assert metrics["flow_aug"]["augmented"] > 0
    assert len(list((tmp_path / "flows").glob("*/model.safetensors"))) == 1
