"""Offline copies: equality with an export, image sizes, and training on them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowaug import FlowMixupTransform
from flowaug.data import ImageDataset
from flowaug.data.loaders import seeded
from flowaug.data.transforms import DataConfig, train_transform
from flowaug.evaluation.export import CHUNK, export
from flowaug.mixup.offline import AugmentedCopies, merge, to_image
from flowaug.training import finetune
from flowaug.training.logs import describe_mixing, order_warning
from flowaug.training.pipeline import create_copies
from tests.conftest import NAMES, finetune_options, make_flow, make_pca

QUICK = ["--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--cpu", "--batch-size", "16"]


def images(count=9, size=8):
    pixels = np.random.default_rng(0).integers(50, 200, (count, size, size, 3), dtype=np.uint8)
    return ImageDataset(pixels, np.arange(count) % 3, NAMES, name="insects")


def transform(**options):
    flow = make_flow()
    return FlowMixupTransform(flow, make_pca(flow), **{"p": 1.0, **options})


@pytest.mark.parametrize("size", [8, 19], ids=["of the flow", "larger"])
def test_copies_equal_an_export(tmp_path, size):
    data = images(CHUNK + 2, size)
    export(transform(), data, tmp_path, copies=2, seed=3)
    mixed = transform()
    copies = AugmentedCopies(data, mixed, 2, seed=3)
    assert mixed.counts["augmented"] == 2 * len(copies) == 2 * len(data)
    for index, number in ((0, 0), (1, 1), (CHUNK + 1, 0), (CHUNK, 3), (5, 4)):
        image, label = copies.visit(index, number)
        assert label == data.targets[index]
        copy = number % 2
        with Image.open(tmp_path / "train" / NAMES[label] / f"{index:07d}-{copy + 1}.png") as written:
            assert np.array_equal(image, written)


def test_copies_depend_only_on_the_seed():
    data, used = images(), transform()
    first, again, other = (AugmentedCopies(data, used, 1, seed=seed).mixed for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_two_processes_get_the_copies_of_one():
    data, whole = images(CHUNK + 2), transform()
    expected = AugmentedCopies(data, whole, 2, seed=3)
    transforms, sent = [transform(), transform()], []
    for process_index, mixed in enumerate(transforms):
        AugmentedCopies(data, mixed, 2, 3, None, process_index, 2, lambda t: sent.append(t.clone()) or t)
        assert 0 < mixed.counts["seen"] < whole.counts["seen"]
    halves = sent[: len(sent) // 2], sent[len(sent) // 2 :]
    parts = iter(zip(*halves, strict=True))
    got = AugmentedCopies(data, mixed, 2, 3, None, 1, 2, lambda t: sum(next(parts)))
    assert torch.equal(got.mixed, expected.mixed)
    assert torch.equal(got.changed, expected.changed)
    assert mixed.counts == whole.counts


def test_dataset_and_global_generator_are_unchanged():
    data, state = images(), torch.get_rng_state()
    before = data.images.copy()
    copies = AugmentedCopies(data, transform(), 1)
    assert (torch.get_rng_state() == state).all()
    assert (data.images == before).all()
    assert (copies.name, copies.class_names, copies.channels) == ("insects", NAMES, 3)


def test_p_zero_copies_the_images_unchanged():
    data = images()
    copies = AugmentedCopies(data, transform(p=0.0), 2)
    assert all(np.array_equal(copies.visit(i % 9, i // 9)[0], data.images[i % 9]) for i in range(18))


def test_images_keep_their_own_sizes(tmp_path):
    sizes = [(9, 8), (12, 12), (8, 10)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (90, 100 + i, 110)).save(tmp_path / f"{i}.png")
    data = ImageDataset([tmp_path / f"{i}.png" for i in range(3)], [0, 1, 2], NAMES)
    copies = AugmentedCopies(data, transform(), 2)
    assert [copies.visit(i % 3, i // 3)[0].size for i in range(6)] == sizes * 2
    assert [copies[i][0].size for i in range(3)] == sizes
    assert (copies[0][0] == copies.visit(0, 0)[0], copies[0][0] == copies.visit(0, 1)[0]) == (True, False)


def test_copies_of_large_images_are_stored_at_the_size_of_the_flow():
    data = images(size=40)
    copies = AugmentedCopies(data, transform(), 2)
    assert copies.mixed.shape == (18, 3, 8, 8)
    assert copies.mixed.dtype == torch.uint8
    assert copies[0][0].size == (40, 40)
    assert not np.array_equal(copies[0][0], data.images[0])


def test_change_of_the_small_image_is_resized_and_added_to_the_large_one():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    small, mixed = torch.full((3, 8, 8), 100, dtype=torch.uint8), torch.full((3, 8, 8), 140, dtype=torch.uint8)
    assert np.array_equal(merge(image, small, mixed), np.clip(np.asarray(image).astype(int) + 40, 0, 255))
    assert merge(image, small, small.clone()) is image


def test_image_at_the_size_of_the_flow_is_replaced_by_the_mixed_one():
    small, mixed = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(merge(to_image(small), small, mixed), mixed.permute(1, 2, 0))


def test_subset_keeps_images_with_their_labels():
    whole = AugmentedCopies(images(), transform(), 2)
    part = whole.subset([7, 2])
    for number in range(2):
        assert np.array_equal(part.visit(1, number)[0], whole.visit(2, number)[0])
    assert np.array_equal(part[0][0], whole[7][0])
    assert part[0][1] == whole[7][1]


def test_changed_images_get_their_own_transform():
    data = images()
    copies = AugmentedCopies(data, transform(p=0.5), 2, changed_transform=lambda image: ("changed", np.asarray(image)))
    copies.transform = lambda image: ("unchanged", np.asarray(image))
    seen = [(*copies.visit(i % 9, i // 9), i % 9) for i in range(18)]
    assert [kind == "unchanged" for (kind, _), *_ in seen] == [
        np.array_equal(x, data.images[i]) for (_, x), _, i in seen
    ]
    assert {kind for (kind, _), *_ in seen} == {"changed", "unchanged"}
    assert [label for _, label, _ in seen] == [data.targets[i] for *_, i in seen]


def test_no_image_is_changed_by_both_flow_mixup_and_randaugment():
    options = ["--aa", "rand-m9-n4-mstd0.5-inc1", "--scale", "1", "1", "--ratio", "1", "1", "--hflip", "0"]
    options += ["--flow-aug", "x", "--flow-aug-copies", "2", "--flow-aug-or-aa"]
    chosen, data = finetune_options(*options), images()
    config = DataConfig((3, 8, 8), (0.5,) * 3, (0.5,) * 3)
    copies = create_copies(data, transform(p=0.5), chosen.flow_aug, chosen.transforms, config, seed=0)
    copies.transform = train_transform((8, 8), 3, chosen.transforms)
    for i in range(18):
        draws = []
        for seed in range(4):
            with seeded(seed):
                draws.append(copies.visit(i % 9, i // 9)[0])
        varied = any((draw != draws[0]).any() for draw in draws)
        assert varied != copies.changed[i]
    assert 0 < sum(copies.changed) < 18


@pytest.mark.parametrize(("data", "copies", "message"), [(images(), 0, "at least 1"), (object(), 1, "stream")])
def test_bad_arguments(data, copies, message):
    with pytest.raises(ValueError, match=message):
        AugmentedCopies(data, transform(), copies)


def test_finetune_applies_randaugment_to_the_offline_copies(tmp_path, capsys):
    options = ["--flow-aug", "digits", "--flow-aug-copies", "2", "--images-per-class", "8", *QUICK, "--epochs", "2"]
    options += ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5"]
    finetune.main([*options, "--dry-run", "--output", str(tmp_path / "plan")])
    plan = " ".join(capsys.readouterr().out.split())
    assert "10 steps" in plan
    mixing = "images (1, 8, 8); p = 0.5, alpha = 0.3, one weight per principal component"
    assert f"{mixing}; --flow-aug-copies takes 1 MiB of memory" in plan
    finetune.main([*options, "--output", str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    share = f"{metrics['flow_aug']['augmented'] / 160:.0%}"
    assert f"flow mixup augmented {share} of the images\n" in (said := capsys.readouterr().out)
    assert "warning" not in said
    assert metrics["steps"] == 10  # 80 images, batches of 16, two epochs
    assert metrics["flow_aug"]["seen"] == 160  # two copies of each
    assert metrics["flow_aug"]["rejected"] == 0  # the images are like those the flow was trained on
    assert metrics["flow_aug"]["augmented"] > 50


def test_flow_mixup_after_randaugment_gives_a_warning(tmp_path, capsys):
    options = ["--flow-aug", "digits", "--images-per-class", "8", *QUICK]
    options += ["--steps", "1", "--aa", "rand-m9-mstd0.5-inc1"]
    finetune.main([*options, "--output", str(tmp_path)])
    said = capsys.readouterr().out
    warning = "warning: flow mixup runs after --aa; train the flow with the same --aa"
    assert f"{warning}, or use --flow-aug-copies N to run it before\n" in said
    assert order_warning("rand-m9", None, streamed=True) == warning
    assert order_warning("rand-m9", 2, streamed=False) == ""
    assert order_warning(None, None, streamed=False) == ""


def test_many_rejected_images_are_reported_with_advice():
    few, many = ({"seen": 40, "augmented": 20 - n, "rejected": n, "no_partner": 0} for n in (5, 8))
    assert describe_mixing(few, can_copy=True) == "flow mixup augmented 38% of the images"
    said = describe_mixing(many, can_copy=True)
    assert "augmented 30% of the images; 40% of the selected images were rejected" in said
    assert "left unchanged; use --flow-aug-copies N to augment before --aa, or train the flow longer" in said
    assert "left unchanged; train the flow longer" in describe_mixing(many, can_copy=False)
    assert describe_mixing(dict.fromkeys(many, 0), can_copy=False) == "flow mixup augmented 0% of the images"


@pytest.mark.parametrize("more", [[], ["--aa", "rand-m9-mstd0.5-inc1", "--flow-aug-or-aa"]], ids=["plain", "or-aa"])
def test_interrupted_run_on_copies_resumes_to_the_same_weights(tmp_path, killed_at, more):
    options = ["--flow-aug", "digits", "--flow-aug-copies", "2", "--images-per-class", "4", *QUICK, "--steps", "5"]
    options += ["--save-every", "1", *more]
    finetune.main([*options, "--output", str(tmp_path / "whole")])
    killed_at(3, finetune.main, [*options, "--output", str(tmp_path / "cut")])
    finetune.main([*options, "--output", str(tmp_path / "cut")])
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    counts = [json.loads((tmp_path / run / "metrics.json").read_text())["flow_aug"] for run in ("cut", "whole")]
    assert counts[0] == counts[1]
