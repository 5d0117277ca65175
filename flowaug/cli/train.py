"""The training commands: train-flow and finetune, whose options are dataclasses of ``flowaug.training.options``."""

from collections.abc import Callable

SUMMARIES = {
    "train-flow": "train a flow on your images",
    "finetune": "fine-tune a timm model, with or without flow augmentation",
}


def add_commands(commands) -> None:
    """Add the two commands to the subparsers of ``flowaug``; `training_command` runs them."""
    for name, summary in SUMMARIES.items():
        commands.add_parser(name, help=summary, add_help=False)


def training_command(name: str) -> Callable[..., None] | None:
    """Return the main function of a training command; None for other commands."""
    if name == "train-flow":
        from flowaug.training.train_flow import main

        return main
    if name == "finetune":
        from flowaug.training.finetune import main

        return main
    return None
