"""Data sets with timm's names: arrays and folders of torchvision, and Hugging Face data sets."""

import io
import json
import pickle
import types

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from flowaug.data import load_dataset
from flowaug.data import timm_sources as sources
from flowaug.data.loaders import create_loader
from flowaug.training import finetune

QUICK = ["--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--steps", "2", "--batch-size", "4", "--cpu"]


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(head + array.tobytes())


@pytest.fixture
def mnist(tmp_path):
    """40 training and 20 validation images in torchvision's layout; image i has grey level i and label i % 10."""
    for stem, count in (("train", 40), ("t10k", 20)):
        raw = tmp_path / "MNIST" / "raw"
        write_idx(raw / f"{stem}-images-idx3-ubyte", np.arange(count, dtype=np.uint8).repeat(784).reshape(-1, 28, 28))
        write_idx(raw / f"{stem}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    """An image folder of greyscale images and RGB validation images of one class, so that both splits are RGB."""
    for part, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            for i in range(count):
                shape = (6, 5, 3) if (part, label) == ("test", 1) else (6, 5)
                pixels = np.full(shape, 50 * label + i, np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / part / name / f"{i}.png")
    return tmp_path / "pets"


def test_arrays_of_torchvision(mnist):
    train, val = (load_dataset("torch/mnist", mnist, split) for split in ("train", "val"))
    assert (len(train), len(val), train.channels, train.image_size) == (40, 20, 1, (28, 28))
    assert train.class_names[:2] == val.class_names[:2] == ("0 - zero", "1 - one")
    image, label = train[13]
    assert (image.getpixel((3, 3)), label) == (13, 3)
    assert val.images[:, 0, 0].tolist() == list(range(20))
    few = load_dataset("torch/mnist", mnist, images_per_class=2, seed=1)
    assert np.bincount(few.targets).tolist() == [2] * 10


def test_files_of_torchvision(folder):
    train, val = (load_dataset("torch/image_folder", folder, split) for split in ("train", "val"))
    own = [load_dataset(data_dir=folder, split=split) for split in ("train", "val")]
    for data, same in ((train, own[0]), (val, own[1])):
        assert data.class_names == same.class_names == ("ant", "bee")
        assert data.targets.tolist() == same.targets.tolist()
        assert (data.channels, data.image_size) == (3, (6, 5))
        assert [image.tobytes() for image, _ in data] == [image.tobytes() for image, _ in same]


def test_finetune_accepts_timms_names(mnist, tmp_path):
    finetune.main(["--dataset", "torch/mnist", "--data-dir", str(mnist), "--output", str(tmp_path / "out"), *QUICK])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["images"] == 20


class Table:
    """A stand-in for timm's reader of a Hugging Face data set."""

    def __init__(self, count, named=True, bad=()):
        self.count, self.bad = count, bad
        self.class_to_idx = {"bee": 1, "ant": 0} if named else {}
        self.dataset = types.SimpleNamespace(_fingerprint="abc")

    def __len__(self):
        return self.count

    def iter_targets(self):
        return (i % 2 for i in range(self.count))

    def __getitem__(self, index):
        buffer = io.BytesIO()
        Image.fromarray(np.full((4, 6, 3), index, np.uint8)).save(buffer, "PNG")
        data = buffer.getvalue()
        return io.BytesIO(data[: 20 if index in self.bad else None]), index % 2


@pytest.fixture
def tables(monkeypatch):
    found = {"train": Table(8), "test": Table(4)}

    def create(name, root, split):
        if split not in found:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(found)}.')
        return types.SimpleNamespace(reader=found[split])

    monkeypatch.setattr(sources, "create_dataset", create)
    return found


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_random_access_to_a_hugging_face_data_set(tables):
    train, val = (load_dataset("hfds/pets", None, split) for split in ("train", "val"))
    assert (len(train), len(val), train.channels, train.image_size) == (8, 4, 3, (4, 6))
    assert train.class_names == ("ant", "bee")
    x, y = next(iter(create_loader(train.subset([5, 2]), to_tensor, 2, False, 0)))
    assert (x[:, 0, 0, 0].tolist(), y.tolist()) == ([5, 2], [1, 0])
    images, labels = train.read_table((2, 3), 1)
    assert (images[:, 0, 0, 0].tolist(), labels.tolist()) == (list(range(8)), [0, 1] * 4)
    assert [label for _, label in val.examples()] == [0, 1]
    prints = {d.fingerprint() for d in (train, val, train.subset([0, 1]), load_dataset("hfds/pets", None, "train"))}
    assert len(prints) == 3


def test_classes_without_names_are_named_by_number(tables):
    tables["train"].class_to_idx = {}
    assert load_dataset("hfds/pets", None, "val").class_names == ("0", "1")


def test_bad_images_of_a_hugging_face_data_set_are_reported_before_training(tables):
    tables["train"].bad = (3, 5)
    with pytest.raises(ValueError, match=r"image 3 of hfds/pets cannot be read .*2 of 8 images are bad"):
        load_dataset("hfds/pets")


def test_a_real_hugging_face_data_set(folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    train, val = (load_dataset(f"hfds/{folder}", tmp_path / "cache", split) for split in ("train", "val"))
    assert (len(train), len(val), train.class_names) == (6, 4, ("ant", "bee"))
    assert sorted(int(np.asarray(image).flat[0]) for image, _ in train) == [0, 1, 2, 50, 51, 52]


def missing_package(*args, **options):
    raise ModuleNotFoundError("No module named 'datasets'")


def test_a_missing_package_is_reported(monkeypatch):
    monkeypatch.setattr(sources, "create_dataset", missing_package)
    with pytest.raises(ValueError, match=r"'hfds/pets' needs the package datasets .*; pip install datasets"):
        load_dataset("hfds/pets")


BAD_NAMES = [
    ("torch/cifar10", "root", FileNotFoundError, r"'torch/cifar10' is not in '.*Dataset not found or corrupted"),
    ("torch/no_such", "root", ValueError, r"timm has no data set 'torch/no_such' \(Unknown torchvision dataset"),
    ("torch/mnist", None, ValueError, r"dataset 'torch/mnist' needs data_dir"),
    ("torch/image_folder", "nothing", FileNotFoundError, r"nothing' does not exist"),
    ("torch/image_folder", "root", FileNotFoundError, r"has no train/"),
    (
        "tfds/mnist",
        "root",
        ValueError,
        r"is a streaming data set: no random access, so it cannot be resumed or sharded exactly",
    ),
    ("nowhere/mnist", None, ValueError, r"unknown dataset 'nowhere/mnist'; expected .*torch/…, hfds/… or wds/"),
    ("digits", "root", ValueError, r"both dataset='digits' and data_dir="),
]


@pytest.mark.parametrize(("name", "data_dir", "kind", "message"), BAD_NAMES)
def test_bad_names_raise_a_clear_error(tmp_path, name, data_dir, kind, message):
    (tmp_path / "root").mkdir()
    with pytest.raises(kind, match=message):
        load_dataset(name, data_dir and tmp_path / data_dir)


def test_untrusted_pickles_are_not_opened(tmp_path):
    """CIFAR is pickled: torchvision opens only files with the expected checksums."""

    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for name, _ in [*torchvision.datasets.CIFAR10.train_list, *torchvision.datasets.CIFAR10.test_list]:
        (batches / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileNotFoundError, match="not found or corrupted"):
        load_dataset("torch/cifar10", tmp_path)
