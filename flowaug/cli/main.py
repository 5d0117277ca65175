"""The command ``flowaug``: look at a flow before training with it, check that it keeps labels, write its images."""

import argparse
import sys
from pathlib import Path

import torch

from flowaug.cli import generate as generation_cli
from flowaug.cli.options import data_options, identity, open_data, open_images, random_subset
from flowaug.data import ImageDataset, stack_images
from flowaug.data.images import to_pixels
from flowaug.evaluation.export import FORMATS, export
from flowaug.evaluation.label_preservation import WEIGHTS, label_preservation, write_report
from flowaug.evaluation.oracle import SMALL_STEPS, Oracle, load_oracle, small_oracle
from flowaug.evaluation.pictures import draw_augmented
from flowaug.flows.checkpoint import list_pretrained, read_config
from flowaug.mixup.plan import PARTNERS
from flowaug.mixup.transform import FlowMixupTransform


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="flowaug", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="bundled flows").set_defaults(run=list_flows)
    _preview_options(commands.add_parser("preview", help="write a grid of images, original and augmented"))
    _evaluate_options(
        commands.add_parser("evaluate", help="does it keep labels? an oracle's accuracy before and after")
    )
    _export_options(commands.add_parser("export", help="write an augmented copy of a data set"))
    generation_cli.add_commands(commands)
    return parser.parse_args(argv)


def _common_options(parser: argparse.ArgumentParser, split: str, output: str, what: str) -> None:
    data_options(parser, split)
    parser.add_argument("--rank", type=int, help="leading class axes to move along; default: all fitted")
    parser.add_argument("--luminance", action="store_true", help="let a grey flow move the luminance of RGB images")
    parser.add_argument("--output", type=Path, default=Path(output), help=f"{what} ({output})")


def _mixing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--alpha", type=float, default=1.0, help="weights are drawn from Beta(alpha, alpha)")
    parser.add_argument("--partner", default="bank", choices=PARTNERS, help="where partners come from")
    parser.add_argument("--per-axis", action="store_true", help="a weight for each axis, not one for all of them")
    parser.add_argument("--rescaled", action="store_true", help="keep a class's spread, which mixing shrinks")
    parser.add_argument("--redraws", type=int, default=0, help="draw anew, so many times, what would lose its label")


def _preview_options(parser: argparse.ArgumentParser) -> None:
    _common_options(parser, "val", "preview.png", "where to write the PNG")
    parser.add_argument("--classes", type=int, default=10, help="classes to show, one row each")
    parser.set_defaults(run=preview_flow)


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    _common_options(parser, "val", "runs/evaluate", "folder for the report")
    _mixing_options(parser)
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS, help="shares of the partner")
    parser.add_argument(
        "--oracle",
        help="timm model, folder of finetune.py, hf-hub:… or local-dir:…; default: a small one, trained and kept",
    )
    parser.add_argument("--oracle-checkpoint", type=Path, help="weights of --oracle, trained on this data set")
    parser.add_argument("--oracle-steps", type=int, default=SMALL_STEPS, help="training steps of the small oracle")
    parser.add_argument("--image-size", type=int, help="height and width of the images; default: the flow's own")
    parser.add_argument("--max-images", type=int, default=10_000, help="judge a random subset of larger data sets")
    parser.add_argument("--seed", type=int, default=0, help="seed of partners, subset and small oracle")
    parser.set_defaults(run=evaluate_flow)


def _export_options(parser: argparse.ArgumentParser) -> None:
    _common_options(parser, "train", "runs/export", "folder to write to; an interrupted export goes on")
    parser.add_argument("--copies", type=int, default=1, help="augmented copies of each image")
    parser.add_argument("--originals", action="store_true", help="write the images themselves too")
    parser.add_argument("--format", default="folder", choices=FORMATS, help="image folder of PNGs, or .tar shards")
    parser.add_argument("--p", type=float, default=1.0, help="share of the images that are augmented")
    _mixing_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of the augmentation")
    parser.set_defaults(run=export_images)


def list_flows(args: argparse.Namespace) -> None:
    """Print the bundled flows, one a line."""
    for name in list_pretrained():
        config = read_config(name)
        print(f"{name}: {config['architecture']}, {config['num_classes']} classes, images {config['event_shape']}")


def preview_flow(args: argparse.Namespace) -> None:
    """Write the grid and say where it is."""
    data = open_data(args, args.split)
    transform = _open_transform(args, data)
    images, labels = zip(*data.examples(args.classes), strict=True)
    size = transform.flow.event_shape[1:]
    x = torch.stack([to_pixels(image, size, data.channels) for image in images])
    path = draw_augmented(transform, x, torch.tensor(labels), args.output)
    print(f"{path}: {len(x)} images, original and mixed with a training image of their class")


def evaluate_flow(args: argparse.Namespace) -> None:
    """Write the label-preservation report and say where it is."""
    data = open_images(args, args.split)
    transform = _open_transform(args, data, **_mixing(args))
    data = random_subset(data, args.max_images, args.seed)
    channels = max(data.channels, transform.flow.event_shape[0])
    size = (args.image_size,) * 2 if args.image_size else tuple(transform.flow.event_shape[1:])
    oracle = _oracle(args, data, size, channels)
    images, targets = stack_images(data, size, channels), torch.as_tensor(data.targets)
    report = label_preservation(transform, oracle, images, targets, args.weights, args.seed)
    path = write_report(report, data.class_names, args.output, f"{args.flow} on {data.name} ({args.split})")
    shown = ", ".join(f"{row['accuracy']:.4f} at w = {row['weight']:g}" for row in report["weights"])
    shown += f", {report['drawn']['accuracy']:.4f} as drawn"
    print(f"oracle accuracy {report['original']['accuracy']:.4f} on {len(images)} originals; {shown}")
    print(f"{path}, labels.json, labels.png")


def export_images(args: argparse.Namespace) -> None:
    """Write the copies and say how many."""
    options = {"p": args.p, **_mixing(args)}
    data = open_images(args, args.split)
    transform = _open_transform(args, data, **options)
    settings = {**options, "rank": args.rank, "luminance": args.luminance, "flow": identity(args.flow)}
    names = ("copies", "originals", "split", "seed")
    chosen = {name: getattr(args, name) for name in names}
    counts = export(transform, data, args.output, layout=args.format, settings=settings, **chosen)
    print(
        f"{args.output}: {counts['images']} images written, {counts['kept']} there before; {counts['augmented']} "
        f"augmented, {counts['refused']} sent back by the guard, {counts['no_partner']} without a partner"
    )


def _mixing(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in ("alpha", "partner", "per_axis", "rescaled", "redraws")}


def _open_transform(args: argparse.Namespace, data, **options) -> FlowMixupTransform:
    names = {"class_names": data.class_names}
    return FlowMixupTransform.from_pretrained(args.flow, rank=args.rank, luminance=args.luminance, **names, **options)


def _oracle(args: argparse.Namespace, data: ImageDataset, size: tuple[int, int], channels: int) -> Oracle:
    if args.oracle:
        own = args.oracle_checkpoint, args.image_size, data.class_names
        return load_oracle(args.oracle, len(data.class_names), channels, *own)
    if args.oracle_checkpoint:
        raise ValueError("--oracle-checkpoint needs --oracle, the timm model that the weights belong to")
    if args.split == "train":
        raise ValueError("the small oracle trains on the train split; judge --split val, or give an --oracle")
    cache = args.output.parent / "oracles"
    return small_oracle(open_images(args, "train"), cache, size, channels, args.oracle_steps, args.seed)


def main(argv: list[str] | None = None) -> None:
    """Run a command; one sentence and exit code 1 on failure."""
    try:
        args = parse_args(argv)
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"flowaug: {error}")


if __name__ == "__main__":
    main()
