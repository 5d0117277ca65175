"""The command ``flowaug``: look at a flow before training with it."""

import argparse
import sys
from pathlib import Path

import torch

from flowaug.checkpoint import list_pretrained, read_config
from flowaug.data import load_dataset, stack_images
from flowaug.report import draw_augmented, one_per_class
from flowaug.transform import FlowMixupTransform


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="flowaug", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="bundled flows").set_defaults(run=list_flows)
    preview = commands.add_parser("preview", help="write a grid of images, original and augmented at several weights")
    preview.add_argument("flow", nargs="?", default="digits", help="folder of a flow, bundled name, hf-hub:… (digits)")
    preview.add_argument("--dataset", help="digits or fashion_mnist; default: what the flow was trained on")
    preview.add_argument("--data-dir", type=Path, help="folder with train/ and val/, one folder per class")
    preview.add_argument("--split", default="val", choices=("train", "val"), help="which images to show")
    preview.add_argument("--classes", type=int, default=10, help="classes to show, one row each")
    preview.add_argument("--rank", type=int, help="leading class axes to move along; default: all fitted")
    preview.add_argument("--output", type=Path, default=Path("preview.png"), help="where to write the PNG")
    preview.set_defaults(run=preview_flow)
    return parser.parse_args(argv)


def list_flows(args: argparse.Namespace) -> None:
    """Print the bundled flows, one a line."""
    for name in list_pretrained():
        config = read_config(name)
        print(f"{name}: {config['architecture']}, {config['num_classes']} classes, images {config['event_shape']}")


def preview_flow(args: argparse.Namespace) -> None:
    """Write the grid and say where it is."""
    name, folder = args.dataset, args.data_dir
    if not (name or folder):
        recipe = read_config(args.flow).get("recipe", {})
        name, folder = recipe.get("dataset"), recipe.get("data_dir")
    data = load_dataset(name, folder, args.split)
    transform = FlowMixupTransform.from_pretrained(args.flow, rank=args.rank, class_names=data.class_names)
    chosen = one_per_class(torch.as_tensor(data.targets), args.classes)
    subset = data.subset(chosen.numpy())
    x = stack_images(subset, transform.flow.event_shape[1:], data.channels)
    path = draw_augmented(transform, x, torch.as_tensor(subset.targets), args.output)
    print(f"{path}: {len(x)} images, original and mixed with a training image of their class")


def main(argv: list[str] | None = None) -> None:
    """Run a command; one sentence and exit code 1 on failure."""
    try:
        args = parse_args(argv)
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"flowaug: {error}")


if __name__ == "__main__":
    main()
