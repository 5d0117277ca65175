"""webdataset shards: finding, reading and skipping samples, and loaders over processes and workers."""

import collections
import itertools
import json
import pickle
import random

import numpy as np
import pytest
import torch

from flowaug import load_pca
from flowaug.cli import main as cli
from flowaug.data import load_dataset
from flowaug.data.loaders import create_loader, endless_batches
from flowaug.data.wds import reader
from flowaug.data.wds.dataset import count_skipped, open_stream
from flowaug.data.wds.index import find_shards, is_shards
from flowaug.data.wds.reader import count_samples, read_shard
from flowaug.training import finetune, train_flow
from tests.conftest import finetune_options
from tests.shard_files import number_of, numbered_samples, png, truncate, write_info, write_shard, write_split

TRAIN, PER_SHARD = 200, 3
CORRUPT = ("000010", "000301")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 training shards of 3 samples, with two bad images and one shard truncated in its second sample."""
    root = tmp_path_factory.mktemp("shards")
    for path in write_split(root, "train", TRAIN, PER_SHARD):
        samples = numbered_samples(int(path.stem[-6:]) * PER_SHARD, PER_SHARD)
        if any(key in CORRUPT for key, _ in samples):
            write_shard(path, [(k, f | {"png": f["png"][:40]} if k in CORRUPT else f) for k, f in samples])
    truncate(root / "train-000050.tar")
    write_split(root, "val", 5, 4)
    return root


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWAUG_CACHE", str(path))
        yield path


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def noise(image):
    """Return one random number of each global generator for this image, and the red value of its first pixel."""
    return torch.tensor([random.random(), np.random.random(), torch.rand(()).item(), image.getpixel((0, 0))[0]])  # noqa: NPY002


def numbers(loader, limit=None):
    return list(itertools.chain.from_iterable(number_of(x) for x, _ in itertools.islice(loader, limit)))


def good(shard=50):
    """Return the numbers of the samples that can be read."""
    bad = {int(key) for key in CORRUPT} | {shard * PER_SHARD + 1, shard * PER_SHARD + 2}
    return set(range(TRAIN * PER_SHARD)) - bad


def test_an_epoch_of_200_shards_ends_with_the_right_counts(folder):
    data = open_stream(folder, "train")
    assert (len(data), data.class_names, data.channels, data.image_size) == (598, ("0", "1", "2"), 3, (8, 8))
    loader = create_loader(data, to_tensor, 13, True, 0, drop_last=True)
    pairs = list(loader)
    assert len(pairs) == len(loader) == 598 // 13
    assert all(len(x) == len(y) == 13 for x, y in pairs)
    seen = [n for x, _ in pairs for n in number_of(x)]
    assert set(seen) == good()
    assert len(seen) == 598  # two samples occur twice, in place of the bad images
    assert all(n % 3 == label for x, y in pairs for n, label in zip(number_of(x), y.tolist(), strict=True))
    skipped = count_skipped({"train": data, "other": object()})
    assert {k: v for k, v in skipped["train"].items() if k != "names"} == {"samples": 2, "shards": 1}
    assert any(name.endswith("train-000050.tar") for name in skipped["train"]["names"])


def test_repeats_is_the_number_of_visits_to_each_sample(tmp_path):
    write_split(tmp_path, "train", 2, 12)
    write_split(tmp_path, "val", 1, 3)
    loader = create_loader(open_stream(tmp_path, "train"), to_tensor, 6, True, 0, drop_last=True, repeats=3)
    counts = collections.Counter(numbers(loader))
    assert (len(loader), len(counts), set(counts.values())) == (12, 24, {3})


def test_evaluation_reads_each_sample_once_over_all_processes_and_workers(folder):
    for num_processes, workers in ((1, 0), (2, 0), (7, 0), (1, 2)):
        loaders = [
            create_loader(open_stream(folder, "val"), to_tensor, 3, False, 0, workers, process_index, num_processes)
            for process_index in range(num_processes)
        ]
        assert sorted(n for loader in loaders for n in numbers(loader)) == list(range(20))
    assert numbers(loaders[0]) == numbers(loaders[0])
    with pytest.raises(
        TypeError, match="the number of batches of an evaluation stream is unknown before its shards are read"
    ):
        len(loaders[0])


def test_two_processes_divide_the_training_shards_and_get_equally_many_batches(folder):
    loaders = [create_loader(open_stream(folder, "train"), to_tensor, 8, True, 0, 0, i, 2, True) for i in range(2)]
    assert [len(loader) for loader in loaders] == [598 // 2 // 8] * 2
    counts = collections.Counter(n for loader in loaders for n in numbers(loader))
    assert len(counts) >= 0.98 * len(good())
    assert set(counts) <= good()


@pytest.mark.parametrize(("shards", "num_processes", "workers"), [(1, 3, 0), (2, 3, 0), (1, 1, 2)])
def test_processes_and_workers_without_a_shard_get_as_many_batches(tmp_path, shards, num_processes, workers):
    write_split(tmp_path, "train", shards, 12)
    write_split(tmp_path, "val", 1, 3)
    data = open_stream(tmp_path, "train")
    for process_index in range(num_processes):
        loader = create_loader(data, to_tensor, 2, True, 0, workers, process_index, num_processes, True)
        seen = numbers(loader)
        assert len(seen) == 2 * len(loader) == 12 * shards // num_processes // 2 * 2
        assert len(set(seen)) == len(seen) or workers  # workers that read the same shard may repeat samples


def test_orders_depend_on_epoch_seed_and_process_and_leave_the_global_generators_unchanged(folder):
    data = open_stream(folder, "train")
    before = random.getstate(), torch.get_rng_state()
    orders = {}
    for seed, process_index, epoch in itertools.product((0, 1), (0, 1), (0, 1)):
        loader = create_loader(data, to_tensor, 8, True, seed, 0, process_index, 2, True)
        loader.sampler.set_epoch(epoch)
        orders[seed, process_index, epoch] = tuple(numbers(loader, 3))
    assert len(set(orders.values())) == 8
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns because of PyTorch's threads
@pytest.mark.parametrize(("workers", "start"), [(0, 0), (0, 9), (2, 9), (2, 36), (2, 40)])
def test_a_resumed_stream_continues_with_the_same_batches(folder, workers, start):
    whole, resumed = (
        create_loader(open_stream(folder, "train"), noise, 16, True, 1, workers, drop_last=True) for _ in range(2)
    )
    assert len(whole) == 37
    every = list(itertools.islice(endless_batches(whole, 0), start + 3))
    rest = list(itertools.islice(endless_batches(resumed, start), 3))
    for (x, y), (again, labels) in zip(every[start:], rest, strict=True):
        assert torch.equal(x, again)
        assert torch.equal(y, labels)
    draws = torch.cat([x for x, _ in every])
    assert all(len(set(draws[:, column].tolist())) == len(draws) for column in range(3))


def test_read_table_returns_every_good_sample_in_order(folder):
    data = open_stream(folder, "train")
    images, labels = data.read_table((8, 8), 3)
    assert (images.dtype, images.shape[1:], labels.dtype) == (torch.uint8, (3, 8, 8), torch.int64)
    assert number_of(images) == sorted(good())
    assert labels.tolist() == [n % 3 for n in sorted(good())]
    assert {k: v for k, v in count_skipped({"t": data})["t"].items() if k != "names"} == {"samples": 2, "shards": 1}
    assert data.read_table((4, 6), 1)[0].shape[1:] == (1, 4, 6)


def test_the_counts_are_cached_until_a_shard_changes(tmp_path, cache, monkeypatch):
    write_split(tmp_path, "train", 2, 6)
    write_split(tmp_path, "val", 1, 3)
    shards = find_shards(tmp_path)["train"]
    assert count_samples(shards).count == 12
    monkeypatch.setattr(reader, "_count", lambda shards: pytest.fail("counted again"))
    assert count_samples(shards).labels == {"0": 4, "1": 4, "2": 4}
    monkeypatch.undo()
    write_shard(tmp_path / "train-000000.tar", numbered_samples(0, 7))
    assert count_samples(shards).count == 13
    for path in cache.rglob("*.json"):
        path.write_text("{")
    assert count_samples(shards).count == 13


LABELS = [
    ({"cls": b" 007\n"}, "7"),
    ({"json": b"4"}, "4"),
    ({"json": b'{"caption": "x", "label": 3}'}, "3"),
    ({"json": b'{"cls": "bee"}', "txt": b"no"}, "bee"),
    ({"txt": b"bee\n"}, "bee"),
    ({"cls": b"1", "json": b"{"}, "1"),
]
BAD_LABELS = [
    ({}, "no label file; expected one of cls, json, txt"),
    ({"pyd": pickle.dumps(3)}, "no label"),
    ({"cls": b""}, r"the \.cls file is empty"),
    ({"cls": b"-1"}, "label is -1; expected a non-negative number or a class name"),
    ({"json": b'{"name": 3}'}, r"no field label or cls or class or target"),
    ({"json": b"[1]"}, "label of type list"),
    ({"json": b'{"label": true}'}, "label of type bool"),
    ({"json": b"{"}, "Expecting property name"),
    ({"cls": b"\xff"}, "utf-8"),
]


@pytest.mark.parametrize(("files", "label"), LABELS)
def test_labels_are_read_from_cls_json_and_txt(tmp_path, files, label):
    (sample,) = read_shard(write_shard(tmp_path / "a.tar", [("k", {"png": png(1), **files})]))
    assert sample.label_name() == label


@pytest.mark.parametrize(("files", "message"), BAD_LABELS)
def test_bad_labels_raise_an_error_with_the_cause(tmp_path, files, message):
    (sample,) = read_shard(write_shard(tmp_path / "a.tar", [("k", {"png": png(1), **files})]))
    with pytest.raises(ValueError, match=message):
        sample.label_name()


def test_nothing_is_unpickled_and_other_files_are_not_read(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    trap = pickle.dumps(Trap())
    samples = [(f"{i}", {"pyd": trap, "pickle": trap, "png": png(i), "cls": b"0", "pth": trap}) for i in range(3)]
    path = write_shard(tmp_path / "train-0.tar", samples)
    assert [set(sample.files) for sample in read_shard(path)] == [{"png", "cls"}] * 3


def repeated(path, count=3):
    """Write a shard of ``count`` keys, each of two samples that follow each other: only the first has value k."""
    samples = [[(f"{k:03d}", {"png": png(k), "cls": b"0"}), (f"{k:03d}", {"PNG": png(k + 90), "cls": b"1"})]
               for k in range(count)]  # fmt: skip
    return write_shard(path, [*itertools.chain(*samples), ("last", {"png": png(7), "cls": b"1"})])


def test_of_samples_with_one_key_the_first_stays_as_in_timm_and_the_others_are_reported(tmp_path):
    for split in ("train", "val"):
        path = repeated(tmp_path / f"{split}-0.tar")
        write_shard(tmp_path / f"{split}-1.tar", numbered_samples(100, 3, classes=2))
    data = open_stream(tmp_path, "train")
    names = [f"{path.with_name('train-0.tar')}:{k:03d} (2)" for k in range(3)]
    assert (len(data), list(data.skipped)) == (7, names)
    assert "it has the key of the sample before it" in data.skipped[names[0]]
    data.skipped.clear()
    images, labels = data.read_table((8, 8), 3)
    assert number_of(images) == [0, 1, 2, 7, 100, 101, 102]
    assert labels[:4].tolist() == [0, 0, 0, 1]
    assert list(data.skipped) == names
    assert count_skipped({"train": data})["train"]["samples"] == 3


def test_shards_in_linked_folders_are_found(tmp_path):
    write_split(tmp_path / "pool", "train", 2, 3)
    write_split(tmp_path / "root", "val", 1, 3)
    (tmp_path / "root" / "more").symlink_to(tmp_path / "pool")
    (tmp_path / "root" / "more" / "back").symlink_to(tmp_path / "root")
    assert [path.name for path in find_shards(tmp_path / "root")["train"].paths] == [
        "train-000000.tar",
        "train-000001.tar",
    ]


DAMAGES = [  # a header and a file have 512 bytes each, so a sample has 2048
    (lambda data: data[:1024], 0),  # truncated within the first sample
    (lambda data: data[: 2048 + 540], 1),  # truncated within an image
    (lambda data: data[: 2048 + 100], 0),  # truncated within a header
    (lambda data: data[: 2 * 2048], 1),  # truncated between samples, without an end-of-archive mark
    (lambda data: data[:2048] + b"\xaa" * 512 + data[2560:], 0),  # a header of garbage
    (lambda data: b"", 0),
    (lambda data: b"no tar at all" * 100, 0),
]


@pytest.mark.parametrize(("damage", "left"), DAMAGES)
def test_a_damaged_shard_is_read_up_to_the_damage_and_reported(tmp_path, damage, left):
    whole = write_shard(tmp_path / "train-1.tar", numbered_samples(6, 6))
    path = write_shard(tmp_path / "train-0.tar", numbered_samples(0, 3))
    path.write_bytes(damage(path.read_bytes()))
    write_shard(tmp_path / "val-0.tar", numbered_samples(0, 3))
    data = open_stream(tmp_path, "train")
    assert len(data) == left + 6
    assert list(data.skipped) == [str(path)]
    images, _ = data.read_table((8, 8), 3)
    assert number_of(images) == [*range(left), *range(6, 12)]
    assert list(data.skipped) == [str(path)]
    assert whole.is_file()


def write_pets(root):
    for part, count in (("train", 6), ("val", 3)):
        files = [("ant", "bee")[i % 2].encode() for i in range(count)]
        write_shard(root / part / "0.tar", [(f"{i}", {"png": png(i), "txt": f}) for i, f in enumerate(files)])


def test_class_names_in_the_shards_become_labels(tmp_path):
    write_pets(tmp_path)
    assert is_shards(None, tmp_path)
    data = open_stream(tmp_path, "val")
    assert data.class_names == ("ant", "bee")
    assert data.read_table((8, 8), 3)[1].tolist() == [0, 1, 0]
    assert [(image.getpixel((0, 0))[0], label) for image, label in data.examples()] == [(0, 0), (1, 1)]


def test_a_class_map_sets_names_and_labels(tmp_path):
    write_pets(tmp_path)
    (tmp_path / "map.json").write_text(json.dumps({"bee": 0, "ant": 1}))
    data = open_stream(tmp_path, "val", tmp_path / "map.json", 2)
    assert data.class_names == ("bee", "ant")
    assert data.read_table((8, 8), 3)[1].tolist() == [1, 0, 1]


def test_shards_are_not_counted_if_samples_and_classes_are_given(folder, monkeypatch):
    monkeypatch.setattr(reader, "_count", lambda shards: pytest.fail("counted"))
    data = open_stream(folder, "train", None, 3, 64)
    assert len(data) == 64
    loader = create_loader(data, to_tensor, 16, True, 0, drop_last=True)
    assert len(list(loader)) == 4


def test_timms_info_file_defines_the_splits(tmp_path):
    write_split(tmp_path, "x", 2, 4)
    samples = [(str(i), {"png": png(i), "json": json.dumps({"label": 9, "fine": i % 2}).encode()}) for i in range(4)]
    write_shard(tmp_path / "y-000000.tar", samples)
    write_info(tmp_path, {"train": (["y-000000.tar"], 4, "fine"), "validation": (["y-000000.tar"], 4, "fine")})
    data = open_stream(tmp_path, "train")
    assert (len(data), data.class_names) == (4, ("0", "1"))
    write_info(tmp_path, {"train": (["../../etc/y-000000.tar"], 4, "fine"), "test": (["y-000000.tar"], 4, "")})
    assert find_shards(tmp_path)["train"].paths == (tmp_path / "y-000000.tar",)
    (tmp_path / "_info.json").write_text('{"splits": {"train": {}}}')
    with pytest.raises(ValueError, match=r"_info\.json does not describe a train and a val split"):
        find_shards(tmp_path)


PATTERNS = [
    ("train-{000000..000001}.tar", 2, 1),
    ("train-*.tar", 2, 1),
    ("{train-000000,val-000000}.tar", 1, 1),
]


@pytest.mark.parametrize(("pattern", "train", "val"), PATTERNS)
def test_patterns_select_shards_and_find_val_shards_in_the_same_folder(tmp_path, pattern, train, val):
    write_split(tmp_path, "train", 2, 6)
    write_split(tmp_path, "val", 1, 3)
    assert is_shards(None, tmp_path / pattern)
    found = find_shards(tmp_path / pattern)
    assert [len(found[split].paths) for split in ("train", "val")] == [train, val]
    assert open_stream(tmp_path / pattern, "train").name == tmp_path.name


def no_val(root):
    (root / "val-000000.tar").unlink()


def one_of_a_class(root):
    write_shard(root / "train-000000.tar", numbered_samples(0, 4, classes=3))


def no_image(root):
    write_shard(root / "train-000000.tar", [("a", {"jpg": b"no image", "cls": b"0"}), ("b", {"jpg": b"", "cls": b"0"})])


def no_labels(root):
    write_shard(root / "train-000000.tar", [("a", {"png": png(1)})])


def high_labels(root):
    write_shard(root / "train-000000.tar", [("a", {"png": png(1), "cls": b"90"})])


def other_val_classes(root):
    write_shard(root / "val-000000.tar", numbered_samples(0, 5, classes=5))


BAD_SHARDS = [
    (no_val, {}, FileNotFoundError, r"has no val shards; expected \.tar files named like val-000000\.tar"),
    (one_of_a_class, {}, ValueError, r"class '1' has only 1 image in the 1 shard\(s\) starting with .*train-000000"),
    (no_image, {}, ValueError, r"no sample of the 1 shard\(s\) .* can be used; first error: .*UnidentifiedImageError"),
    (no_labels, {}, ValueError, r"no sample of .* has an image and a label; first error: .*no label"),
    (high_labels, {}, ValueError, r"the largest label is 90, but .* have only 1 samples; give a class map"),
    (other_val_classes, {"split": "val"}, ValueError, r"class '3' of the data is not in num_classes=3"),
    (lambda root: None, {"num_classes": 2}, ValueError, r"class '2' of the data is not in num_classes=2"),
    (lambda root: None, {"num_classes": 4}, ValueError, r"class '3' has no image in"),
    (lambda root: None, {"num_classes": 0}, ValueError, r"num_classes is 0; expected at least 1"),
]


@pytest.mark.parametrize(("damage", "options", "kind", "message"), BAD_SHARDS)
def test_bad_shards_are_rejected_before_training(tmp_path, damage, options, kind, message):
    write_split(tmp_path, "train", 1, 6)
    write_split(tmp_path, "val", 1, 3)
    damage(tmp_path)
    with pytest.raises(kind, match=message):
        open_stream(tmp_path, **{"split": "train", **options})


def test_missing_shards_of_a_pattern_are_counted(tmp_path):
    write_split(tmp_path, "train", 1, 6)
    with pytest.raises(
        FileNotFoundError, match=r"train-000001\.tar' does not exist \(2 of 3 train shards are missing\)"
    ):
        find_shards(tmp_path / "train-{000000..000002}.tar")


def test_the_fingerprint_depends_on_names_sizes_and_classes(folder, tmp_path):
    write_split(tmp_path, "train", 2, 6)
    write_split(tmp_path, "val", 1, 3)
    first = open_stream(tmp_path, "train").fingerprint()
    assert first == open_stream(tmp_path, "train").fingerprint()
    write_shard(tmp_path / "train-000000.tar", numbered_samples(0, 20))
    assert len({first, open_stream(tmp_path, "train").fingerprint(), open_stream(tmp_path, "val").fingerprint()}) == 3


# Without workers, an epoch of 598 samples reads every training sample, bad ones included.
QUICK = ["--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--batch-size", "46", "--workers", "0"]
QUICK_FLOW = ["--model", "mef_tiny", "--image-size", "8", "--steps", "3", "--solve-at", "2", "--rank", "2", "--cpu"]


def test_the_scripts_run_on_shards_and_report_what_they_skipped(folder, tmp_path):
    train_flow.main(["--data-dir", str(folder), "--output", str(tmp_path / "flow"), *QUICK_FLOW])
    metrics = json.loads((tmp_path / "flow" / "metrics.json").read_text())
    assert (metrics["skipped"]["train"]["samples"], metrics["skipped"]["train"]["shards"]) == (2, 1)
    assert (metrics["train_images"], metrics["val_images"]) == (len(good()), 20)
    assert len(load_pca(tmp_path / "flow").coords) == len(good())
    options = ["--dataset", "wds/", "--data-dir", str(folder), "--flow-aug", str(tmp_path / "flow"), "--epochs", "1"]
    finetune.main([*options, "--output", str(tmp_path / "out"), *QUICK, "--cpu"])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["images"], metrics["flow_aug"]["seen"]) == (13, 20, 598)
    assert (metrics["skipped"]["train"]["samples"], metrics["skipped"]["train"]["shards"]) == (2, 1)
    assert metrics["skipped"]["val"] == {"samples": 0, "shards": 0, "names": {}}
    assert (tmp_path / "out" / "augmented.png").is_file()
    cli.main(["preview", str(tmp_path / "flow"), "--output", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").is_file()
    for command in ("evaluate", "export"):
        with pytest.raises(SystemExit, match=r"are webdataset shards, but this command needs random access to images"):
            cli.main([command, str(tmp_path / "flow"), "--output", str(tmp_path / "no")])


def test_the_number_of_workers_is_a_training_option_of_a_stream_only(folder):
    arguments = [["--workers", "2"], ["--workers", "2", "--data-dir", str(folder)]]
    options = [finetune_options(*argv).training_options() for argv in arguments]
    assert ["workers" in option for option in options] == [False, True]


def test_a_flow_trains_on_a_stream_with_timms_transforms(folder, tmp_path):
    options = ["--data-dir", str(folder), "--output", str(tmp_path), "--scale", "0.5", "1", "--ratio", "1", "1"]
    train_flow.main([*options, *QUICK_FLOW])
    assert json.loads((tmp_path / "metrics.json").read_text())["train_images"] == len(good())
    with pytest.raises(SystemExit, match="--estimator glem needs random access to images"):
        train_flow.main([*options, *QUICK_FLOW[:6], *QUICK_FLOW[8:], "--estimator", "glem", "--resume", "never"])


BAD_OPTIONS = [
    ({"dataset": "wds/", "data_dir": None}, r"dataset 'wds/' needs data_dir"),
    (
        {"images_per_class": 2},
        r"needs random access to images, but webdataset shards are read as a stream; leave it out, or unpack",
    ),
    (
        {"dataset": "digits", "data_dir": None, "train_samples": 9},
        r"train_samples is 9, but only webdataset shards accept it; leave it out",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_options_that_a_stream_does_not_support_are_rejected(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(**{"data_dir": folder, **options})
