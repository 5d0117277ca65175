import json
import shutil

import huggingface_hub
import pytest
import torch

from flowaug import FlowMixupTransform, load_flow, load_pca, save_flow
from flowaug.flows import sources
from flowaug.flows.checkpoint import CONFIG, find_flow, flow_digest, read_config
from tests.conftest import make_flow, make_pca


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has two revisions of one flow, and gets a new commit with every download of the main branch."""
    calls = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        huggingface_hub.utils.validate_repo_id(repo_id)
        calls.append((repo_id, revision))
        if repo_id == "me/gone":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no connection\nlong advice")
        commit = {"v1": 1, None: 10 + len(calls)}.get(revision)
        if commit is None:
            raise OSError(f"Revision Not Found: {revision}")
        flow = make_flow(seed=commit)
        return str(save_flow(flow, tmp_path / str(commit), make_pca(flow), class_names=list(flow.class_names)))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    sources._download.cache_clear()
    yield calls
    sources._download.cache_clear()


def test_a_revision_is_read_as_timm_does(hub):
    assert torch.equal(load_flow("hf-hub:me/flow@v1").gaussians.mean, make_flow(seed=1).gaussians.mean)
    assert hub == [("me/flow", "v1")]


def test_config_and_weights_come_from_one_commit(hub):
    name = "hf-hub:me/flow"
    config, flow = read_config(name), load_flow(name)
    assert load_pca(name).dim == flow.dim
    assert FlowMixupTransform.from_pretrained(name).settings
    assert flow_digest(name).startswith(config["sha256"]["model.safetensors"][:16])
    assert hub == [("me/flow", None)]


def test_a_removed_download_is_made_again(hub):
    shutil.rmtree(find_flow("hf-hub:me/flow@v1"))
    assert load_flow("hf-hub:me/flow@v1").dim == 192
    assert hub == [("me/flow", "v1")] * 2


def test_revisions_are_kept_apart(hub):
    assert find_flow("hf-hub:me/flow@v1") != find_flow("hf-hub:me/flow")


ERRORS = [
    ("me/flow@", ValueError, "no revision after the @"),
    ("a/b/c", ValueError, "not the name of a repository.*hf-hub:ORG/NAME@REVISION"),
    ("", ValueError, "not the name of a repository"),
    ("me/flow@no", OSError, r"hf-hub:me/flow@no cannot be downloaded \(Revision Not Found: no\).*check the name"),
    ("me/gone", OSError, r"cannot be downloaded \(no connection\)"),
]


@pytest.mark.parametrize(("name", "error", "message"), ERRORS)
def test_errors_of_the_hub_are_one_sentence(hub, name, error, message):
    with pytest.raises(error, match=message):
        load_flow(f"hf-hub:{name}")


def test_a_repository_that_is_not_a_flow_is_named(hub, tmp_path):
    (find_flow("hf-hub:me/flow@v1") / CONFIG).write_text(json.dumps({"architecture": "vit"}))
    with pytest.raises(ValueError, match="not a flowaug checkpoint"):
        load_flow("hf-hub:me/flow@v1")
