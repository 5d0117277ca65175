import json

import pytest
import torch

from flowaug import load_flow, load_pca, save_flow
from flowaug.flows.checkpoint import CONFIG, PCA, WEIGHTS
from flowaug.training.resume import load_state, save_state
from tests.conftest import make_flow


@pytest.fixture
def folder(tmp_path, flow, pca):
    return save_flow(flow, tmp_path / "flow", pca, class_names=list(flow.class_names))


def test_round_trip(folder, flow, pca):
    loaded, x = load_flow(folder), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.encode(x)[0], flow.encode(x)[0])
    assert torch.equal(loaded.gaussians.mean, flow.gaussians.mean)
    assert loaded.class_names == flow.class_names
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in load_pca(f"local-dir:{folder}").tensors().items():
        assert torch.equal(tensor, pca.tensors()[name])


def test_saving_leaves_no_temporary_file(folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, WEIGHTS, PCA])


def truncate(folder, name=WEIGHTS):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def foreign(folder):
    (folder / CONFIG).write_text(json.dumps({"architecture": "resnet18"}))


DAMAGES = [
    (truncate, ValueError, "truncated, damaged or from another save"),
    (lambda f: truncate(f, CONFIG), ValueError, "not valid JSON"),
    (foreign, ValueError, "not a flowaug checkpoint"),
    (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "model.safetensors is missing"),
    (lambda f: (f / CONFIG).unlink(), FileNotFoundError, "no flow at"),
    (
        lambda f: save_flow(make_flow(seed=9), f / "other") and (f / "other" / WEIGHTS).replace(f / WEIGHTS),
        ValueError,
        "another",
    ),
]


@pytest.mark.parametrize(("damage", "error", "message"), DAMAGES)
def test_damaged_checkpoint_is_reported(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        load_flow(folder)


def test_unknown_name_is_reported_with_the_expected_sources():
    with pytest.raises(FileNotFoundError, match="bundled name"):
        load_flow("no_such_flow")


def test_training_state_round_trip_is_exact(tmp_path):
    state = {
        "step": 3,
        "lr": 0.1 + 0.2,
        "groups": [{"betas": [0.9, 0.95], "none": None}],
        "state": {0: {"m": torch.rand(3)}},
    }
    save_state(tmp_path / "s.safetensors", state)
    loaded = load_state(tmp_path / "s.safetensors")
    assert torch.equal(loaded["state"][0].pop("m"), state["state"][0].pop("m"))
    assert loaded == state


def test_truncated_training_state_is_reported(tmp_path):
    save_state(tmp_path / "s.safetensors", {"m": torch.rand(100)})
    truncate(tmp_path, "s.safetensors")
    with pytest.raises(ValueError, match="not a readable training state"):
        load_state(tmp_path / "s.safetensors")
