"""Recipes: documents in ``recipes/*.yaml`` that hold the options of both scripts where the command line is silent.

A document says in words what it is (``about, command, hardware, hours, expect``), and has the options of
``train_flow.py`` under ``flow``, those of ``finetune.py`` under ``classifier``, and under ``quick`` what differs in a
try that any machine can run. The recipe named after a data set is its default, ``default.yaml`` serves all others and
what a recipe leaves out.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import yaml

from flowaug.data import load_dataset

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
WORDS = ("about", "command", "hardware", "hours", "expect")
PARTS = ("flow", "classifier")
RUN_OPTIONS = ("recipe", "quick", "output", "resume", "save_every", "log_with", "dry_run", "cpu")


def load_recipe(path: str | Path) -> dict:
    """Read and check a recipe.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or with parts that no script reads.
    """
    path = Path(path)
    if not path.is_file():
        here = ", ".join(sorted(p.name for p in FOLDER.glob("*.yaml")))
        raise FileNotFoundError(f"no recipe at {str(path)!r}; those of {str(FOLDER)!r} are {here}")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML ({error})") from error
    known = {*WORDS, *PARTS, "quick"}
    if not isinstance(recipe, dict) or not set(recipe) <= known or not set(recipe.get("quick", {})) <= set(PARTS):
        raise ValueError(f"{path} is no recipe; it may hold {', '.join(sorted(known))}, quick holds {', '.join(PARTS)}")
    return recipe


def recipe_options(part: str, options: argparse.Namespace) -> dict:
    """Options of ``part``, "flow" or "classifier", from ``--recipe``, or from the recipe of ``--dataset``.

    What they leave out comes from the recipe "default", except for its length.
    """
    own = FOLDER / f"{options.dataset or ('default' if options.data_dir else 'digits')}.yaml"
    default = load_recipe(FOLDER / "default.yaml")[part]
    by_data = load_recipe(own) if own.is_file() else {}
    recipe = load_recipe(options.recipe) if options.recipe else by_data
    chosen = recipe.get(part) or by_data.get(part) or {}
    length = {"epochs", "steps"} if {"epochs", "steps"} & set(chosen) else set()
    quick = recipe.get("quick", {}).get(part, {}) if options.quick else {}
    return {name: value for name, value in default.items() if name not in length} | chosen | quick


def parse_with_recipe(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    part: str,
    adjust: Callable[[argparse.Namespace, dict], dict],
) -> argparse.Namespace:
    """Parse a command line, its recipe standing in for what was left out.

    Args:
        parser: of one of the scripts.
        argv: the command line, None for that of the process.
        part: "flow" or "classifier".
        adjust: takes what was given and the recipe's options and returns the options to use.

    Raises:
        ValueError: the recipe has an option that the script does not know, or one value where it takes a list.
    """
    given = parser.parse_args(argv)
    recipe = adjust(given, recipe_options(part, given))
    unknown = sorted(set(recipe) - set(vars(given)))
    if unknown:
        raise ValueError(f"the recipe {given.recipe or given.dataset} gives the {part} unknown options: {unknown}")
    _check_lists(parser, recipe)
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    args.dataset = args.dataset or (None if args.data_dir else "digits")
    return args


def _check_lists(parser: argparse.ArgumentParser, recipe: dict) -> None:
    """Raise a ValueError for one value where the command line takes several."""
    several = {action.dest: action.default for action in parser._actions if action.nargs not in (None, 0, "?")}
    for name, value in recipe.items():
        if name in several and isinstance(value, str | int | float):
            form = "{key: value, …}" if isinstance(several[name], dict) else f"[{value}, …]"
            raise ValueError(f"the recipe gives {name} the one value {value!r}; it takes several: {name}: {form}")


def deciding_options(options, skip: tuple[str, ...]) -> dict:
    """Options of a command line as JSON values, without those that decide no number: in ``skip``, or of any run."""
    return {name: _as_json(value) for name, value in vars(options).items() if name not in (*RUN_OPTIONS, *skip)}


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
