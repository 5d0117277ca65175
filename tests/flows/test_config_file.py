import json

import pytest

from flowaug import list_pretrained, load_flow, load_pca, save_flow
from flowaug.flows.checkpoint import CONFIG, read_config


@pytest.fixture
def folder(tmp_path, flow, pca):
    return save_flow(flow, tmp_path / "flow", pca, class_names=list(flow.class_names), mixup={"p": 0.5})


def edit(folder, **changes):
    """Change keys of config.json; ``...`` removes one."""
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


WRONG = [
    ("architecture", 5, "the name of a flow"),
    ("event_shape", None, "one or three positive integers"),
    ("event_shape", [3, 8.0, 8], "one or three positive integers"),
    ("num_classes", True, "a positive integer"),
    ("num_classes", 0, "a positive integer"),
    ("grey_levels", "x", "an integer from 2"),
    ("overrides", None, "an object"),
    ("overrides", {"hidden": {"a": 1}}, "an object"),
    ("class_names", "abc", "a list of distinct names"),
    ("class_names", ["a", "a", "b"], "a list of distinct names"),
    ("class_names", ["a", "b", "\ud800"], "a list of distinct names"),
    ("class_names", ["a"], "num_classes = 3"),
    ("mixup", {"p": "x"}, "a number from 0 to 1"),
    ("mixup", {"policy": "/etc/passwd"}, "no such key"),
    ("mixup", [], "an object"),
    ("recipe", "x", "an object"),
    ("recipe", {"dataset": 3}, "a string or null"),
    ("sha256", {}, "the SHA-256"),
    ("sha256", {"model.safetensors": 3}, "the SHA-256"),
    ("surprise", 1, "no such key"),
]


@pytest.mark.parametrize(("key", "value", "expected"), WRONG)
def test_a_wrong_value_is_named_with_file_key_value_and_expectation(folder, key, value, expected):
    edit(folder, **{key: value})
    for load in (load_flow, load_pca):
        with pytest.raises(ValueError, match=expected) as error:
            load(folder)
        assert str(folder / CONFIG) in str(error.value)
        assert key in str(error.value)


@pytest.mark.parametrize("key", ["architecture", "event_shape", "num_classes", "grey_levels", "overrides", "sha256"])
def test_a_missing_key_is_named(folder, key):
    edit(folder, **{key: ...})
    with pytest.raises(ValueError, match=f"config.json: {key} is missing, expected"):
        load_flow(folder)


RESERVED = ["pretrained", "checkpoint", "checkpoint_path", "pretrained_cfg", "num_classes", "name", "seed"]


@pytest.mark.parametrize("key", RESERVED)
def test_overrides_cannot_reach_another_flow_or_arguments_of_create_flow(folder, key):
    edit(folder, overrides={"steps": 1, "hidden": 8, key: "hf-hub:a/b"})
    with pytest.raises(ValueError, match=f"overrides.{key} is 'hf-hub:a/b'.*must not come from a file"):
        load_flow(folder)
    edit(folder, overrides={"steps": 1, "hidden": 8}, recipe={"model_kwargs": {key: 3}})
    with pytest.raises(ValueError, match=f"recipe.model_kwargs.{key} is 3"):
        read_config(folder)


def test_deeply_nested_and_huge_files_are_refused(folder):
    (folder / CONFIG).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        load_flow(folder)
    with (folder / CONFIG).open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(ValueError, match="at most"):
        load_flow(folder)


def test_save_flow_refuses_what_load_flow_would(tmp_path, flow):
    with pytest.raises(ValueError, match="no such key"):
        save_flow(flow, tmp_path, surprise=1)
    assert not list(tmp_path.iterdir())


def test_bundled_configs_are_valid():
    assert all(read_config(name) for name in list_pretrained())
