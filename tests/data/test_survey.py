"""Image files are opened once before work begins, and not again at the next start unless they changed."""

import os
import threading

import numpy as np
import pytest
from PIL import Image

from flowaug.data import load_dataset
from flowaug.data.survey import FolderSurvey


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWAUG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for name in ("ant", "bee"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (20 + i, 30), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that were opened."""
    names, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path: names.append("/".join(path.parts[-3:])) or original(path))
    return names


def start(root, **options):
    """Open both splits, as a training does, and return them."""
    return load_dataset(data_dir=root, **options), load_dataset(data_dir=root, split="val")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def test_each_file_is_opened_once_at_the_first_start_and_never_at_the_second(cache, root, opened):
    first = start(root)
    assert len(opened) == len(set(opened)) == 12
    second = start(root)
    assert len(opened) == 12
    assert [a.fingerprint() for a in first] == [b.fingerprint() for b in second]
    assert {(d.channels, d.image_size) for d in (*first, *second)} == {(1, (20, 30))}
    assert len(list(cache.glob("*.npz"))) == 1


def test_torchvisions_folder_is_opened_once(cache, root, opened):
    for _ in range(2):
        for split in ("train", "val"):
            load_dataset("torch/image_folder", root, split)
    assert len(opened) == len(set(opened)) == 12


def test_only_the_chosen_images_are_decoded_and_they_are_remembered(cache, root, opened, monkeypatch):
    start(root, images_per_class=2)
    opened.clear()
    start(root, images_per_class=2)
    assert opened == []
    start(root)
    assert sorted(set(opened)) == sorted(opened)
    assert len(opened) == 4  # the images that were not chosen


@pytest.mark.parametrize("change", ["content", "time"])
def test_a_changed_file_is_opened_again(cache, root, opened, change):
    start(root)
    opened.clear()
    path = root / "train" / "bee" / "1.png"
    if change == "content":
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path)
    else:
        os.utime(path, ns=(0, 1))
    train, val = start(root)
    assert opened == ["train/bee/1.png"]
    assert train.channels == val.channels == (3 if change == "content" else 1)


def test_new_and_removed_files_are_noticed(cache, root, opened):
    start(root)
    opened.clear()
    (root / "train" / "ant" / "0.png").rename(root / "train" / "ant" / "9.png")
    train, _ = start(root)
    assert opened == ["train/ant/9.png"]
    assert train.image_size == (21, 30)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_a_damaged_cache_is_ignored(cache, root, opened, damage):
    start(root)
    opened.clear()
    (path,) = cache.glob("*.npz")
    if damage == "other":
        np.savez(path, names=np.zeros(3, np.uint8), facts=np.zeros(2))
    else:
        content = {"cut": path.read_bytes()[:-300], "empty": b"", "text": b"no archive"}[damage]
        path.write_bytes(content)
    start(root)
    assert len(opened) == 12
    start(root)
    assert len(opened) == 12


def test_without_a_cache_folder_the_files_are_opened_at_each_start(root, monkeypatch, tmp_path, opened):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLOWAUG_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        load_dataset(data_dir=root)
    assert len(opened) == 24


def test_a_truncated_file_is_reported_at_each_start_until_it_is_replaced(cache, root, opened):
    path = root / "train" / "ant" / "2.png"
    whole = path.read_bytes()
    truncate(path)
    truncate(root / "val" / "bee" / "0.png")  # of the other split
    for _ in range(2):
        with pytest.raises(ValueError, match=r"ant/2\.png cannot be read .*truncated.*; 1 of 8 files are bad"):
            load_dataset(data_dir=root)
    with pytest.raises(ValueError, match=r"bee/0\.png cannot be read .*truncated.*; 1 of 4 files are bad"):
        load_dataset(data_dir=root, split="val")
    path.write_bytes(whole)
    load_dataset(data_dir=root)


def test_a_file_that_is_no_image_is_reported_at_each_start(cache, root):
    (root / "val" / "ant" / "0.png").write_bytes(b"text")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0\.png cannot be read .*; 1 of 12 files are bad"):
            load_dataset(data_dir=root)


def test_of_several_processes_one_opens_the_files_and_the_others_wait(cache, root, opened):
    paths = sorted(root.rglob("*.png"))
    surveys = [FolderSurvey(root, paths) for _ in range(4)]
    threads = [threading.Thread(target=s.open, args=(np.ones(12, bool),)) for s in surveys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 12
    assert all(s.facts["decoded"].all() for s in surveys)
