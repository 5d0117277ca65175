"""Small flows and image folders that several tests share."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors gain nothing from threads

import numpy as np
import pytest
import torch
from PIL import Image

from flowaug import ClasswisePCA, GaussianParameters, create_flow
from flowaug.training import resume as state
from flowaug.training.options import FinetuneOptions, TrainFlowOptions
from flowaug.training.options.command_line import parse_options

NAMES = ("ant", "bee", "cat")


def finetune_options(*argv):
    """Options of ``flowaug finetune`` for a command line."""
    return parse_options(FinetuneOptions, argv, "finetune.py")


def flow_options(*argv):
    """Options of ``flowaug train-flow`` for a command line."""
    return parse_options(TrainFlowOptions, argv, "train_flow.py")


def make_flow(shape=(3, 8, 8), num_classes=3, seed=0):
    """A float32 flow with random parameters, and class names."""
    flow = create_flow("mef_tiny", event_shape=shape, num_classes=num_classes, steps=1, hidden=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for p in flow.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    mean = torch.randn(num_classes, flow.dim, generator=generator)
    flow.gaussians.assign_(GaussianParameters(mean, torch.ones(num_classes, flow.dim)))
    flow.class_names = NAMES[:num_classes]
    return flow.eval()


def make_pca(flow, per_class=12, rank=4, seed=1):
    """Class axes fitted to the latents of random images."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(flow.gaussians.num_classes, per_class, *flow.event_shape, generator=generator)
    with torch.no_grad():
        return ClasswisePCA.fit([flow.encode(images)[0] for images in x], rank)


def write_photos(root, names):
    """Write an image folder of RGB images of mixed sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (20 + i, 24, 3), dtype=np.uint8) + 50 * (label % 4)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


class Killed(BaseException):
    """Stands for a process that ends between two steps."""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The folder of cached results: not that of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWAUG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def killed_at(monkeypatch):
    """``killed_at(step, main, options)``: run a script until it has saved that step; returns the steps saved."""

    def run(step, main, options):
        saved, original = [], state.save_state

        def save_then_die(path, values):
            original(path, values)
            saved.append(values["step"])
            if values["step"] == step:
                raise Killed

        monkeypatch.setattr(state, "save_state", save_then_die)
        with pytest.raises(Killed):
            main(options)
        return saved

    return run


@pytest.fixture
def flow():
    return make_flow()


@pytest.fixture
def pca(flow):
    return make_pca(flow)
