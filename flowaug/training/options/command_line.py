"""The command line of a training: one parser for all groups of options, and the recipe beneath it."""

import argparse
from collections.abc import Sequence
from typing import TypeVar

from flowaug.training.options.commands import CommandOptions
from flowaug.training.options.fields import add_options
from flowaug.training.options.recipes import resolve_options

Command = TypeVar("Command", bound=CommandOptions)


def create_parser(command: type[CommandOptions], prog: str, description: str | None) -> argparse.ArgumentParser:
    """Create the parser of a training; options that are not given are absent from what it returns."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for options in command.groups().values():
        add_options(parser, options)
    return parser


def parse_options(
    command: type[Command], argv: Sequence[str] | None, prog: str, description: str | None = None
) -> Command:
    """Read the options of a training from the command line and the recipe.

    Args:
        command: `TrainFlowOptions` or `FinetuneOptions`.
        argv: command line without the program; None for that of the process.
        prog: name of the program in messages.
        description: first lines of ``--help``.

    Raises:
        ValueError: an option has a value that it cannot have, or options contradict each other.
        FileNotFoundError: there is no such recipe.
    """
    given = vars(create_parser(command, prog, description).parse_args(argv))
    return resolve_options(command, given)
