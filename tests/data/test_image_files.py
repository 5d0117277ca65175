import numpy as np
import pytest
from PIL import Image

from flowaug.data.image_files import check_readable, grey_or_rgb, parallel_map
from flowaug.data.image_folder import scan_folder


def test_scan_finds_nested_files_with_upper_and_lower_case_suffixes_in_order(tmp_path):
    for name in ("b/2.png", "b/sub/1.JPEG", "a/x.webp", "a/x.csv", ".cache/y.png"):
        path = tmp_path / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    classes = scan_folder(tmp_path)
    train = tmp_path / "train"
    assert classes == {"train": {"a": [train / "a/x.webp"], "b": [train / "b/2.png", train / "b/sub/1.JPEG"]}}
    assert list(classes["train"]) == ["a", "b"]


def test_scan_has_the_order_of_paths_and_names_broken_links(tmp_path):
    folder = tmp_path / "train" / "a"
    for name in ("b/1.png", "b-2.png", "b.png", "b/c/0.png", "A.png", ".hidden/z.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "link.png").symlink_to(folder / "b.png")
    (folder / "broken.png").symlink_to(folder / "nothing.png")
    (folder / "loop").symlink_to(folder)
    (folder / "folder.png").mkdir()
    expected = sorted(p for p in folder.rglob("*") if p.suffix == ".png" and (p.is_file() or p.is_symlink()))
    assert len(expected) == 8
    assert scan_folder(tmp_path)["train"]["a"] == expected


def test_only_decoding_finds_a_truncated_file(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)
    assert check_readable([path]) == ["L"]
    path.write_bytes(path.read_bytes()[:2000])
    assert check_readable([path], decode=False) == ["L"]
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as an image \(OSError: .*truncated"):
        check_readable([path])


@pytest.mark.parametrize(("modes", "channels"), [(["L", "1", "I;16", "LA"], 1), (["L", "P"], 3), (["RGBA"], 3)])
def test_grey_or_rgb(modes, channels):
    assert grey_or_rgb(modes) == channels


def test_parallel_map_keeps_the_order_and_prints_nothing_if_it_is_quick(capsys):
    assert list(parallel_map(lambda i: i * i, range(1000), "squaring")) == [i * i for i in range(1000)]
    assert capsys.readouterr().err == ""


def test_parallel_map_raises_the_errors_of_its_function():
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda i: 1 // i, [1, 0], "dividing"))
