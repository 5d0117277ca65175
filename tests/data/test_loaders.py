import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowaug.data import ImageDataset
from flowaug.data.loaders import batches, create_loader, endless_batches, mix_seed

IMAGES = torch.arange(22, dtype=torch.uint8).reshape(11, 2, 1, 1) * 11  # the first pixel of image i is 22 i
LABELS = np.arange(11)


def test_seeds_need_no_numpy_2(monkeypatch):
    """A uint64 of NumPy 1 cannot be shifted by an int."""
    word = SimpleNamespace(generate_state=lambda *_: [Word(2**64 - 1)])
    monkeypatch.setattr(np.random, "SeedSequence", lambda numbers: word)
    assert mix_seed(0, 1) == 2**63 - 1


class Word:
    """An integer that converts to int and does nothing else."""

    def __init__(self, value):
        self.value = value

    def __int__(self):
        return self.value


def labels_of(**options):
    return [y.tolist() for _, y in batches(IMAGES, LABELS, **{"batch_size": 4, **options})]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


def test_batches_are_complete_in_order_and_float_in_the_unit_interval():
    got = list(batches(IMAGES, LABELS, 4))
    assert [len(x) for x, _ in got] == [4, 4, 3]
    x, y = torch.cat([x for x, _ in got]), torch.cat([y for _, y in got])
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(x, IMAGES.double().div(255).float(), rtol=0, atol=1e-7)
    assert y.tolist() == list(range(11))


def test_images_and_labels_stay_together_when_shuffled():
    for x, y in batches(IMAGES, LABELS, 3, shuffle=True):
        assert (x[:, 0, 0, 0] * 255 / 22).round().long().tolist() == y.tolist()


def test_order_depends_on_seed_and_epoch_and_leaves_the_global_generator_unchanged():
    before = torch.get_rng_state()
    orders = [joined(labels_of(shuffle=True, seed=s, epoch=e)) for s, e in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(torch.get_rng_state(), before)
    assert orders[0] == orders[3]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(11)) for order in orders)


def test_drop_last():
    assert labels_of(drop_last=True) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_processes_get_equally_many_training_images_and_all_evaluation_images():
    train = [joined(labels_of(shuffle=True, process_index=i, num_processes=3)) for i in range(3)]
    assert [len(labels) for labels in train] == [3, 3, 3]
    assert len(set(joined(train))) == 9
    evaluation = [joined(labels_of(process_index=i, num_processes=3)) for i in range(3)]
    assert evaluation == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]


BAD_BATCHES = [
    ({"batch_size": 0}, r"batch_size is 0; expected at least 1"),
    (
        {"batch_size": 12, "drop_last": True},
        r"this process has only 11 images and gets no batch; set batch_size to at most 11 or drop_last=False",
    ),
    (
        {"process_index": 2, "num_processes": 2},
        r"process_index is 2 and num_processes is 2; expected 0 <= process_index",
    ),
    ({"targets": LABELS[:5]}, r"11 images but 5 targets"),
    ({"images": IMAGES.float()}, r"images are torch\.float32; expected torch\.uint8.*stack_images"),
]


@pytest.mark.parametrize(("options", "message"), BAD_BATCHES)
def test_bad_arguments_are_rejected_before_the_first_batch(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**{"images": IMAGES, "targets": LABELS, "batch_size": 4, **options})


@pytest.fixture
def dataset():
    return ImageDataset(np.arange(11, dtype=np.uint8).repeat(4).reshape(11, 2, 2), LABELS, [str(i) for i in LABELS])


def to_tensor(image):
    return torch.from_numpy(np.array(image))


def noise(image):
    """Return one random number of each global generator for this image."""
    return torch.tensor([random.random(), np.random.random(), torch.rand(()).item()])  # noqa: NPY002


def one_pass(loader):
    pairs = list(loader)
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def test_loader_applies_the_transform_and_leaves_the_dataset_unchanged(dataset):
    x, y = one_pass(create_loader(dataset, to_tensor, 4, shuffle=False, seed=0))
    assert x[:, 0, 0].tolist() == y.tolist() == list(range(11))
    assert y.dtype == torch.int64
    assert dataset.transform is None


def test_loader_order_changes_by_epoch_and_resumes(dataset):
    loader, resumed = (create_loader(dataset, to_tensor, 4, shuffle=True, seed=1) for _ in range(2))
    orders = [one_pass(loader)[1].tolist() for _ in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    resumed.sampler.set_epoch(2)
    assert one_pass(resumed)[1].tolist() == orders[2]


def test_endless_batches_resume_within_an_epoch(dataset):
    whole, resumed = (create_loader(dataset, noise, 4, shuffle=True, seed=1, drop_last=True) for _ in range(2))
    every = list(itertools.islice(endless_batches(whole, 0), 7))
    rest = list(itertools.islice(endless_batches(resumed, 3), 4))
    for (x, y), (again, labels) in zip(every[3:], rest, strict=True):
        assert torch.equal(x, again)
        assert torch.equal(y, labels)


def test_loaders_divide_the_images_over_processes(dataset):
    train = [create_loader(dataset, to_tensor, 2, True, 0, process_index=i, num_processes=2) for i in range(2)]
    assert [len(loader) for loader in train] == [3, 3]
    assert len(set(joined(one_pass(loader)[1].tolist() for loader in train))) == 10
    evaluation = [create_loader(dataset, to_tensor, 2, False, 0, process_index=i, num_processes=2) for i in range(2)]
    assert sorted(joined(one_pass(loader)[1].tolist() for loader in evaluation)) == list(range(11))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 warns because of PyTorch's threads
def test_random_transforms_depend_on_seed_epoch_and_image_but_not_on_the_workers(dataset):
    loader, resumed = (create_loader(dataset, noise, 3, shuffle=True, seed=1, workers=w) for w in (2, 0))
    draws = [one_pass(loader)[0] for _ in range(2)]
    resumed.sampler.set_epoch(1)
    assert torch.equal(one_pass(resumed)[0], draws[1])
    for generator in range(3):  # of Python, NumPy and PyTorch: no number occurs twice in two epochs
        assert len(set(torch.cat(draws)[:, generator].tolist())) == 22


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_random_transforms_differ_between_processes(dataset):
    loaders = [create_loader(dataset, noise, 6, False, 1, workers=1, process_index=i, num_processes=2) for i in (0, 1)]
    first, second = (one_pass(loader)[0][:5] for loader in loaders)
    assert not (first == second).any()


def test_loader_does_not_change_global_generators(dataset):
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one_pass(create_loader(dataset, noise, 4, shuffle=True, seed=0))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_loader_rejects_a_missing_transform_and_a_batch_that_is_too_large(dataset):
    with pytest.raises(ValueError, match="transform is None; expected a callable from a PIL image"):
        create_loader(dataset, None, 4, shuffle=True, seed=0)
    with pytest.raises(ValueError, match="this process has only 5 images and gets no batch"):
        create_loader(dataset, to_tensor, 8, shuffle=True, seed=0, num_processes=2, drop_last=True)
