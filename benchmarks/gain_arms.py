"""Configuration of ``augmentation_gain.py``: classifiers, training set sizes, arms, numbers of steps and settings.

An arm is one way to augment the training images, for example standard augmentation or flow mixup.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import timm
from torch import nn

from flowaug.evaluation.metrics import small_image_stem
from flowaug.training.options import FinetuneOptions
from flowaug.training.options.recipes import load_recipe


class Cell(NamedTuple):
    """One training run.

    Attributes:
        classifier: name of the classifier, a key of ``Setup.classifiers``.
        size: number of training images per class, or "all" for the whole training set.
        arm: how the images are augmented, a key of ``ARMS``.
        seed: seed of the subset, the initial weights, the order and the augmentation.
    """

    classifier: str
    size: str
    arm: str
    seed: int


@dataclass(frozen=True)
class Setup:
    """Configuration that all runs of a benchmark share.

    Attributes:
        dataset: name of the data set.
        classifiers: options of ``flowaug finetune`` for each classifier.
        with_rivals: classifiers that are trained with every arm; the others are trained with the main arms only.
        steps: number of optimizer steps, by classifier and size.
        batch_size: images per step.
        flow: options of ``flowaug train-flow``, as a command line.
        settings: settings of each arm, which ``--tune`` chooses.
        by_size: settings that replace those in ``settings``, by size and arm.
        tuned_on: classifier and size that ``--tune`` trains.
        replaced: settings that replace all others, by arm (``--set``).
        folder: folder of the runs.
        length: number of steps of every run; None for the number in ``steps``.
        held_out: number of held-out training images to evaluate on; None for evaluation on the test set.
        full_flow: flow for the size "all"; None to train one.
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
    """Create timm's ResNet18 with a stem for small images that keeps the pooling.

    Pooling cuts the training time to a third.
    """
    model = timm.create_model("resnet18", pretrained=pretrained, **options)
    pooling = model.maxpool
    small_image_stem(model).maxpool = pooling
    return model


def _of_recipe(name: str, *keys: str) -> dict:
    options = load_recipe(name)["classifier"]
    return {key: options[key] for key in keys}


TRAINING = ("opt", "weight_decay", "warmup_ratio")
SWIN = _of_recipe("swin_cifar10", "model", "model_kwargs", "img_size", "pretrained", *TRAINING)
CLASSIFIERS = {  # The learning rates are for batches of 64. lite0 has no amp: depthwise convolutions are slow in bf16.
    "swin": {
        **SWIN,
        "model_kwargs": SWIN["model_kwargs"] | {"patch_size": 4},  # a quarter of the recipe's tokens and time
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
STANDARD = _of_recipe("swin_cifar10", "ratio", "hflip", "reprob")  # SETTINGS adds scale and aa
NO_CROP = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
CONTROL = "spared"
ARMS = {  # name: options of timm's transforms, and the augmentation of ``rivals.create_augmentation`` or None
    "nothing": ({}, None),
    "flow": ({}, "flow"),  # flow mixup with one weight per image
    "standard": (STANDARD, None),
    "flow+standard": (STANDARD, "flow"),  # flow mixup first, in offline copies
    "standard+flow": (STANDARD, "flow"),  # flow mixup last, on batches
    "axes": ({}, "axes"),  # flow mixup with the tuned settings
    "axes+standard": (STANDARD, "axes"),
    "axes-or-standard": (STANDARD, "axes"),  # as axes+standard, but no RandAugment on augmented images
    CONTROL: (STANDARD, "axes"),  # control of axes-or-standard: no RandAugment on the same images, and no flow mixup
    "mixup": ({}, None),
    "cutmix": ({}, None),
    "axes+mixup": ({}, "axes"),  # flow mixup, then timm's Mixup or CutMix
    "axes+cutmix": ({}, "axes"),
    "noise+cutmix": ({}, "noise"),
    "pixel": ({}, "pixel"),
    "latent": ({}, "latent"),
    "noise": ({}, "noise"),
    "gaussian": ({}, "gaussian"),
}
MAIN_ARMS = ("nothing", "axes", "standard", "axes+standard")
FIRST = ("flow+standard", "axes+standard", "axes-or-standard", CONTROL)  # flow mixup before the transforms of images
FLOW_OR_AA = ("axes-or-standard", CONTROL)  # no RandAugment on images that flow mixup augments
BESIDE = {"axes+mixup": "mixup", "axes+cutmix": "cutmix", "noise+cutmix": "cutmix"}  # arm: the arm that it adds to
WHOLE_SEEDS = 3  # the size "all" is trained with seeds below this number
RIVALS = ("mixup", "cutmix", "pixel", "latent", "noise", "gaussian")
COMPETITORS = {  # arm: the arms with one weight per image and with tuned flow mixup that the report compares with it
    **{arm: ("flow", "axes") for arm in RIVALS},
    "flow": (None, "axes"),
    "flow+standard": (None, "axes+standard"),
    "noise+cutmix": (None, "axes+cutmix"),
    CONTROL: (None, "axes-or-standard"),
}
SETTINGS = {  # "p" of "flow" holds for all arms, but timm's Mixup and CutMix apply to every batch
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
MANY = {  # chosen on held-out images with 500 images per class, see docs/gains.md
    "standard": {"aa": "rand-m5-n1-mstd0.5-inc1"},
    "flow": {"steps": 2400, "p": 0.25},
    "axes": {"per_axis": False},
}
BY_SIZE = {"500": MANY, "all": MANY | {"flow": MANY["flow"] | {"steps": 4800}}}
MORE_SETTINGS = {"flow": ("steps",), "axes": ("p",)}  # optional settings, without a value in SETTINGS
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
    """Return the arm that ``arm`` is compared with: the same arm without the augmentation that it adds."""
    return BESIDE.get(arm, "standard" if arm in (*FIRST, "standard+flow") else "nothing")


def cells(setup: Setup, seeds: list[int]) -> list[Cell]:
    """Return all runs, the most informative ones first."""
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
    """Return the names in ``Setup.settings`` whose settings an arm uses."""
    transforms, kind = ARMS[arm]
    standard = {"standard"} if transforms else set()
    mixing = {"flow", kind} if kind else set()
    return standard | mixing | {BESIDE.get(arm, arm)}


def settings_of(name: str, size: str, setup: Setup) -> dict[str, float]:
    """Return the settings of an arm for a size."""
    return setup.settings.get(name, {}) | setup.by_size.get(size, {}).get(name, {}) | setup.replaced.get(name, {})


def options_of(cell: Cell, setup: Setup) -> FinetuneOptions:
    """Return the options of the classifier of a run.

    Raises:
        ValueError: a setting has a value that its option cannot have.
    """
    own = settings_of(BESIDE.get(cell.arm, cell.arm), cell.size, setup)
    mixing = {name: own[name] for name in ("mixup", "cutmix") if name in own}

    transforms = ARMS[cell.arm][0]
    standard = settings_of("standard", cell.size, setup) if transforms else {}

    steps = setup.length or setup.steps[cell.classifier][cell.size]
    common = {"weight_decay": 0.05, "warmup_ratio": 0.1, "batch_size": setup.batch_size, "seed": cell.seed}
    classifier = setup.classifiers[cell.classifier]
    values = NO_CROP | common | mixing | classifier | transforms | standard
    return FinetuneOptions.from_values(values | {"steps": steps})


def flow_options(cell: Cell, setup: Setup) -> list[str]:
    """Return the command line of ``flowaug train-flow`` for the flow of a run.

    The flow has the seed of the subset. All runs of the size "all" share one flow.
    """
    own = settings_of("flow", cell.size, setup)
    subset = [] if cell.size == "all" else ["--images-per-class", cell.size, "--subset-seed", str(cell.seed)]
    seed = "0" if cell.size == "all" else str(cell.seed)
    options = ["--kld-weight", f"{own['kld_weight']:g}", "--model-kwargs", f"hidden={own['hidden']:g}", "--seed", seed]
    steps = ["--steps", f"{own['steps']:g}"] if "steps" in own else []  # last, to override the steps in setup.flow
    return ["--dataset", setup.dataset, *subset, *options, *setup.flow, *steps]
