"""The command ``flowaug``."""

import argparse
import sys
from collections.abc import Sequence

from flowaug import __version__
from flowaug.cli import train
from flowaug.cli.threads import set_up_threads

DESCRIPTION = """Flow augmentation for image classifiers: mix each training image with others of its class in the
latent space of a conditional normalizing flow.

Start with "flowaug finetune --flow-aug", which runs on embedded data in a minute."""


def create_parser() -> argparse.ArgumentParser:
    """Create the parser of all commands."""
    from flowaug.cli import augment, generate

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="flowaug", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"flowaug {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for module in (train, augment, generate):
        module.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; end with one sentence and exit code 1 on an error."""
    set_up_threads()  # before any import of torch, hence the imports within functions
    arguments = list(sys.argv[1:] if argv is None else argv)
    training = train.training_command(arguments[0]) if arguments else None
    if training is not None:
        return training(arguments[1:])
    given = vars(create_parser().parse_args(arguments))
    run, _ = given.pop("run"), given.pop("command")

    from flowaug.training.runtime import one_sentence_errors

    with one_sentence_errors("flowaug"):
        return run(**given)
