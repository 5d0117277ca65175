"""The ``config.json`` of a checkpoint: one table of its keys and types."""

import inspect
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flowaug.flows.registry import create_flow
from flowaug.flows.sources import PCA, WEIGHTS

FORMAT = "flowaug-1"
MAX_BYTES = 64 * 2**20  # of config.json
ADVICE = "copy the checkpoint again, or save it again with save_flow"
# what decides where weights come from, in create_flow or in timm, and must not come from a file
RESERVED = frozenset(
    name for name, p in inspect.signature(create_flow).parameters.items() if p.kind is not p.VAR_KEYWORD
) | {
    "architecture",
    "cache_dir",
    "checkpoint",
    "checkpoint_path",
    "model_name",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "source",
}


class Key(NamedTuple):
    """What a value of a file must be.

    Attributes:
        expected: words for the error message.
        valid: whether a value is valid.
        required: whether the key must be present.
    """

    expected: str
    valid: Callable[[Any], bool]
    required: bool = False


def _integer(low: float, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _one_of(*types: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in types


def _is_shape(value: Any) -> bool:
    return type(value) is list and len(value) in (1, 3) and all(map(_integer(1, 2**31), value))


def _is_encodable(text: Any) -> bool:
    return type(text) is str and "\0" not in text and not re.search("[\ud800-\udfff]", text)


def _are_names(value: Any) -> bool:
    if value is None:
        return True
    return type(value) is list and all(map(_is_name, value)) and len(set(value)) == len(value)


def _is_name(text: Any) -> bool:
    """Return whether a value can be the name of a folder; bytes that are not UTF-8 are U+DC80 to U+DCFF (PEP 383)."""
    return type(text) is str and _is_encodable(re.sub("[\udc80-\udcff]", "", text))


def _is_hyperparameter(value: Any) -> bool:
    if type(value) is list:
        return all(type(entry) in (bool, int, float, str) for entry in value)
    return value is None or type(value) in (bool, int, float, str)


def _are_overrides(value: Any) -> bool:
    return type(value) is dict and all(map(_is_hyperparameter, value.values()))


def _are_digests(value: Any) -> bool:
    return (
        type(value) is dict
        and WEIGHTS in value
        and set(value) <= {WEIGHTS, PCA}
        and all(type(digest) is str and re.fullmatch("[0-9a-f]{64}", digest) for digest in value.values())
    )


_OVERRIDES = "an object with numbers, strings, booleans, null or lists of them"
_TEXT = Key("a string or null", _one_of(str, type(None)))
_FLAG = Key("true or false", _one_of(bool))

KEYS = {
    "format": Key(repr(FORMAT), lambda value: value == FORMAT, required=True),
    "architecture": Key("the name of a flow, see list_flows()", _one_of(str), required=True),
    "event_shape": Key("a list of one or three positive integers", _is_shape, required=True),
    "num_classes": Key("a positive integer", _integer(1, 2**31), required=True),
    "grey_levels": Key("an integer from 2 to 65536", _integer(2, 2**16), required=True),
    "overrides": Key(_OVERRIDES, _are_overrides, required=True),
    "class_names": Key("a list of distinct names, one per class, or null", _are_names),
    "mixup": Key("an object", _one_of(dict)),
    "recipe": Key("an object", _one_of(dict)),
    "data": _TEXT,
    "sha256": Key(f"an object with the SHA-256 of {WEIGHTS} and perhaps {PCA}", _are_digests, required=True),
}
MIXUP = {
    "p": Key("a number from 0 to 1", _number(0, 1)),
    "alpha": Key("a number of at least 0", _number(0)),
    "partner": Key("a string", _one_of(str)),
    "rank": Key("a positive integer or null", lambda value: value is None or _integer(1)(value)),
    "per_axis": Key("true, false or null", _one_of(bool, type(None))),
    "rescaled": _FLAG,
    "redraws": Key("an integer of at least 0", _integer(0)),
    "luminance": _FLAG,
}
RECIPE = {  # those that the package reads; the others are only shown
    "dataset": _TEXT,
    "data_dir": _TEXT,
    "class_map": _TEXT,
    "model_kwargs": Key(f"{_OVERRIDES}, or null", lambda value: value is None or _are_overrides(value)),
}


def parse_config(path: Path) -> dict:
    """Read and check a ``config.json``.

    Args:
        path: the file.

    Raises:
        ValueError: if the file is not valid JSON, not the config of a flow, or has a missing, unknown or wrong entry.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, expected at most {MAX_BYTES}; it is not the config of a flow"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); the checkpoint is damaged, copy or save it again"
        ) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a flowaug checkpoint of format {FORMAT!r}; make one with flowaug train-flow or save_flow"
        )
    check_config(path, config)
    return config


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check keys and types of a config.

    Args:
        path: the file, for the error message.
        config: its content.

    Raises:
        ValueError: if an entry is missing, unknown or wrong.
    """
    _check_table(path, config, KEYS)
    _check_table(path, config.get("mixup", {}), MIXUP, "mixup.")
    recipe = config.get("recipe", {})
    _check_table(path, {key: recipe[key] for key in RECIPE if key in recipe}, RECIPE, "recipe.")

    _check_names(path, config["overrides"], "overrides.")
    _check_names(path, recipe.get("model_kwargs") or {}, "recipe.model_kwargs.")
    names = config.get("class_names")
    if names and len(names) != config["num_classes"]:
        raise ValueError(
            f"{path}: class_names has {len(names)} entries, expected num_classes = {config['num_classes']}; {ADVICE}"
        )


def _check_table(path: Path, values: Mapping[str, Any], table: Mapping[str, Key], prefix: str = "") -> None:
    for name, key in table.items():
        if name in values and not key.valid(values[name]):
            shown = reprlib.repr(values[name])
            raise ValueError(f"{path}: {prefix}{name} is {shown}, expected {key.expected}; {ADVICE}")
        if key.required and name not in values:
            raise ValueError(f"{path}: {prefix}{name} is missing, expected {key.expected}; {ADVICE}")
    for name, value in values.items():
        if name not in table:
            raise ValueError(
                f"{path}: {prefix}{reprlib.repr(name)} is {reprlib.repr(value)}, but there is no such key; expected "
                f"only {', '.join(table)}; remove it, or update flowaug if a newer version wrote the file"
            )


def _check_names(path: Path, overrides: Mapping[str, Any], prefix: str) -> None:
    for name, value in overrides.items():
        if name in RESERVED:
            raise ValueError(
                f"{path}: {prefix}{name} is {reprlib.repr(value)}, expected only hyperparameters of the architecture: "
                f"{name} decides what is loaded and must not come from a file; remove it if you trust the rest"
            )
