"""Class maps, given numbers of classes, and ReaL labels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowaug.data import ImageDataset, load_dataset
from flowaug.data.class_map import ClassMap, read_class_map, relabel
from flowaug.evaluation.real_labels import RealLabels
from flowaug.training import finetune

SYNSETS = ("n01", "n02", "n03")


@pytest.fixture
def root(tmp_path):
    """An image folder of three synsets with two training and two validation images each, numbered across classes."""
    for label, name in enumerate(SYNSETS):
        for i in range(2):
            for part, stem in (("train", f"{name}_{i}"), ("val", f"ILSVRC2012_val_{2 * label + i + 1:08d}")):
                folder = tmp_path / "net" / part / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8, 3), 40 * label + i, np.uint8)).save(folder / f"{stem}.png")
    return tmp_path / "net"


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "map.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


MAPS = [
    (["n03", "n01", "n02"], (1, 2, 0), ("n03", "n01", "n02")),
    ({"n03": 0, "n02": 1, "n01": 2}, (2, 1, 0), ("n03", "n02", "n01")),
    ({"n02": 1, "n01": 0, "n03": 0}, (0, 1, 0), ("n01", "n02")),  # two folders are one class
]


@pytest.mark.parametrize(("content", "labels", "names"), MAPS)
def test_a_class_map_sets_the_labels_of_folders(root, write, content, labels, names):
    for split in ("train", "val"):
        data = load_dataset(data_dir=root, split=split, class_map=write(content), num_classes=len(names))
        assert data.class_names == names
        assert data.targets.tolist() == [label for label in labels for _ in range(2)]
        assert [image.getpixel((0, 0))[0] // 40 for image, _ in data] == [0, 0, 1, 1, 2, 2]


def test_relabel_does_not_change_its_argument():
    data = ImageDataset(np.zeros((4, 2, 2), np.uint8), [0, 0, 1, 1], ("a", "b"))
    other = relabel(data, ClassMap({"b": 0, "a": 1}, ("b", "a"), "a map"), "train")
    assert (data.targets.tolist(), other.targets.tolist()) == ([0, 0, 1, 1], [1, 1, 0, 0])
    assert data.fingerprint() != other.fingerprint()


NAMES = [
    (["ant", "bee"], "bee", 1),
    (["ant", "bee"], "1", 1),  # a number is its own label
    (["ant", "bee"], "2", None),
    (["ant", "bee"], "cat", None),
    ({"7": 0, "5": 1}, "5", 1),
    ({"7": 0, "5": 1}, "1", None),  # unless the map contains numbers
]


@pytest.mark.parametrize(("content", "name", "label"), NAMES)
def test_labels_of_numbers_and_names(write, content, name, label):
    assert read_class_map(write(content)).label(name) == label


def test_images_per_class_applies_to_the_classes_of_the_map(root, write):
    path = write({"n01": 0, "n02": 1, "n03": 1})
    data = load_dataset(data_dir=root, images_per_class=2, class_map=path)
    assert np.bincount(data.targets).tolist() == [2, 2]


BAD_MAPS = [
    (
        ["n01", "n02"],
        {},
        r"class 'n03' of the data is not in the class map .*\(1 of 3 classes are missing\), which has 2 classes",
    ),
    ([*SYNSETS, "n04"], {}, r"class 'n04' has no image in net after relabeling"),
    (list(SYNSETS), {"num_classes": 4}, r"num_classes is 4 but the class map .* has 3 classes \(n01, n02, n03"),
    ({"n01": 0, "n02": 2}, {}, r"has no class 1; labels must run from 0 to K - 1 without gaps"),
    ({"n01": 1}, {}, r"has no class 0"),
    ({}, {}, r"has no class 0"),
    ({"n01": "0"}, {}, r"neither a list of names nor"),
    ({"n01": -1}, {}, r"neither a list of names nor"),
    ({"n01": True}, {}, r"neither a list of names nor"),
    (["n01", "n01"], {}, r"lists a name twice"),
    ("{", {}, r"is not JSON"),
]


@pytest.mark.parametrize(("content", "options", "message"), BAD_MAPS)
def test_invalid_class_maps_are_rejected(root, write, content, options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(data_dir=root, class_map=write(content), **options)


def test_given_numbers_of_classes_and_missing_maps(root, tmp_path):
    assert len(load_dataset(data_dir=root, num_classes=3).class_names) == 3
    with pytest.raises(ValueError, match=r"num_classes is 10 but net has 3 classes"):
        load_dataset(data_dir=root, num_classes=10)
    with pytest.raises(FileNotFoundError, match=r"none\.json' does not exist; give a JSON file"):
        load_dataset(data_dir=root, class_map=tmp_path / "none.json")
    assert ClassMap.identity_map(3).names == ("0", "1", "2")


REAL = [[0], [1, 2], [], [1], [2], [0]]


def test_real_label_counts_agree_with_known_values(root, write):
    val = load_dataset(data_dir=root, split="val")
    logits = torch.eye(3)[[0, 2, 0, 0, 2, 1]]
    totals = torch.zeros(3, dtype=torch.float64)
    for process_index in range(2):
        real = RealLabels(write(REAL), val, process_index, 2)
        for _ in range(2):  # each evaluation starts again
            real.reset()
            part = logits[process_index::2]
            real.add(part[:2])
            real.add(part[2:])
        totals += real.sums()
    assert totals.tolist() == [3, 5, 5]  # images 1, 2 and 5 are right; image 3 has no label and is not counted


def test_finetune_reports_real_accuracy(root, write, tmp_path):
    options = ["--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--steps", "2", "--batch-size", "4"]
    everything = write([[0, 1, 2]] * 5 + [[]])
    options += ["--data-dir", str(root), "--cpu", "--output", str(tmp_path / "out")]
    finetune.main([*options, "--real-labels", str(everything)])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["real_top1"], metrics["real_top5"], metrics["images"]) == (1.0, 1.0, 6)


def in_memory(root):
    return ImageDataset(np.zeros((6, 2, 2), np.uint8), [0, 0, 1, 1, 2, 2], SYNSETS, name="arrays")


def other_names(root):
    (root / "val" / "n02" / "ILSVRC2012_val_00000003.png").rename(root / "val" / "n02" / "bee.png")
    return load_dataset(data_dir=root, split="val")


def numbers_beyond(root):
    (root / "val" / "n03" / "ILSVRC2012_val_00000006.png").rename(root / "val" / "n03" / "ILSVRC2012_val_00000009.png")
    return load_dataset(data_dir=root, split="val")


def as_is(root):
    return load_dataset(data_dir=root, split="val")


BAD_REAL = [
    (in_memory, REAL, r"go by file names ILSVRC2012_val_00000001\.JPEG, but the val split of arrays has no files"),
    (other_names, REAL, r"but the val split of net has bee\.png"),
    (numbers_beyond, REAL, r"ILSVRC2012_val_00000009\.JPEG is not among the 6 images"),
    (as_is, REAL[:-1], r"has labels for 5 images but the val split has 6"),
    (as_is, [*REAL[:-1], [3]], r"has labels up to 3 but the data only 3 classes"),
    (as_is, {"a": 1}, r"is not a list of lists of labels"),
    (as_is, "[", r"is not JSON"),
]


@pytest.mark.parametrize(("make", "content", "message"), BAD_REAL)
def test_real_labels_that_do_not_match_the_data_are_rejected(root, write, make, content, message):
    with pytest.raises(ValueError, match=message):
        RealLabels(write(content), make(root))


def test_timms_real_labels_are_of_50000_images(root, tmp_path):
    with pytest.raises(ValueError, match=r"has labels for 50000 images but the val split has 6"):
        RealLabels("timm", as_is(root))
    with pytest.raises(FileNotFoundError, match=r"real\.json' is not there"):
        RealLabels(tmp_path / "real.json", as_is(root))
