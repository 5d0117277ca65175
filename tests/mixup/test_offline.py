"""Augmented copies in memory: those of an export, whatever the sizes, and what a classifier trains on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from flowaug import FlowMixupTransform
from flowaug.data import ImageDataset
from flowaug.data.loaders import seeded
from flowaug.data.transforms import train_transform
from flowaug.evaluation.export import CHUNK, export
from flowaug.mixup.offline import AugmentedCopies, merge, to_image
from flowaug.training import finetune
from flowaug.training.logs import describe_mixing, describe_order
from flowaug.training.pipeline import create_copies
from tests.conftest import NAMES, make_flow, make_pca

QUICK = ["--model", "test_resnet", "--no-pretrained", "--img-size", "32", "--cpu", "--batch-size", "16"]


def images(count=9, size=8):
    pixels = np.random.default_rng(0).integers(50, 200, (count, size, size, 3), dtype=np.uint8)
    return ImageDataset(pixels, np.arange(count) % 3, NAMES, name="insects")


def transform(**options):
    flow = make_flow()
    return FlowMixupTransform(flow, make_pca(flow), **{"p": 1.0, **options})


@pytest.mark.parametrize("size", [8, 19], ids=["of the flow", "larger"])
def test_copies_are_those_of_an_export(tmp_path, size):
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


def test_copies_depend_on_the_seed_and_not_on_what_the_transform_did_before():
    data, used = images(), transform()
    first, again, other = (AugmentedCopies(data, used, 1, seed=seed).mixed for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_processes_share_the_work_and_get_the_copies_of_one():
    data, whole = images(CHUNK + 2), transform()
    expected = AugmentedCopies(data, whole, 2, seed=3)
    shares, sent = [transform(), transform()], []
    for rank, mixed in enumerate(shares):
        AugmentedCopies(data, mixed, 2, 3, None, rank, 2, lambda t: sent.append(t.clone()) or t)
        assert 0 < mixed.counts["seen"] < whole.counts["seen"]
    halves = sent[: len(sent) // 2], sent[len(sent) // 2 :]
    places = iter(zip(*halves, strict=True))
    got = AugmentedCopies(data, mixed, 2, 3, None, 1, 2, lambda t: sum(next(places)))
    assert torch.equal(got.mixed, expected.mixed)
    assert torch.equal(got.moved, expected.moved)
    assert mixed.counts == whole.counts


def test_the_original_and_the_global_generators_stay_as_they_are():
    data, state = images(), torch.get_rng_state()
    before = data.images.copy()
    copies = AugmentedCopies(data, transform(), 1)
    assert (torch.get_rng_state() == state).all()
    assert (data.images == before).all()
    assert (copies.name, copies.class_names, copies.channels) == ("insects", NAMES, 3)


def test_a_share_of_zero_copies_the_images():
    data = images()
    copies = AugmentedCopies(data, transform(p=0.0), 2)
    assert all(np.array_equal(copies.visit(i % 9, i // 9)[0], data.images[i % 9]) for i in range(18))


def test_images_of_several_sizes_keep_them(tmp_path):
    sizes = [(9, 8), (12, 12), (8, 10)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (90, 100 + i, 110)).save(tmp_path / f"{i}.png")
    data = ImageDataset([tmp_path / f"{i}.png" for i in range(3)], [0, 1, 2], NAMES)
    copies = AugmentedCopies(data, transform(), 2)
    assert [copies.visit(i % 3, i // 3)[0].size for i in range(6)] == sizes * 2
    assert [copies[i][0].size for i in range(3)] == sizes
    assert (copies[0][0] == copies.visit(0, 0)[0], copies[0][0] == copies.visit(0, 1)[0]) == (True, False)


def test_copies_of_large_images_take_the_memory_of_the_flows_small_ones():
    data = images(size=40)
    copies = AugmentedCopies(data, transform(), 2)
    assert copies.mixed.shape == (18, 3, 8, 8)
    assert copies.mixed.dtype == torch.uint8
    assert copies[0][0].size == (40, 40)
    assert not np.array_equal(copies[0][0], data.images[0])


def test_the_change_of_a_small_image_is_enlarged_and_added_to_the_large_one():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    small, mixed = torch.full((3, 8, 8), 100, dtype=torch.uint8), torch.full((3, 8, 8), 140, dtype=torch.uint8)
    assert np.array_equal(merge(image, small, mixed), np.clip(np.asarray(image).astype(int) + 40, 0, 255))
    assert merge(image, small, small.clone()) is image


def test_an_image_of_the_flows_size_becomes_the_mixed_one():
    small, mixed = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(merge(to_image(small), small, mixed), mixed.permute(1, 2, 0))


def test_a_part_of_the_copies_keeps_each_image_with_its_label():
    whole = AugmentedCopies(images(), transform(), 2)
    part = whole.subset([7, 2])
    for number in range(2):
        assert np.array_equal(part.visit(1, number)[0], whole.visit(2, number)[0])
    assert np.array_equal(part[0][0], whole[7][0])
    assert part[0][1] == whole[7][1]


def test_images_that_the_flow_has_moved_take_a_transform_of_their_own():
    data = images()
    copies = AugmentedCopies(data, transform(p=0.5), 2, for_moved=lambda image: ("moved", np.asarray(image)))
    copies.transform = lambda image: ("still", np.asarray(image))
    seen = [(*copies.visit(i % 9, i // 9), i % 9) for i in range(18)]
    assert [kind == "still" for (kind, _), *_ in seen] == [np.array_equal(x, data.images[i]) for (_, x), _, i in seen]
    assert {kind for (kind, _), *_ in seen} == {"moved", "still"}
    assert [label for _, label, _ in seen] == [data.targets[i] for *_, i in seen]


def test_either_the_flow_or_randaugment_changes_an_image():
    options = ["--aa", "rand-m9-n4-mstd0.5-inc1", "--scale", "1", "1", "--ratio", "1", "1", "--hflip", "0"]
    options += ["--flow-aug", "x", "--flow-aug-copies", "2", "--flow-aug-or-aa"]
    args, data = finetune.parse_args(options), images()
    copies = create_copies(args, data, transform(p=0.5), (3, 8, 8))
    copies.transform = train_transform(8, 3, args)
    for i in range(18):
        draws = []
        for seed in range(4):
            with seeded(seed):
                draws.append(copies.visit(i % 9, i // 9)[0])
        varied = any((draw != draws[0]).any() for draw in draws)
        assert varied != copies.moved[i]
    assert 0 < sum(copies.moved) < 18


@pytest.mark.parametrize(("data", "copies", "message"), [(images(), 0, "at least 1"), (object(), 1, "stream")])
def test_bad_arguments(data, copies, message):
    with pytest.raises(ValueError, match=message):
        AugmentedCopies(data, transform(), copies)


def test_finetune_trains_on_copies_that_randaugment_changes_after_the_flow(tmp_path, capsys):
    options = ["--flow-aug", "digits", "--flow-aug-copies", "2", "--images-per-class", "8", *QUICK, "--epochs", "2"]
    options += ["--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.5"]
    finetune.main([*options, "--dry-run", "--output", str(tmp_path / "plan")])
    plan = " ".join(capsys.readouterr().out.split())
    assert "10 steps" in plan
    mixing = "for images (1, 8, 8), p = 0.5, a weight for each class axis"
    assert f"{mixing}; --flow-aug-copies takes 0.00 GiB on the host" in plan
    finetune.main([*options, "--output", str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    share = f"{metrics['flow_aug']['augmented'] / 160:.0%}"
    assert f"flow mixup changed {share} of the images\n" in (said := capsys.readouterr().out)
    assert "that --aa has changed" not in said
    assert metrics["steps"] == 10  # 80 images, batches of 16, two epochs
    assert metrics["flow_aug"]["seen"] == 160  # two copies of each
    assert metrics["flow_aug"]["refused"] == 0  # the flow meets digits as it knows them
    assert metrics["flow_aug"]["augmented"] > 50


def test_a_flow_that_gets_what_randaugment_has_changed_is_pointed_out_first(tmp_path, capsys):
    options = ["--flow-aug", "digits", "--images-per-class", "8", *QUICK]
    options += ["--steps", "1", "--aa", "rand-m9-mstd0.5-inc1"]
    finetune.main([*options, "--output", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.startswith("the flow gets images that --aa has changed: train it with the same --aa, or let it move")
    assert describe_order(finetune.parse_args([*options, "--dataset", "wds/"])).endswith("with the same --aa")
    assert describe_order(finetune.parse_args([*options, "--flow-aug-copies", "2"])) == ""


def test_much_that_the_guard_refuses_is_said_with_a_way_out():
    few, much = ({"seen": 40, "augmented": 20 - n, "refused": n, "no_partner": 0} for n in (5, 8))
    assert describe_mixing(few, can_move_first=True) == "flow mixup changed 38% of the images"
    said = describe_mixing(much, can_move_first=True)
    assert "changed 30% of the images; 40% of those drawn went back" in said
    assert "(--flow-aug-copies N) or train the flow for longer" in said
    assert "came of them; train the flow for longer" in describe_mixing(much, can_move_first=False)
    assert describe_mixing(dict.fromkeys(much, 0), can_move_first=False) == "flow mixup changed 0% of the images"


@pytest.mark.parametrize("more", [[], ["--aa", "rand-m9-mstd0.5-inc1", "--flow-aug-or-aa"]], ids=["plain", "or-aa"])
def test_a_killed_run_on_copies_resumes_to_the_same_weights(tmp_path, killed_at, more):
    options = ["--flow-aug", "digits", "--flow-aug-copies", "2", "--images-per-class", "4", *QUICK, "--steps", "5"]
    options += ["--save-every", "1", *more]
    finetune.main([*options, "--output", str(tmp_path / "whole")])
    killed_at(3, finetune.main, [*options, "--output", str(tmp_path / "cut")])
    finetune.main([*options, "--output", str(tmp_path / "cut")])
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    counts = [json.loads((tmp_path / run / "metrics.json").read_text())["flow_aug"] for run in ("cut", "whole")]
    assert counts[0] == counts[1]
