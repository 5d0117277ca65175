"""Recipes: YAML documents with defaults for the options of the trainings.

A document describes itself in words (``about, command, hardware, hours, expect``). It holds options of
``flowaug train-flow`` under ``flow``, options of ``flowaug finetune`` under ``classifier``, and under ``quick`` the
changes that make a smoke test of it. The recipe named after a data set is the default for that data set; ``default``
serves all others.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from flowaug.data.timm_sources import is_timm
from flowaug.flows.checkpoint import list_pretrained, read_config
from flowaug.training.options import CommandOptions, DataOptions, FinetuneOptions, OptionError, TrainFlowOptions
from flowaug.training.options.fields import option_name
from flowaug.training.options.gaussians import ESTIMATOR_DEFAULTS, SOLVED_ONCE, check_estimator_options

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
WORDS = ("about", "command", "hardware", "hours", "expect")
PARTS = (TrainFlowOptions.part, FinetuneOptions.part)

Command = TypeVar("Command", bound=CommandOptions)


def list_recipes() -> list[str]:
    """Return the names of the recipes that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe, given its path or the name of one that ships with the package.

    Raises:
        FileNotFoundError: there is neither.
    """
    own = FOLDER / f"{Path(source).stem}.yaml"
    for path in (Path(source), own):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no recipe at {str(source)!r}; give a YAML file or one of {', '.join(list_recipes())}")


def load_recipe(source: str | Path) -> dict[str, Any]:
    """Read and check a recipe.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: it is not YAML, or it has parts that no command reads.
    """
    path = find_recipe(source)
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid YAML ({error})") from error
    _check_parts(recipe, {*WORDS, *PARTS, "quick"}, path, "the document")
    _check_parts(recipe.get("quick", {}), set(PARTS), path, "quick")
    for part in PARTS:
        for options in (recipe.get(part, {}), recipe.get("quick", {}).get(part, {})):
            if not isinstance(options, dict):
                raise ValueError(f"{path} is no recipe: {part} is {options!r}; expected a mapping of options")
    return recipe


def _check_parts(content: Any, known: set[str], path: Path, what: str) -> None:
    if not isinstance(content, dict) or not set(content) <= known:
        shown = list(content) if isinstance(content, dict) else repr(content)
        raise ValueError(f"{path} is no recipe: {what} is {shown}; expected keys among {', '.join(sorted(known))}")


def resolve_options(command: type[Command], given: Mapping[str, Any]) -> Command:
    """Merge options: those given, before those of the recipe's quick mode, of the recipe, and the defaults.

    Args:
        command: `TrainFlowOptions` or `FinetuneOptions`.
        given: values by name, as text or typed; ``recipe`` and ``quick`` among them choose the recipe.

    Raises:
        ValueError: an option has a value that it cannot have, or options contradict each other.
        FileNotFoundError: there is no such recipe, or no flow at ``init_from``.
    """
    path = _recipe_path(given)
    chosen = _merged(_layers(command.part, path, bool(given.get("quick")), given))
    chosen = _beside_given_data(chosen, given)
    chosen = _beside_given_flow(chosen, given) if command is TrainFlowOptions else _beside_given_model(chosen, given)
    values = chosen | dict(given)
    if values.get("data_dir") is None:
        values["dataset"] = values.get("dataset") or "digits"
    try:
        options = command.from_values(values)
    except OptionError as error:
        raise error if error.name in given else ValueError(f"{error} (recipe {path})") from error
    _check_idle(options, set(given))
    return options


def _recipe_path(given: Mapping[str, Any]) -> Path:
    if given.get("recipe") is not None:
        return find_recipe(given["recipe"])
    return _recipe_of_data(given.get("dataset"), "default" if given.get("data_dir") else "digits")


def _recipe_of_data(dataset: str | None, otherwise: str) -> Path:
    """Return the recipe that is named after a data set, or the default one."""
    own = FOLDER / f"{(dataset or otherwise).replace('/', '_')}.yaml"
    return own if own.is_file() else FOLDER / "default.yaml"


def _layers(part: str, path: Path, quick: bool, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the options of a part of a recipe and of its quick mode; a missing part is that of its data set."""
    recipe = load_recipe(path)
    if part not in recipe:
        other = next((recipe[name].get("dataset") for name in PARTS if name in recipe), None)
        dataset = given.get("dataset") or (None if given.get("data_dir") else other)
        recipe = load_recipe(_recipe_of_data(dataset, "default"))
    layers = [recipe.get(part, {})]
    return [*layers, recipe.get("quick", {}).get(part, {})] if quick else layers


def _merged(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all layers, later ones first; a layer with a length replaces the length of those before."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _without_length(merged, layer) | dict(layer)
    return merged


def _without_length(options: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    length = {"epochs", "steps"} if {"epochs", "steps"} & set(later) else set()
    return {name: value for name, value in options.items() if name not in length}


def _beside_given_data(chosen: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's options beside data that are given: those replace the recipe's, and its bundled flow.

    A folder alone completes a recipe whose data set needs one (torch/cifar10), unless it is an image folder itself.
    """
    dataset, data_dir = given.get("dataset"), given.get("data_dir")
    if dataset is None and data_dir is None:
        return chosen
    needs_folder = is_timm(chosen.get("dataset")) or chosen.get("dataset") == "wds/"
    if dataset is None and needs_folder and not (Path(data_dir or ".") / "train").is_dir():
        return chosen
    data = {name for name in DataOptions.__dataclass_fields__}
    kept = {name: value for name, value in chosen.items() if name not in data}
    if kept.get("flow_aug") in list_pretrained():
        kept["flow_aug"] = "auto"
    return kept


def _beside_given_model(chosen: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's options beside a given length and model, which take back what depends on them."""
    kept = _without_length(chosen, {name: 1 for name in ("epochs", "steps") if given.get(name) is not None})
    if given.get("model") not in (None, kept.get("model", FinetuneOptions().classifier.model)):
        kept = {name: value for name, value in kept.items() if name not in ("img_size", "pretrained", "model_kwargs")}
    return kept


def _beside_given_flow(chosen: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's options beside a given estimator, and beside a flow to start from.

    A flow to start from decides architecture and image size. Its latents are ready, so the class Gaussians are solved
    for before the first step unless ``solve_at`` is given.
    """
    chosen = chosen | ESTIMATOR_DEFAULTS.get(given.get("estimator", ""), {})
    source = given.get("init_from")
    if source is None:
        return chosen
    decided = [name for name in ("model", "coupling", "image_size", "model_kwargs") if given.get(name)]
    if decided:
        names = ", ".join(map(option_name, decided))
        raise OptionError(decided[0], f"--init-from {source} decides {names}; leave them out")
    config = read_config(source)
    kwargs = dict(config["overrides"])
    coupling = kwargs.pop("coupling", None)
    chosen = chosen | {"model": config["architecture"], "image_size": config["event_shape"][-1]}
    chosen |= {"coupling": coupling, "model_kwargs": kwargs}
    estimator = given.get("estimator") or chosen.get("estimator", "fpi")
    return chosen | ({"solve_at": 0} if estimator in SOLVED_ONCE else {})


def _check_idle(options: CommandOptions, given: set[str]) -> None:
    """Refuse options that were given but that nothing would read."""
    if isinstance(options, TrainFlowOptions):
        check_estimator_options(options.gaussians.estimator, given)
    if isinstance(options, FinetuneOptions) and options.flow_aug.flow_aug is None:
        idle = sorted(name for name in given if name.startswith("flow_aug_"))
        if idle:
            raise OptionError(idle[0], f"{option_name(idle[0])} needs --flow-aug")
