"""Options as frozen dataclasses: one declaration gives the type, range, default and help of an option.

The command line and the recipes are two readers of the same dataclasses. Values of either source are checked once,
when a dataclass is created.
"""

import argparse
import ast
import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class OptionError(ValueError):
    """A value that an option cannot have.

    Args:
        name: field name of the option.
        message: what is wrong and what is expected.
    """

    def __init__(self, name: str, message: str):
        super().__init__(message)
        self.name = name


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    bare: str | None = None,
    aliases: tuple[str, ...] = (),
) -> Any:
    """Declare an option: a dataclass field whose annotation is its type.

    Args:
        default: value without command line and recipe.
        help: what the option does and when to change it; the default is added.
        at_least: smallest value.
        above: number that the value must exceed.
        at_most: largest value.
        below: number that the value must stay under.
        metavar: what ``--help`` calls the value.
        bare: value of the option when it is given without one; None makes the value mandatory.
        aliases: further names on the command line, with their dashes.
    """
    limits = {"at least": at_least, "more than": above, "at most": at_most, "less than": below}
    limits = {words: limit for words, limit in limits.items() if limit is not None}
    metadata = {"help": help, "limits": limits, "metavar": metavar, "bare": bare, "aliases": aliases}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """Base of all groups of options: checks every value when it is created."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = _checked(item.name, getattr(self, item.name), hints[item.name], item.metadata["limits"])
            object.__setattr__(self, item.name, value)
        self.check()

    def check(self) -> None:
        """Raise an OptionError for values that contradict each other."""


def option_name(name: str) -> str:
    """Return the name of a field on the command line: ``weight_decay`` is ``--weight-decay``."""
    return "--" + name.replace("_", "-")


def add_options(parser: argparse.ArgumentParser, group: type[Options]) -> None:
    """Add an argument group for a dataclass; options that are not given are absent from the parsed namespace.

    Args:
        parser: the command's parser.
        group: a dataclass; its docstring's first line is the title of the argument group.
    """
    title = (group.__doc__ or group.__name__).partition("\n")[0].rstrip(".")
    arguments, hints = parser.add_argument_group(title), get_type_hints(group)
    for item in dataclasses.fields(group):
        text = item.metadata["help"].replace("%", "%%") + _default_text(item.default)
        keywords: dict[str, Any] = _argument(hints[item.name], item.metadata)
        keywords |= {"dest": item.name, "default": argparse.SUPPRESS}
        arguments.add_argument(*item.metadata["aliases"], option_name(item.name), help=text, **keywords)
        if item.metadata["bare"] is not None:
            off = f"--no-{item.name.replace('_', '-')}"
            arguments.add_argument(off, dest=item.name, action="store_const", const=None, help="switch it off")


def _default_text(default: Any) -> str:
    if default in (None, False, dataclasses.MISSING):
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f" (default: {shown})"


def _argument(hint: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return argparse's keywords for a type; values stay text, which `_checked` converts."""
    kind, _ = _without_none(hint)
    metavar = metadata["metavar"] or {int: "N", float: "X"}.get(kind)
    names = {"metavar": metavar} if metavar else {}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return names | {"metavar": "{" + ",".join(map(str, get_args(kind))) + "}"}
    if get_origin(kind) is dict:
        return {"nargs": "*", "metavar": "KEY=VALUE"}
    if get_origin(kind) is tuple:
        items = get_args(kind)
        return names | ({"nargs": "+"} if items[-1] is Ellipsis else {"nargs": len(items), "metavar": ("LOW", "HIGH")})
    if metadata["bare"] is not None:
        return names | {"nargs": "?", "const": metadata["bare"]}
    return names


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Return a type without ``| None``, and whether it had it."""
    parts = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    return parts[0], type(None) in parts


def _checked(name: str, value: Any, hint: Any, limits: Mapping[str, float]) -> Any:
    """Return the value in its declared type, from text or from YAML."""
    kind, optional = _without_none(hint)
    if value is None and optional:
        return None
    shown = f"{option_name(name)} is {value!r}"
    try:
        converted = _converted(value, kind)
    except (TypeError, ValueError) as error:
        raise OptionError(name, f"{shown}; expected {_described(kind)}") from error
    for number in converted if isinstance(converted, tuple) else (converted,):
        for words, limit in limits.items():
            if not _holds(number, words, limit):
                raise OptionError(name, f"{shown}; expected a number of {_range(limits)}")
    return converted


def _converted(value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        return _choice(value, get_args(kind))
    if get_origin(kind) is dict:
        return _mapping(value)
    if get_origin(kind) is tuple:
        return _several(value, get_args(kind))
    if kind is bool:
        return _exactly(value, bool)
    if kind in (str, Path):
        return kind(_exactly(value, str | Path | int))
    if isinstance(value, bool):
        raise TypeError("a switch is no number")
    if kind is int:
        return int(value) if isinstance(value, str) else _exactly(value, int)
    number = float(value)
    if math.isnan(number):
        raise ValueError("not a number")
    return number


def _exactly(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(type(value).__name__)
    return value


def _choice(value: Any, choices: tuple) -> Any:
    found = next((choice for choice in choices if str(choice) == str(value)), None)
    if found is None or isinstance(value, bool):
        raise ValueError("not a choice")
    return found


def _several(value: Any, items: tuple) -> tuple:
    if isinstance(value, str | Mapping):
        raise TypeError("one value")
    values = tuple(value)
    if items[-1] is not Ellipsis and len(values) != len(items):
        raise ValueError("another number of values")
    return tuple(_converted(each, items[0]) for each in values)


def _mapping(value: Any) -> dict[str, Any]:
    """Return a mapping from a mapping, or from texts ``KEY=VALUE`` whose values are Python literals or text."""
    if isinstance(value, Mapping):
        return {str(_exactly(key, str)): each for key, each in value.items()}
    pairs = [(key, each) for key, mark, each in (_exactly(text, str).partition("=") for text in value) if mark and key]
    if len(pairs) != len(value) or isinstance(value, str):
        raise ValueError("no KEY=VALUE")
    return {key: _literal(each) for key, each in pairs}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _holds(number: float, words: str, limit: float) -> bool:
    tests = {
        "at least": number >= limit,
        "more than": number > limit,
        "at most": number <= limit,
        "less than": number < limit,
    }
    return tests[words]


def _range(limits: Mapping[str, float]) -> str:
    return " and ".join(f"{words} {limit:g}" for words, limit in limits.items())


def _described(kind: Any) -> str:
    """Return what a value of a type looks like, for error messages."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is dict:
        return "KEY=VALUE pairs, in a recipe {key: value, …}"
    if get_origin(kind) is tuple:
        items = get_args(kind)
        count = "one or more" if items[-1] is Ellipsis else len(items)
        return f"{count} values, in a recipe a list [a, b, …]"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    return words[kind]
