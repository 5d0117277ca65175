"""What the commands of ``flowaug`` share: which flow, which images, and checks of what is typed."""

import argparse
from pathlib import Path

import torch

from flowaug.checkpoint import read_config
from flowaug.data import ImageDataset


def flow_option(parser: argparse.ArgumentParser) -> None:
    """Add the flow, the first argument of every command."""
    parser.add_argument("flow", nargs="?", default="digits", help="folder of a flow, bundled name, hf-hub:… (digits)")


def data_options(parser: argparse.ArgumentParser, split: str) -> None:
    """Add the flow and the images to show it, by default those of a split of its own data set."""
    flow_option(parser)
    source_options(parser)
    parser.add_argument("--split", default=split, choices=("train", "val"), help=f"which images ({split})")


def source_options(parser: argparse.ArgumentParser) -> None:
    """Add where images come from."""
    parser.add_argument("--dataset", help="digits or fashion_mnist; default: what the flow was trained on")
    parser.add_argument("--data-dir", type=Path, help="folder with train/ and val/, one folder per class")


def data_of(args: argparse.Namespace) -> tuple[str | None, str | Path | None]:
    """Data set and folder that were asked for, else those that the flow was trained on."""
    if args.dataset or args.data_dir:
        return args.dataset, args.data_dir
    recipe = read_config(args.flow).get("recipe", {})
    return recipe.get("dataset"), recipe.get("data_dir")


def random_subset(data: ImageDataset, count: int, seed: int) -> ImageDataset:
    """At most ``count`` images, in their order."""
    if len(data) <= count:
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.subset(order[:count].sort().values.numpy())


def identity(flow: str) -> str:
    """What tells the weights and axes of one flow from another's."""
    return "-".join(digest[:16] for digest in read_config(flow)["sha256"].values())


def at_least(least: int):
    """A type for argparse: a whole number that is not smaller."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole


def png(text: str) -> Path:
    """A type for argparse: the name of a PNG, beside which a ``.json`` of that name goes."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png; a .json of the same name goes beside it")
    return Path(text)


def not_negative(text: str) -> float:
    """A type for argparse: a temperature."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0; try 0.7")
    return number
