"""Default recipes, one per data set: what the scripts use where the command line is silent.

A flow recipe holds the options of ``train_flow.py``, a classifier recipe those of ``finetune.py``; "default" serves
every data set without one of its own.
"""

import argparse
from pathlib import Path

from flowaug.data import load_dataset

FLOW_RECIPES = {
    "default": {
        "model": "mef_small",
        "coupling": "affine",
        "image_size": 32,
        "steps": 20_000,
        "max_epochs": 400,
        "batch_size": 128,
        "lr": 5e-3,
        "warmup_steps": 500,
        "solve_at": 500,
        "kld_weight": 10.0,
        "rank": 64,
        "shift": 2,
        "hflip": 0.5,
    },
    "digits": {
        "model": "mef_tiny",
        "coupling": "affine",
        "image_size": 8,
        "steps": 2000,
        "max_epochs": 400,
        "batch_size": 64,
        "lr": 5e-3,
        "warmup_steps": 50,
        "solve_at": 100,
        "kld_weight": 10.0,
        "rank": 32,
        "shift": 1,
        "hflip": 0.0,
    },
    "fashion_mnist": {
        "model": "mef_tiny",
        "coupling": "affine",
        "image_size": 28,
        "steps": 2000,
        "max_epochs": 400,
        "batch_size": 64,
        "lr": 5e-3,
        "warmup_steps": 50,
        "solve_at": 100,
        "kld_weight": 10.0,
        "rank": 64,
        "shift": 1,
        "hflip": 0.5,
    },
}


def flow_recipe(dataset: str | None) -> dict:
    """Options of ``train_flow.py`` for a data set: its own recipe or the default one."""
    return dict(FLOW_RECIPES.get(dataset, FLOW_RECIPES["default"]))


CLASSIFIER_RECIPES = {
    "default": {
        "model": "resnet18",
        "epochs": 10,
        "batch_size": 64,
        "opt": "adamw",
        "lr": 1e-3,
        "weight_decay": 0.05,
        "warmup_share": 0.05,
        "scale": (0.35, 1.0),
        "ratio": (0.75, 1.3333),
        "hflip": 0.5,
        "flow_aug_p": 0.5,
    },
    "digits": {
        "model": "test_resnet",
        "img_size": 32,
        "pretrained": False,
        "steps": 400,
        "batch_size": 64,
        "opt": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "warmup_share": 0.1,
        "scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "hflip": 0.0,
        "flow_aug_p": 0.5,
    },
    "fashion_mnist": {
        "model": "resnet10t",
        "img_size": 32,
        "pretrained": False,
        "epochs": 10,
        "batch_size": 64,
        "opt": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.05,
        "warmup_share": 0.1,
        "scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "hflip": 0.5,
        "flow_aug_p": 0.5,
    },
}


def classifier_recipe(dataset: str | None) -> dict:
    """Options of ``finetune.py`` for a data set: its own recipe or the default one."""
    return dict(CLASSIFIER_RECIPES.get(dataset, CLASSIFIER_RECIPES["default"]))


def fill_in(options, recipe: dict) -> None:
    """Give every option of a command line that was left out (None) the recipe's value, in place."""
    for name, value in recipe.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def deciding_options(options, skip: tuple[str, ...]) -> dict:
    """Options of a command line as JSON values, without those in ``skip``, which decide no number."""
    return {name: _as_json(value) for name, value in vars(options).items() if name not in skip}


def _as_json(value):
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def add_data_options(parser: argparse.ArgumentParser):
    """Add the options that say which images to train on, which both scripts share; returns their group."""
    group = parser.add_argument_group("data (default: the embedded digits)")
    group.add_argument("--dataset", help="digits, fashion_mnist, wds/ (shards), or timm's torch/NAME or hfds/NAME")
    group.add_argument(
        "--data-dir",
        type=Path,
        help="folder with train/ and val/, one folder per class; or folder or pattern of webdataset shards",
    )
    group.add_argument("--num-classes", type=int, help="how many classes there must be")
    group.add_argument("--class-map", type=Path, help='JSON file: {"class name": label} or a list of names')
    group.add_argument("--train-samples", type=int, help="samples in an epoch of shards; default: counted once")
    group.add_argument("--images-per-class", type=int, help="use only this many training images of each class")
    group.add_argument("--subset-seed", type=int, default=0, help="which images --images-per-class takes")
    return group


def load_split(options, split: str):
    """Open the split "train" or "val" of the data that a command line names."""
    subset = (options.images_per_class, options.subset_seed) if split == "train" else ()
    further = {name: getattr(options, name) for name in ("class_map", "num_classes", "train_samples")}
    return load_dataset(options.dataset, options.data_dir, split, *subset, **further)


def given_data_options(options) -> list[str]:
    """The options of `add_data_options` that were given, as a command line."""
    parser = argparse.ArgumentParser()
    add_data_options(parser)
    given = {name: getattr(options, name) for name in vars(parser.parse_args([]))}
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None]
    return [part for pair in pairs for part in pair]
