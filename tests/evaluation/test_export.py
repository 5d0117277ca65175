import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from flowaug import FlowMixupTransform
from flowaug.data import ImageDataset
from flowaug.evaluation.export import CHUNK, MANIFEST, export
from tests.conftest import NAMES, make_flow, make_pca


def images(count=9, size=8, seed=0):
    pixels = np.random.default_rng(seed).integers(50, 200, (count, size, size, 3), dtype=np.uint8)
    return ImageDataset(pixels, np.arange(count) % 3, NAMES)


def transform(**options):
    flow = make_flow()
    return FlowMixupTransform(flow, make_pca(flow), p=1.0, **options)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read(path):
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def test_folder(tmp_path):
    data = images()
    counts = export(transform(), data, tmp_path, copies=2, originals=True)
    assert counts == {"images": 27, "kept": 0, "seen": 18, "augmented": 18, "rejected": 0, "no_partner": 0}
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == list(NAMES)
    assert len(list((tmp_path / "train" / "ant").iterdir())) == 9
    for i in range(9):
        folder = tmp_path / "train" / NAMES[i % 3]
        copies = [read(folder / f"{i:07d}-{c}.png") for c in range(3)]
        assert (copies[0] == data.images[i]).all()
        assert all((a != b).any() for a, b in ((copies[0], copies[1]), (copies[1], copies[2])))


def test_shards(tmp_path):
    data = images(CHUNK + 3)
    export(transform(), data, tmp_path / "shards", layout="webdataset", split="val")
    export(transform(), data, tmp_path / "folder", split="val")
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    assert [p.name for p in shards] == ["val-01-000000.tar", "val-01-000001.tar"]
    with tarfile.open(shards[1]) as shard:
        assert shard.getnames()[:2] == [f"01-{CHUNK:07d}.png", f"01-{CHUNK:07d}.cls"]
        png, label = (shard.extractfile(name).read() for name in shard.getnames()[:2])
    name = NAMES[CHUNK % 3]
    assert int(label) == CHUNK % 3
    assert png == (tmp_path / "folder" / "val" / name / f"{CHUNK:07d}-1.png").read_bytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_shards(tmp_path):
    import webdataset

    data = images()
    export(transform(), data, tmp_path, layout="webdataset")
    url = str(tmp_path / "train-01-000000.tar")
    rows = list(webdataset.WebDataset(url, shardshuffle=False).decode("pil").to_tuple("png", "cls"))
    assert [label for _, label in rows] == data.targets.tolist()
    assert rows[0][0].size == (8, 8)


@pytest.mark.parametrize("layout", ["folder", "webdataset"])
def test_interrupted_export_continues_to_the_same_files(tmp_path, layout):
    data, options = images(CHUNK + 5), {"copies": 2, "layout": layout, "seed": 3}
    export(transform(), data, tmp_path / "whole", **options)
    export(transform(), data, tmp_path / "cut", **{**options, "copies": 1})
    removed = sorted(p for p in (tmp_path / "cut").rglob("*") if p.suffix in (".png", ".tar"))[1::2]
    for path in removed:
        path.unlink()
    kept = next(p for p in (tmp_path / "cut").rglob("*") if p.suffix in (".png", ".tar"))
    before = kept.stat().st_mtime_ns
    counts = export(transform(seed=9), data, tmp_path / "cut", **options)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert kept.stat().st_mtime_ns == before
    assert counts["kept"] > 0
    assert export(transform(), data, tmp_path / "cut", **options)["images"] == 0


def test_different_seeds_give_different_images(tmp_path):
    data = images()
    for seed in (0, 1):
        export(transform(), data, tmp_path / str(seed), seed=seed)
    first, second = (contents(tmp_path / str(seed) / "train") for seed in (0, 1))
    assert first.keys() == second.keys()
    assert first != second


def test_images_keep_their_sizes(tmp_path):
    paths = []
    for i, size in enumerate([(8, 8), (20, 13), (8, 8), (9, 30)]):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(50, 200, (*size, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    data = ImageDataset(paths, [0, 1, 2, 0], NAMES, root=tmp_path)
    assert export(transform(), data, tmp_path / "out")["augmented"] == 4
    assert read(tmp_path / "out" / "train" / "bee" / "0000001-1.png").shape == (20, 13, 3)
    assert read(tmp_path / "out" / "train" / "ant" / "0000003-1.png").shape == (9, 30, 3)


def test_grey_images(tmp_path):
    flow = make_flow((1, 8, 8))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    data = ImageDataset(pixels, [0, 1, 2, 0], NAMES)
    export(FlowMixupTransform(flow, make_pca(flow), p=1.0), data, tmp_path)
    assert read(tmp_path / "train" / "ant" / "0000000-1.png").shape == (8, 8)


def test_class_names_become_folder_names(tmp_path):
    data = ImageDataset(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], ("T-shirt/top", "Dress"))
    export(transform(), data, tmp_path)
    assert {p.name for p in (tmp_path / "train").iterdir()} == {"T-shirt_top", "Dress"}
    assert json.loads((tmp_path / MANIFEST).read_text())["class_names"] == ["T-shirt/top", "Dress"]


def test_global_generators_are_unchanged(tmp_path):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    export(transform(), images(), tmp_path)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


BAD = [
    ({"layout": "zip"}, "expected one of"),
    ({"copies": 0}, "at least 1"),
    ({"seed": 1}, "its seed is 0, not 1"),
    ({"split": "val"}, "its split is 'train', not 'val'"),
    ({"settings": {"flow": "b"}}, "its flow is 'a', not 'b'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(tmp_path, options, message):
    export(transform(), images(3), tmp_path, settings={"flow": "a"})
    with pytest.raises(ValueError, match=message):
        export(transform(), images(3), tmp_path, **{"settings": {"flow": "a"}, **options})


def test_clashing_class_names(tmp_path):
    data = ImageDataset(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], ("a/b", "a:b"))
    with pytest.raises(ValueError, match="rename the classes"):
        export(transform(), data, tmp_path)


NO_FOLDERS = ["", ".", "..", "... .", " ", "a\0b", "caf\udce9", "x" * 300, "é" * 150]


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_class_names_that_are_no_folders_are_refused_before_anything_is_written(tmp_path, name):
    data = ImageDataset(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], ("ant", name))
    with pytest.raises(ValueError, match=r"the name of class 1 is .*rename"):
        export(transform(), data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["../evil", "..", "", "a/b", "a\0b"])
def test_splits_that_leave_the_folder_are_refused(tmp_path, split):
    for layout in ("folder", "webdataset"):
        with pytest.raises(ValueError, match="split is"):
            export(transform(), images(), tmp_path / "out", split=split, layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[1]", "null", "{", "[" * 100_000])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"export.json is damaged"):
        export(transform(), images(), tmp_path)
