"""Arguments that several commands share: the flow, the data, and checks of typed values."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from flowaug.data import ImageDataset, load_dataset
from flowaug.data.wds.dataset import StreamDataset
from flowaug.flows.checkpoint import read_config


def add_command(
    commands, name: str, summary: str, description: str, example: str, run: Callable
) -> argparse.ArgumentParser:
    """Add a command to the subparsers of ``flowaug``.

    Args:
        commands: the subparsers.
        name: what the user types.
        summary: one line for ``flowaug --help``.
        description: for the command's own ``--help``.
        example: a command line that works as it stands.
        run: function that receives all arguments as keywords.
    """
    raw = argparse.RawDescriptionHelpFormatter
    epilog = f"example: {example}"
    parser = commands.add_parser(name, help=summary, description=description, epilog=epilog, formatter_class=raw)
    parser.set_defaults(run=run)
    return parser


def add_flow(parser: argparse.ArgumentParser) -> None:
    """Add the flow, the first argument of every command."""
    text = "flow: folder, bundled name, local-dir:FOLDER or hf-hub:ORG/NAME[@REVISION] (default: digits)"
    parser.add_argument("flow", nargs="?", default="digits", help=text)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name a data set."""
    parser.add_argument("--dataset", help="digits, fashion_mnist, torch/NAME, hfds/NAME (default: the flow's own data)")
    parser.add_argument("--data-dir", type=Path, help="folder with train/ and val/, one folder per class; or shards")
    parser.add_argument("--class-map", type=Path, help='JSON file: {"class name": label} or a list of names')


def add_split(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the split to read."""
    parser.add_argument(
        "--split", default=default, choices=("train", "val"), help=f"images to use (default: {default})"
    )


def open_data(
    flow: str, split: str, dataset: str | None, data_dir: Path | None, class_map: Path | None
) -> ImageDataset | StreamDataset:
    """Open a split of the named data set, or else of the data set that the flow was trained on."""
    source = {"dataset": dataset, "data_dir": data_dir}
    if not (dataset or data_dir):
        source = read_config(flow).get("recipe", {})
        class_map = class_map or source.get("class_map")
    return load_dataset(source.get("dataset"), source.get("data_dir"), split, class_map=class_map)


def open_images(
    flow: str, split: str, dataset: str | None, data_dir: Path | None, class_map: Path | None
) -> ImageDataset:
    """Open a split as `open_data` does, for commands that need random access to images.

    Raises:
        ValueError: the data are a stream.
    """
    data = open_data(flow, split, dataset, data_dir, class_map)
    if isinstance(data, StreamDataset):
        raise ValueError(
            f"{data.name} are webdataset shards, but this command needs random access to images; unpack them into "
            "train/ and val/ with one folder per class and pass that folder as --data-dir"
        )
    return data


def random_subset(data: ImageDataset, count: int, seed: int) -> ImageDataset:
    """Return at most ``count`` random images, in their order."""
    if len(data) <= count:
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.subset(order[:count].sort().values.numpy())


def at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number of at least ``least``."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole


def png(text: str) -> Path:
    """Return the path of a PNG, an argparse type; a ``.json`` of the same name is written beside it."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)


def not_negative(text: str) -> float:
    """Return a finite number of at least 0, an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0")
    return number
