import gzip

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

from flowaug.data import ImageDataset, builtin, load_dataset, stack_images

HAS_FASHION = (builtin.Path(builtin.FASHION_MNIST_DIR) / "t10k-images-idx3-ubyte.gz").is_file()


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(folder, count=2, size=(6, 5), channels=1, start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        shape = size if channels == 1 else (*size, 3)
        Image.fromarray(pixels(i, *shape)).save(folder / f"{i}.png")


@pytest.fixture
def root(tmp_path):
    """An image folder with cat (3 train, 1 val) and dog (2 train, 1 val): greyscale, 6 high and 5 wide."""
    for part, count, name in (("train", 3, "cat"), ("train", 2, "dog"), ("val", 1, "cat"), ("val", 1, "dog")):
        write_images(tmp_path / "pets" / part / name, count)
    return tmp_path / "pets"


def test_digits_have_all_images_and_17_grey_levels():
    train, val = load_dataset(), load_dataset("digits", split="val")
    assert len(train) + len(val) == 1797
    assert (train.channels, train.image_size, train.grey_levels, train.name) == (1, (8, 8), 17, "digits")
    assert train.class_names == tuple("0123456789")
    levels = np.round(np.arange(17) * 255 / 16)
    np.testing.assert_array_equal(np.unique(train.images), levels)
    image, label = train[3]
    assert image.mode == "L"
    assert type(label) is int
    np.testing.assert_array_equal(np.asarray(image), train.images[3])


def test_digits_split_is_stratified_disjoint_and_independent_of_the_seed():
    train, val = load_dataset(seed=1), load_dataset(split="val", seed=2)
    train_fraction = np.bincount(train.targets) / (np.bincount(train.targets) + np.bincount(val.targets))
    np.testing.assert_allclose(train_fraction, 0.8, atol=0.005)
    from sklearn.datasets import load_digits

    every = sorted(image.tobytes() for image in np.rint(load_digits().images * 255 / 16).astype(np.uint8))
    assert sorted(image.tobytes() for part in (train, val) for image in part.images) == every
    assert train.fingerprint() == load_dataset(seed=5).fingerprint()


def test_images_per_class_is_a_seeded_subset_of_the_training_set():
    full, few, again, other = (
        load_dataset(images_per_class=n, seed=s) for n, s in ((None, 0), (70, 3), (70, 3), (70, 4))
    )
    np.testing.assert_array_equal(np.bincount(few.targets), np.full(10, 70))
    assert {i.tobytes() for i in few.images} <= {i.tobytes() for i in full.images}
    assert len({i.tobytes() for i in few.images}) == 700
    assert few.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.skipif(not HAS_FASHION, reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_complete():
    val = load_dataset("fashion_mnist", split="val")
    np.testing.assert_array_equal(np.bincount(val.targets), np.full(10, 1000))
    assert (val.image_size, val.class_names[0], val.class_names[9]) == ((28, 28), "T-shirt/top", "Ankle boot")
    assert stack_images(val.subset([0, 1]), (28, 28), 1).shape == (2, 1, 28, 28)
    assert 60 < val.images.mean() < 90  # 73 if no header bytes are read as pixels


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_from_the_folder_in_the_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWAUG_FASHION_MNIST", str(tmp_path))
    images, targets = pixels(0, 4, 3, 2), np.array([9, 0, 0, 9], np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", targets)
    train = load_dataset("fashion_mnist")
    np.testing.assert_array_equal(train.images, images)
    np.testing.assert_array_equal(train.targets, targets)
    with pytest.raises(FileNotFoundError, match=r"t10k-images.*apt-get install dataset-fashion-mnist"):
        load_dataset("fashion_mnist", split="val")
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(whole[:-12])
    with pytest.raises(ValueError, match=r"train-images.*is not a complete IDX file .* copy it again"):
        load_dataset("fashion_mnist")


def test_folder_has_sorted_classes_labels_and_files(root):
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    (root / "train" / "cat" / "._0.png").write_text("a Mac's resource fork")
    train, val = load_dataset(data_dir=root), load_dataset(data_dir=str(root), split="val")
    assert train.class_names == val.class_names == ("cat", "dog")
    np.testing.assert_array_equal(train.targets, [0, 0, 0, 1, 1])
    assert [p.name for p in train.images] == ["0.png", "1.png", "2.png", "0.png", "1.png"]
    assert (train.name, train.channels, train.image_size, train.grey_levels) == ("pets", 1, (6, 5), 256)
    np.testing.assert_array_equal(np.asarray(train[2][0]), pixels(2, 6, 5))


@pytest.mark.parametrize("name", ["validation", "test"])
def test_val_may_have_another_name(root, name):
    (root / "val").rename(root / name)
    assert len(load_dataset(data_dir=root, split="val")) == 2


def test_a_single_colour_image_makes_both_splits_rgb(root):
    write_images(root / "val" / "dog", 1, channels=3, start=9)
    for split in ("train", "val"):
        dataset = load_dataset(data_dir=root, split=split)
        assert dataset.channels == 3
        assert {dataset[i][0].mode for i in range(len(dataset))} == {"RGB"}


def test_sixteen_bit_grey_is_scaled_and_palette_transparency_does_not_warn(root):
    ramp = (np.arange(30, dtype=np.uint16).reshape(6, 5) * 2184).clip(0, 65535)
    Image.fromarray(ramp).save(root / "train" / "cat" / "3.png")
    dataset = load_dataset(data_dir=root)
    assert dataset.channels == 1
    np.testing.assert_allclose(np.asarray(dataset[3][0]), ramp / 257, atol=0.5)
    palette = Image.fromarray(pixels(0, 6, 5, 3)).quantize(4)
    palette.save(root / "train" / "dog" / "5.png", transparency=b"\x00\xff\x80\x00")
    assert load_dataset(data_dir=root)[-1][0].mode == "RGB"


def test_transform_and_subset():
    dataset = ImageDataset(pixels(0, 5, 4, 4, 3), [0, 1, 0, 1, 1], "ab", transform=np.asarray)
    assert (dataset.channels, dataset.image_size) == (3, (4, 4))
    part = dataset.subset([4, 0])
    np.testing.assert_array_equal(part.targets, [1, 0])
    np.testing.assert_array_equal(part[0][0], dataset.images[4])
    assert len(dataset) == 5


def test_fingerprint_depends_on_every_part_of_the_data(root):
    images, targets = pixels(0, 4, 3, 3), [0, 1, 1, 0]
    changed = images.copy()
    changed[2, 1, 1] ^= 1
    variants = [
        (images, targets, "ab"),
        (changed, targets, "ab"),
        (images, [0, 1, 0, 1], "ab"),
        (images, targets, "ac"),
    ]
    prints = [ImageDataset(*v).fingerprint() for v in variants]
    assert len(set(prints)) == 4
    assert ImageDataset(images.copy(), targets, "ab", name="other").fingerprint() == prints[0]


def test_fingerprint_of_a_folder_depends_on_its_files_but_not_its_location(root):
    before = load_dataset(data_dir=root).fingerprint()
    moved = root.rename(root.with_name("moved"))
    assert load_dataset(data_dir=moved).fingerprint() == before
    write_images(moved / "train" / "cat", 1, size=(40, 40))
    changed = load_dataset(data_dir=moved).fingerprint()
    (moved / "train" / "cat" / "1.png").rename(moved / "train" / "cat" / "1b.png")
    assert len({before, changed, load_dataset(data_dir=moved).fingerprint()}) == 3


def test_linked_folders_and_files_count_as_in_timm(root, tmp_path):
    write_images(tmp_path / "pool" / "deep", 3)
    write_images(tmp_path / "kitten", 2)
    (root / "train" / "cat" / "batch2").symlink_to(tmp_path / "pool")
    (root / "train" / "cat" / "link.png").symlink_to(tmp_path / "pool" / "deep" / "0.png")
    for part in ("train", "val"):
        (root / part / "kitten").symlink_to(tmp_path / "kitten")
    data = load_dataset(data_dir=root)
    assert np.bincount(data.targets).tolist() == [3 + 3 + 1, 2, 2]
    assert len(data) == len(create_dataset("", root=root / "train")) == len(ImageFolder(root / "train"))
    assert len(load_dataset(data_dir=root, split="val")) == 4


def test_a_link_to_a_folder_above_ends(root):
    (root / "train" / "cat" / "loop").symlink_to(root / "train")
    assert len(load_dataset(data_dir=root)) == 3 + 2 + 2  # the dogs are in train/cat/loop/ too


def test_a_link_to_nothing_is_named(root):
    (root / "train" / "cat" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(ValueError, match=r"gone.png cannot be read as an image \(FileNotFoundError.*1 of 8 files"):
        load_dataset(data_dir=root)


def test_stack_images_keeps_order_and_pixels_and_ignores_the_transform():
    images = pixels(0, 40, 6, 5)
    dataset = ImageDataset(images, np.zeros(40), "a", transform=lambda image: 1 / 0)
    stack = stack_images(dataset, (6, 5), 1)
    assert (stack.dtype, tuple(stack.shape)) == (torch.uint8, (40, 1, 6, 5))
    np.testing.assert_array_equal(stack[:, 0], images)
    np.testing.assert_array_equal(stack_images(dataset, (6, 5), 3), np.repeat(images[:, None], 3, axis=1))


def test_stack_images_shrinks_with_antialiasing_and_puts_channels_first():
    board = (
        np.indices((32, 64)).sum(0) % 2 * 255
    )  # without antialiasing, the result would be black or white instead of grey
    colour = np.zeros((32, 64, 3), np.uint8)
    colour[..., 2] = board
    stack = stack_images(ImageDataset(colour[None], [0], "a"), (4, 8), 3)
    assert tuple(stack.shape) == (1, 3, 4, 8)
    assert stack[0, :2].max() == 0
    assert (stack[0, 2].float() - 127.5).abs().max() < 8


def test_stack_images_does_not_keep_the_aspect_ratio():
    image = np.zeros((32, 64), np.uint8)
    image[8:16, 48:] = 255  # the second quarter from the top, the last from the left
    (small,) = stack_images(ImageDataset(image[None], [0], "a"), (4, 8), 1)[0] > 127
    assert small.nonzero().tolist() == [[1, 6], [1, 7]]


def break_file(root):
    (root / "train" / "cat" / "1.png").write_bytes(b"no image")


def truncate_two(root):
    for part in ("cat/1.png", "dog/0.png"):
        path = root / "train" / part
        Image.fromarray(pixels(0, 64, 64)).save(path)
        path.write_bytes(path.read_bytes()[:2000])


def break_val(root):
    (root / "val" / "dog" / "0.png").write_bytes(b"no image")


def save_float(root):
    Image.fromarray(np.ones((4, 4), np.float32)).save(root / "train" / "dog" / "f.tif")


def empty_class(root):
    (root / "train" / "ant").mkdir()
    write_images(root / "val" / "ant", 1)


def empty_val_class(root):
    (root / "val" / "dog" / "0.png").unlink()


def single_image(root):
    (root / "train" / "dog" / "1.png").unlink()


def extra_val_class(root):
    write_images(root / "val" / "emu", 1)


def missing_val_class(root):
    write_images(root / "train" / "emu", 2)


def no_train(root):
    (root / "train").rename(root / "training")


def no_classes(root):
    (root / "train").rename(root / "old")
    (root / "train").mkdir()


BAD_FOLDERS = [
    (break_file, {}, ValueError, r"cat/1\.png cannot be read .*; 1 of 7 files are bad.* delete or replace"),
    (truncate_two, {}, ValueError, r"cat/1\.png cannot be read .*truncated.*; 2 of 5 files are bad"),
    (break_val, {}, ValueError, r"val/dog/0\.png cannot be read"),
    (save_float, {}, ValueError, r"f\.tif cannot be read .*float pixels .* 8 or 16 bits"),
    (
        empty_class,
        {},
        ValueError,
        r"class 'ant' has no image in .*train; .* at least 2 .*to mix.* remove the class",
    ),
    (
        empty_val_class,
        {"split": "val"},
        ValueError,
        r"class 'dog' has no image in .*val; .* at least 1 image per",
    ),
    (
        single_image,
        {},
        ValueError,
        r"class 'dog' has only 1 image in .*; flowaug needs at least 2 images per class to mix",
    ),
    (extra_val_class, {}, ValueError, r"'emu' is in val/ but not in train/ .*add or remove"),
    (missing_val_class, {"split": "val"}, ValueError, r"'emu' is in train/ but not in val/"),
    (no_train, {}, FileNotFoundError, r"has no train/; expected train/ and val/.*: training, val"),
    (no_classes, {}, ValueError, r"train' has no class folders; expected one folder"),
    (
        None,
        {"images_per_class": 3},
        ValueError,
        r"images_per_class is 3 but class 'dog' has only 2 .*at most 2",
    ),
]


@pytest.mark.parametrize(("damage", "options", "kind", "message"), BAD_FOLDERS)
def test_bad_folder(root, damage, options, kind, message):
    load_dataset(data_dir=root, split=options.get("split", "train"))  # no error before the damage
    if damage:
        damage(root)
    with pytest.raises(kind, match=message):
        load_dataset(data_dir=root, **options)


def test_folder_without_val_has_a_training_set_only(root):
    (root / "val").rename(root / "holdout")
    assert len(load_dataset(data_dir=root)) == 5
    with pytest.raises(FileNotFoundError, match=r"has no val/ or validation/ or test/; .*: holdout, train"):
        load_dataset(data_dir=root, split="val")


BAD_OPTIONS = [
    (
        {"dataset": "digits", "data_dir": "x"},
        ValueError,
        "both dataset='digits' and data_dir='x' .* one of them",
    ),
    (
        {"dataset": "fashion-mnist"},
        ValueError,
        "expected digits, fashion_mnist, torch/…, hfds/… or wds/; did you mean 'fashion_mnist'",
    ),
    ({"dataset": "zzz"}, ValueError, "unknown dataset 'zzz'; .*use data_dir"),
    ({"split": "test"}, ValueError, "unknown split 'test'; expected 'train' or 'val'"),
    ({"images_per_class": 1}, ValueError, "images_per_class is 1; mixing needs at least 2"),
    (
        {"images_per_class": 5, "split": "val"},
        ValueError,
        "training images only; leave it out for split='val'",
    ),
    (
        {"images_per_class": 500},
        ValueError,
        "images_per_class is 500 but class '8' has only 139 .* at most 139",
    ),
    (
        {"data_dir": "/no/where"},
        FileNotFoundError,
        r"'/no/where' does not exist; give a folder with train/ and val/",
    ),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD_OPTIONS)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        load_dataset(**options)


BAD_SOURCES = [
    (np.zeros((2, 3, 4, 4), np.uint8), [0, 0], r"uint8 of shape \(2, 3, 4, 4\); .*channels last"),
    (np.zeros((2, 4, 4)), [0, 0], r"images are float64 .*scale to 0\.\.255"),
    (
        np.zeros((2, 4, 4), np.uint8),
        [0, 0, 0],
        r"2 images but targets of shape \(3,\); expected one label per image",
    ),
    (
        np.zeros((2, 4, 4), np.uint8),
        [0, 2],
        r"run from 0 to 2 but there are 2 class names; expected labels in 0\.\.1",
    ),
    (np.zeros((2, 4, 4), np.uint8), [-1, 0], r"run from -1 to 0"),
    (np.zeros((0, 4, 4), np.uint8), [], r"0 images"),
]


@pytest.mark.parametrize(("images", "targets", "message"), BAD_SOURCES)
def test_bad_source(images, targets, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(images, targets, "ab")


def test_stack_images_rejects_other_channels():
    with pytest.raises(ValueError, match=r"channels is 4; expected 1 \(greyscale\) or 3"):
        stack_images(ImageDataset(pixels(0, 1, 2, 2), [0], "a"), (2, 2), 4)
