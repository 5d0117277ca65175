"""What the commands of ``flowaug`` share: which flow, which images, and checks of what is typed."""

import argparse
from pathlib import Path

import torch

from flowaug.data import ImageDataset, load_dataset
from flowaug.data.wds.dataset import StreamDataset
from flowaug.flows.checkpoint import read_config


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
    parser.add_argument("--dataset", help="digits, fashion_mnist, torch/…, hfds/…; default: the flow's own")
    parser.add_argument("--data-dir", type=Path, help="folder with train/ and val/, one folder per class; or shards")
    parser.add_argument("--class-map", type=Path, help='JSON file: {"class name": label} or a list of names')


def open_data(args: argparse.Namespace, split: str) -> ImageDataset | StreamDataset:
    """A split of the data set that was asked for, else of that which the flow was trained on."""
    given = args.dataset or args.data_dir
    source = vars(args) if given else read_config(args.flow).get("recipe", {})
    class_map = args.class_map or source.get("class_map")
    return load_dataset(source.get("dataset"), source.get("data_dir"), split, class_map=class_map)


def open_images(args: argparse.Namespace, split: str) -> ImageDataset:
    """As `open_data`, for commands that take images by place."""
    data = open_data(args, split)
    if isinstance(data, StreamDataset):
        raise ValueError(
            f"{data.name} is a stream of shards, but this command takes images by place; unpack it into train/ and "
            "val/ with one folder per class and give that with --data-dir"
        )
    return data


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
