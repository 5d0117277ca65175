"""What ``augmentation_gain.py`` compares: classifiers, sizes, arms, their lengths and settings."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import timm
from torch import nn

from flowaug.evaluation.metrics import small_image_stem
from flowaug.training.options import classifier_parser
from flowaug.training.recipes import FOLDER, load_recipe


class Cell(NamedTuple):
    """One training: which classifier, on how many images of each class ("all" for every image), how, and its seed."""

    classifier: str
    size: str
    arm: str
    seed: int


@dataclass(frozen=True)
class Setup:
    """What the runs of a benchmark have in common.

    Attributes:
        dataset: its name.
        classifiers: name to options of ``finetune.py``.
        with_rivals: classifiers that take every arm on the fewest images, not the main ones alone.
        steps: classifier to size to optimiser steps.
        batch_size: images per step.
        flow: options of ``train_flow.py``.
        settings: arm to what ``--tune`` may change.
        by_size: size to arm to what replaces its settings there.
        replaced: arm to what replaces its settings everywhere.
        tuned_on: classifier and size that ``--tune`` trains.
        folder: where runs are kept.
        length: steps of every run instead of those of its cell.
        held_out: judge by this many other training images; None judges by the test images.
        full_flow: flow for the size "all"; None trains one.
    """

    dataset: str
    classifiers: dict[str, dict]
    with_rivals: tuple[str, ...]
    steps: dict[str, dict[str, int]]
    batch_size: int
    flow: tuple[str, ...]
    settings: dict[str, dict[str, float]]
    by_size: dict[str, dict[str, dict[str, float]]]
    tuned_on: tuple[str, str]
    replaced: dict[str, dict] = field(default_factory=dict)
    folder: Path = Path("runs/augmentation_gain")
    length: int | None = None
    held_out: int | None = None
    full_flow: str | None = None


@timm.models.register_model
def resnet18_pooled(pretrained: bool = False, **options) -> nn.Module:
    """Timm's ResNet18 with the first convolution for small images and its pooling: a third of the time without."""
    model = timm.create_model("resnet18", pretrained=pretrained, **options)
    pooling = model.maxpool
    small_image_stem(model).maxpool = pooling
    return model


def _of_recipe(name: str, *keys: str) -> dict:
    options = load_recipe(FOLDER / f"{name}.yaml")["classifier"]
    return {key: options[key] for key in keys}


TRAINING = ("opt", "weight_decay", "warmup_share")
SWIN = _of_recipe("swin_cifar10", "model", "model_kwargs", "img_size", "pretrained", *TRAINING)
CLASSIFIERS = {  # learning rates for batches of 64; depthwise convolutions are slow in bf16
    "swin": {
        **SWIN,
        "model_kwargs": SWIN["model_kwargs"] | {"patch_size": 4},  # a quarter of the tokens and of the time
        "lr": 0.0005,
        "amp": "bf16",
    },
    "resnet18": {
        "model": "resnet18_pooled",
        "img_size": 28,
        "pretrained": False,
        "opt": "adamw",
        "lr": 0.004,
        "channels_last": True,
        "amp": "bf16",
    },
    "lite0": {
        **_of_recipe("efficientnet_lite0_fashion_mnist", "model", "lr", *TRAINING),
        "img_size": 64,
        "channels_last": True,
    },
}
STANDARD = _of_recipe("swin_cifar10", "ratio", "hflip", "reprob")  # beside them what SETTINGS has
NO_CROP = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
CONTROL = "spared"
ARMS = {  # name to timm's options and the augmentation of the batch, if there is one
    "nothing": ({}, None),
    "flow": ({}, "flow"),
    "standard": (STANDARD, None),
    "flow+standard": (STANDARD, "flow"),  # copies that the flow has moved are cropped, RandAugmented, erased
    "standard+flow": (STANDARD, "flow"),  # the flow gets batches that were
    "axes": ({}, "axes"),  # flow mixup as --tune has left it, the spread of the class kept
    "axes+standard": (STANDARD, "axes"),
    "axes-or-standard": (STANDARD | {"flow_aug_or_aa": True}, "axes"),  # no image that was moved is RandAugmented
    CONTROL: (STANDARD | {"flow_aug_or_aa": True}, "axes"),  # its control: the same images spared, but none moved
    "mixup": ({}, None),
    "cutmix": ({}, None),
    "axes+mixup": ({}, "axes"),  # timm's Mixup, and CutMix, of what the flow has moved
    "axes+cutmix": ({}, "axes"),
    "noise+cutmix": ({}, "noise"),  # and of what noise on the latents has
    "pixel": ({}, "pixel"),
    "latent": ({}, "latent"),
    "noise": ({}, "noise"),
    "gaussian": ({}, "gaussian"),
}
MAIN_ARMS = ("nothing", "axes", "standard", "axes+standard")
FIRST = ("flow+standard", "axes+standard", "axes-or-standard", CONTROL)  # the flow before transforms of images
# Arm to the one whose mixing of the batch it has too
BESIDE = {"axes+mixup": "mixup", "axes+cutmix": "cutmix", "noise+cutmix": "cutmix"}
WHOLE_SEEDS = 3  # the size "all" has the seeds below
RIVALS = ("mixup", "cutmix", "pixel", "latent", "noise", "gaussian")
COMPETITORS = {  # arm to what the report holds against it: flow mixup by one weight, and by one for each axis
    **{arm: ("flow", "axes") for arm in RIVALS},
    "flow": (None, "axes"),
    "flow+standard": (None, "axes+standard"),
    "noise+cutmix": (None, "axes+cutmix"),
    CONTROL: (None, "axes-or-standard"),
}
SETTINGS = {  # rivals move the share p of flow mixup; Mixup and CutMix take every batch, as timm does
    "standard": {"aa": "rand-m5-n1-mstd0.5-inc1", "scale": (0.8, 1.0)},
    "flow": {"kld_weight": 10.0, "hidden": 32, "p": 0.5, "alpha": 1.0, "rank": 64},
    "axes": {"alpha": 1.0, "rank": 64, "per_axis": True, "rescaled": True, "redraws": 0},
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "pixel": {"alpha": 1.0},
    "latent": {"alpha": 1.0},
    "noise": {"strength": 0.5},
    "gaussian": {"strength": 1.0},
}
MANY = {  # chosen on held-out images with 500 of a class: docs/gains.md
    "standard": {"aa": "rand-m5-n1-mstd0.5-inc1"},
    "flow": {"steps": 2400, "p": 0.25},
    "axes": {"per_axis": False},
}
BY_SIZE = {"500": MANY, "all": MANY | {"flow": MANY["flow"] | {"steps": 4800}}}
MORE_SETTINGS = {"flow": ("steps",), "axes": ("p",)}  # that have a value only where they differ from the usual one
FULL = Setup(
    dataset="fashion_mnist",
    classifiers=CLASSIFIERS,
    with_rivals=("swin",),
    steps={
        "resnet18": {"20": 1000, "100": 3000, "500": 3000},
        "lite0": {"20": 800, "100": 2500, "500": 2500},
        "swin": {"20": 2000, "100": 5000, "500": 5000, "all": 5000},
    },
    batch_size=64,
    flow=tuple("--coupling affine --opt muon --lr 0.007 --steps 600 --rank 64 --eval-every 100000".split()),
    settings=SETTINGS,
    by_size=BY_SIZE,
    tuned_on=("resnet18", "20"),
)
SMOKE = Setup(
    dataset="digits",
    classifiers={"tiny": {"model": "test_resnet", "img_size": 32, "pretrained": False, "opt": "adamw", "lr": 2e-3}},
    with_rivals=("tiny",),
    steps={"tiny": {"8": 4}},
    batch_size=16,
    flow=("--rank", "64", "--steps", "4", "--solve-at", "2", "--batch-size", "16"),
    settings=SETTINGS,
    by_size={},
    tuned_on=("tiny", "8"),
)


def base_of(arm: str) -> str:
    """The arm that ``arm`` is compared with: the same without what it adds."""
    return BESIDE.get(arm, "standard" if arm in (*FIRST, "standard+flow") else "nothing")


def cells(setup: Setup, seeds: list[int]) -> list[Cell]:
    """Every run, in the order in which they are worth having."""
    main, further, whole, beyond = [], [], [], []
    for name, sizes in setup.steps.items():
        few, *more = (size for size in sizes if size != "all")
        main += _runs(name, [few, *more], MAIN_ARMS, seeds)
        if name in setup.with_rivals:
            further += _runs(name, [few], [arm for arm in ARMS if arm not in MAIN_ARMS], seeds)
            beyond += _runs(name, more, (*RIVALS, *BESIDE), seeds)
        if "all" in sizes:
            whole += _runs(name, ["all"], MAIN_ARMS, [seed for seed in seeds if seed < WHOLE_SEEDS])
    return main + further + whole + beyond


def _runs(name: str, sizes: Iterable[str], arms: Iterable[str], seeds: Iterable[int]) -> list[Cell]:
    return [Cell(name, size, arm, seed) for size in sizes for seed in seeds for arm in arms]


def parts_of(arm: str) -> set[str]:
    """The names in ``Setup.settings`` that an arm is made of."""
    transforms, kind = ARMS[arm]
    own = {"standard"} if transforms else set()
    return own | ({"flow", kind} if kind else set()) | {BESIDE.get(arm, arm)}


def settings_of(name: str, size: str, setup: Setup) -> dict[str, float]:
    """What ``--tune`` may change of an arm, as it is for a size."""
    return setup.settings.get(name, {}) | setup.by_size.get(size, {}).get(name, {}) | setup.replaced.get(name, {})


def options_of(cell: Cell, setup: Setup) -> argparse.Namespace:
    """Options of ``finetune.py`` for the classifier of a cell."""
    parser, own = classifier_parser(""), settings_of(BESIDE.get(cell.arm, cell.arm), cell.size, setup)
    mixing = {name: own[name] for name in ("mixup", "cutmix") if name in own}
    transforms = ARMS[cell.arm][0]
    standard = settings_of("standard", cell.size, setup) if transforms else {}
    steps = setup.length or setup.steps[cell.classifier][cell.size]
    common = {"weight_decay": 0.05, "warmup_share": 0.1, "batch_size": setup.batch_size, "seed": cell.seed}
    options = NO_CROP | common | mixing | setup.classifiers[cell.classifier] | transforms | standard
    parser.set_defaults(**options, steps=steps)
    return parser.parse_args([])


def flow_options(cell: Cell, setup: Setup) -> list[str]:
    """Options of ``train_flow.py`` for the flow of a cell, seeded as its subset is; one flow for all images."""
    own = settings_of("flow", cell.size, setup)
    longer = ["--steps", f"{own['steps']:g}"] if "steps" in own else []  # after the usual ones, which it overrides
    subset = [] if cell.size == "all" else ["--images-per-class", cell.size, "--subset-seed", str(cell.seed)]
    seed = "0" if cell.size == "all" else str(cell.seed)
    options = ["--kld-weight", f"{own['kld_weight']:g}", "--model-kwargs", f"hidden={own['hidden']:g}", "--seed", seed]
    return ["--dataset", setup.dataset, *subset, *options, *setup.flow, *longer]
