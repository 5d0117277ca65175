import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowaug import create_flow, list_flows, load_flow, save_flow
from flowaug.flows import registry
from flowaug.flows.checkpoint import CONFIG, WEIGHTS
from tests.flows.test_architectures import narrow_flow
from tests.flows.test_config_file import edit


@pytest.fixture
def folder(tmp_path, flow):
    return save_flow(flow, tmp_path / "flow")


def rewrite(folder, change, name=WEIGHTS):
    """Change the tensors of a file, with the right digest in config.json."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / name)
    digests = json.loads((folder / CONFIG).read_text())["sha256"]
    edit(folder, sha256=digests | {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()})


def put(name, value):
    """A change that stores ``value(tensor)`` in place of a tensor."""
    return lambda tensors: tensors.update({name: value(tensors[name])})


def one_nan(tensor):
    tensor.view(-1)[-1] = torch.nan
    return tensor


TENSORS = [
    (put("gaussians.variance", lambda t: -t), "non-positive variance"),
    (put("gaussians.variance", torch.zeros_like), "non-positive variance"),
    (put("gaussians.mean", one_nan), "gaussians.mean has entries that are not finite"),
    (put("bijection.levels.0.bijections.1.shift", one_nan), "shift has entries that are not finite"),
    (put("gaussians.mean", lambda t: t.double() * 1e300), "not finite"),
    (put("gaussians.mean", lambda t: t.bool()), "data type BOOL"),
    (put("gaussians.mean", lambda t: t.long()), "data type I64"),
    (put("gaussians.mean", lambda t: t.to(torch.complex64)), "data type C64|not a readable"),
    (put("gaussians.mean", lambda t: t[:2]), "class means of shape"),
    (put("bijection.levels.0.bijections.1.shift", lambda t: t[:1]), "do not fit the architecture"),
    (lambda tensors: tensors.pop("gaussians.mean"), "no class means"),
    (lambda tensors: tensors.pop("gaussians.variance"), "gaussians.variance is missing"),
    (lambda tensors: tensors.update(more=torch.zeros(1)), "more is not part of the flow"),
    (put("bijection.levels.0.bijections.2.log_weight", lambda t: t + 1e4), "values that are not finite"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS)
def test_wrong_tensors_are_named_though_their_digest_is_right(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        load_flow(folder)
    assert WEIGHTS in str(error.value)


SIZES = [
    {"num_classes": 10**9},
    {"event_shape": [1, 10**6, 10**6]},
    {"overrides": {"steps": 1, "hidden": 10**9}},
    {"overrides": {"steps": 1, "hidden": 3000}},
    {"overrides": {"steps": 10**6, "hidden": 8}},
    {"overrides": {"steps": 30, "hidden": 8}},
    {"overrides": {"steps": 1, "hidden": 8, "num_levels": 10**12}},
    {"overrides": {"steps": 1, "hidden": 8, "blocks": [40, 40, 40]}},
    {"overrides": {"steps": 1, "hidden": -8}},
    {"overrides": {"steps": 1, "hidden": "x"}},
    {"overrides": {"steps": 1, "hidden": None, "blocks": [None]}},
    {"overrides": {"steps": 1, "hidden": 8, "coupling": "x"}},
    {"overrides": {"nothing": 1}},
    {"architecture": "none"},
    {"architecture": "jet_tiny"},
    {"architecture": "vector_tiny"},
]


@pytest.mark.parametrize("changes", SIZES, ids=str)
def test_sizes_are_bounded_by_the_weight_file_before_anything_is_allocated(folder, changes, monkeypatch):
    """Nothing leaves the meta device: ``to_empty`` and reading the file are the only ways to memory."""
    edit(folder, class_names=..., **changes)
    monkeypatch.setattr("flowaug.flows.checkpoint.read_tensors", lambda *_: pytest.fail("the file was read"))
    with pytest.raises(ValueError, match=r"overrides|larger flow|do not fit|class means|coupling") as error:
        load_flow(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x80\x04]", b"x" * 100, b"PK\x03\x04" * 50])
def test_files_of_another_kind_are_refused_in_one_sentence(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not a readable safetensors file"):
        load_flow(folder)


def test_a_sparse_file_of_20_gb_is_not_read(folder):
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_flow(folder)


def test_half_precision_weights_are_accepted(folder, flow):
    rewrite(folder, put("gaussians.mean", lambda t: t.to(torch.bfloat16)))
    loaded = load_flow(folder)
    assert loaded.gaussians.mean.dtype == torch.float32
    assert torch.allclose(loaded.gaussians.mean, flow.gaussians.mean, rtol=0.01)


@pytest.mark.parametrize("name", [f"{family}_tiny" for family in ("mef", "glow", "jet", "vector")])
def test_every_family_is_loaded_bit_by_bit_with_its_memory_layout(tmp_path, name):
    flow = narrow_flow(name).float().eval()
    loaded = load_flow(save_flow(flow, tmp_path))
    for (key, a), b in zip(flow.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
        assert a.stride() == b.stride(), key


@pytest.mark.parametrize("name", list_flows())
def test_every_architecture_is_built_on_the_meta_device_with_the_same_tensors(name):
    shape = (8,) if name.startswith("vector") else (3, 32, 32)
    with torch.device("meta"):
        flow = create_flow(name, event_shape=shape, num_classes=2)
    assert all(tensor.is_meta for tensor in flow.state_dict().values())


@pytest.mark.parametrize("buffer", ["order", "restore"])
def test_permutations_are_checked(tmp_path, buffer):
    folder = save_flow(narrow_flow("vector_tiny").float(), tmp_path)
    key = next(name for name in load_file(folder / WEIGHTS) if name.endswith(f".{buffer}"))
    rewrite(folder, put(key, lambda t: t + 1000))
    with pytest.raises(ValueError, match=r"\.order, restore or sign"):
        load_flow(folder)


def test_an_architecture_that_reads_values_in_its_constructor_is_loaded_too(tmp_path, monkeypatch):
    def reader(event_shape, **overrides):
        assert float(torch.ones(1)) == 1.0  # fails on the meta device
        return registry._BUILDERS["vector_tiny"](event_shape, **overrides)

    monkeypatch.setitem(registry._BUILDERS, "reader", reader)
    flow = create_flow("reader", event_shape=(8,), num_classes=2, couplings=2, hidden=8, seed=5)
    folder = save_flow(flow, tmp_path)
    for (key, a), b in zip(flow.state_dict().items(), load_flow(folder).state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    edit(folder, overrides={"couplings": 4, "hidden": 8})
    with pytest.raises(ValueError, match="larger flow"):
        load_flow(folder)
