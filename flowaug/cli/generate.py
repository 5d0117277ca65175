"""The commands of ``flowaug`` that show and write what a flow generates: sample, interpolate, map, generate."""

import argparse
from pathlib import Path

import torch

from flowaug.cli.options import (
    at_least,
    data_options,
    flow_option,
    identity,
    not_negative,
    open_images,
    png,
    random_subset,
    source_options,
)
from flowaug.data import ImageDataset, stack_images
from flowaug.evaluation.export import FORMATS, generate
from flowaug.evaluation.pictures import class_labels, draw_samples
from flowaug.evaluation.plots import image_grid, scatter
from flowaug.evaluation.sampling import MAPS, PATHS, choose_pairs, interpolate, latent_map, rfcm
from flowaug.files import write_json
from flowaug.flows.checkpoint import load_flow
from flowaug.flows.flow import Flow
from flowaug.flows.passes import ImageTable
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.checks import check_class_names

SAMPLE = """Write a grid of images drawn from the class Gaussians, a row per class, and a .json beside it that says how.

Read it by rows: does each show its class, and are its images different from each other? A row of nearly equal images
asks for a higher temperature, broken images ask for a lower one. The same seed draws the same images again."""
SAMPLE_EXAMPLE = "flowaug sample digits --temperature 0.5 --seed 1 --output cold.png"
INTERPOLATE = """Write a grid of walks between two images in the latent space, a row per pair, and a .json beside it.

Within a class every image on the way should show that class: it is what the augmentation relies on. With --across the
label changes on the way, and the middle shows what lies between two classes. "linear" cuts through the middle of the
class, where images are smoother than any real one; "rescaled" and "spherical" keep the distance from the class mean."""
INTERPOLATE_EXAMPLE = "flowaug interpolate digits --path spherical --across"
MAP = """Write a scatter of the latents of a split, coloured by class, and a .json beside it with the coordinates.

"pca" is a linear view along the two widest directions of all latents: classes that come apart in it are apart, those
that overlap may differ elsewhere. "tsne" keeps neighbours together and nothing else: read which points are beside each
other, not how far the groups are apart."""
MAP_EXAMPLE = "flowaug map digits --method tsne --output map.png"
GENERATE = """Write a labelled data set that is drawn from the class Gaussians: a folder per class, or .tar shards.

An interrupted run goes on where it stopped and ends in the same files. --rfcm draws from the full covariance of each
class, estimated anew from the latents of the training images (the papers' RFCM), instead of the flow's own diagonal
one."""
GENERATE_EXAMPLE = "flowaug generate digits --per-class 100 --rfcm --output runs/generated"


def add_commands(commands) -> None:
    """Add the four commands to the subparsers of ``flowaug``."""
    _sample_options(_add(commands, "sample", "write a grid of images drawn from a flow", SAMPLE, SAMPLE_EXAMPLE))
    help_text = "write walks between pairs of images in the latent space"
    _interpolate_options(_add(commands, "interpolate", help_text, INTERPOLATE, INTERPOLATE_EXAMPLE))
    _map_options(_add(commands, "map", "write a scatter of the latents by class", MAP, MAP_EXAMPLE))
    help_text = "write a labelled data set drawn from a flow"
    _generate_options(_add(commands, "generate", help_text, GENERATE, GENERATE_EXAMPLE))


def _add(commands, name: str, help_text: str, description: str, example: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    epilog = f"example: {example}"
    return commands.add_parser(name, help=help_text, description=description, epilog=epilog, formatter_class=raw)


def _draw_options(parser: argparse.ArgumentParser, temperature: float, per_class: int) -> None:
    flow_option(parser)
    count = f"images of each class ({per_class})"
    parser.add_argument("--per-class", type=at_least(1), default=per_class, metavar="N", help=count)
    scale = f"scales the covariance: 0 gives the class means, 1 the density itself ({temperature})"
    parser.add_argument("--temperature", type=not_negative, default=temperature, metavar="T", help=scale)
    parser.add_argument("--rfcm", action="store_true", help="draw from the full covariance of the training latents")
    source_options(parser)
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the draws (0)")


def _sample_options(parser: argparse.ArgumentParser) -> None:
    _draw_options(parser, 0.7, 8)
    parser.add_argument("--classes", type=at_least(1), default=10, metavar="N", help="classes to show, a row each (10)")
    _png_option(parser, "samples.png")
    parser.set_defaults(run=sample_flow)


def _interpolate_options(parser: argparse.ArgumentParser) -> None:
    data_options(parser, "val")
    parser.add_argument("--path", default="linear", choices=PATHS, help="which way (linear)")
    parser.add_argument("--across", action="store_true", help="pairs of different classes instead of one class")
    parser.add_argument("--pairs", type=at_least(1), default=10, metavar="N", help="rows (10)")
    parser.add_argument(
        "--steps", type=at_least(2), default=9, metavar="N", help="images on the way, with both ends (9)"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the choice of pairs (0)")
    _png_option(parser, "interpolation.png")
    parser.set_defaults(run=interpolate_flow)


def _map_options(parser: argparse.ArgumentParser) -> None:
    data_options(parser, "val")
    parser.add_argument("--method", default="pca", choices=MAPS, help="which projection to the plane (pca)")
    most = "take a random subset of larger splits (2000)"
    parser.add_argument("--max-images", type=at_least(4), default=2000, metavar="N", help=most)
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the method and the subset (0)")
    _png_option(parser, "map.png")
    parser.set_defaults(run=map_flow)


def _generate_options(parser: argparse.ArgumentParser) -> None:
    _draw_options(parser, 1.0, 100)
    parser.add_argument("--format", default="folder", choices=FORMATS, help="image folder of PNGs, or .tar shards")
    parser.add_argument("--split", default="train", choices=("train", "val"), help="what the folder is called (train)")
    where = "folder to write to; an interrupted run goes on (runs/generated)"
    parser.add_argument("--output", type=Path, default=Path("runs/generated"), help=where)
    parser.set_defaults(run=generate_images)


def _png_option(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--output", type=png, default=Path(name), help=f"where to write the PNG ({name})")


def sample_flow(args: argparse.Namespace) -> None:
    """Write the grid and say where it is."""
    flow = load_flow(args.flow)
    covariance, facts = _covariance(args, flow)
    options = {"temperature": args.temperature, "seed": args.seed}
    draw_samples(flow, args.output, columns=args.per_class, classes=args.classes, gaussians=covariance, **options)
    shown = class_labels(flow, range(min(args.classes, flow.gaussians.num_classes)))
    _write_facts(args, **options, per_class=args.per_class, classes=shown, **facts)
    print(
        f"{args.output}: {args.per_class} samples of each of {len(shown)} classes at temperature {args.temperature:g}"
    )


def interpolate_flow(args: argparse.Namespace) -> None:
    """Write the grid and say where it is."""
    flow, data = load_flow(args.flow), _images_of(args)
    check_class_names(flow.class_names, data.class_names)
    pairs = choose_pairs(torch.as_tensor(data.targets), args.pairs, args.across, args.seed)
    subset = data.subset(pairs.flatten().numpy())
    images = stack_images(subset, flow.event_shape[1:], flow.event_shape[0]).unflatten(0, (-1, 2))
    targets = torch.as_tensor(subset.targets).unflatten(0, (-1, 2))
    walks = interpolate(flow, images, targets, args.steps, args.path)
    rows = [" → ".join(dict.fromkeys(class_labels(flow, pair))) for pair in targets.tolist()]
    columns = [f"w = {w:.3g}" for w in torch.linspace(0, 1, args.steps).tolist()]
    image_grid(walks, args.output, rows, columns, f"{args.path} paths; w = share of the image on the right")
    facts = {name: getattr(args, name) for name in ("path", "across", "steps", "split", "seed")}
    _write_facts(args, **facts, data=data.name, images=pairs.tolist(), labels=targets.tolist())
    print(
        f"{args.output}: {len(pairs)} {args.path} paths between images of {'two classes' if args.across else 'a class'}"
    )


def map_flow(args: argparse.Namespace) -> None:
    """Write the scatter and say where it is."""
    flow, data = load_flow(args.flow), random_subset(_images_of(args), args.max_images, args.seed)
    images = stack_images(data, flow.event_shape[1:], flow.event_shape[0])
    points = latent_map(flow, images, args.method, args.seed)
    axes = ("first principal axis", "second principal axis") if args.method == "pca" else ("", "")
    title = f"{args.flow}: latents of {len(images)} images ({data.name}, {args.split}), {args.method}"
    scatter(points, data.targets, data.class_names, args.output, title, axes)
    facts = {name: getattr(args, name) for name in ("method", "split", "seed")}
    rounded = [[round(v, 5) for v in point] for point in points.tolist()]
    table = {"classes": list(data.class_names), "labels": data.targets.tolist(), "coordinates": rounded}
    _write_facts(args, **facts, data=data.name, **table)
    print(f"{args.output}: latents of {len(images)} images of {len(data.class_names)} classes by {args.method}")


def generate_images(args: argparse.Namespace) -> None:
    """Write the data set and say how many images it has."""
    flow = load_flow(args.flow)
    covariance, facts = _covariance(args, flow)
    options = {name: getattr(args, name) for name in ("temperature", "split", "seed")}
    settings = {"flow": identity(args.flow), **facts}
    counts = generate(
        flow, args.per_class, args.output, gaussians=covariance, layout=args.format, settings=settings, **options
    )
    print(f"{args.output}: {counts['images']} images written, {counts['kept']} there before")


def _images_of(args: argparse.Namespace) -> ImageDataset:
    return open_images(args, args.split)


def _covariance(args: argparse.Namespace, flow: Flow) -> tuple[ClasswisePCA | None, dict]:
    """What to draw from, None for the flow's own Gaussians, and what to note of it."""
    if not args.rfcm:
        if args.dataset or args.data_dir:
            raise ValueError(
                "--dataset and --data-dir say where --rfcm takes its latents from; add --rfcm or leave them"
            )
        return None, {"rfcm": False}
    data = open_images(args, "train")
    check_class_names(flow.class_names, data.class_names)
    images = stack_images(data, flow.event_shape[1:], flow.event_shape[0])
    table = ImageTable(images, torch.as_tensor(data.targets), len(data.class_names))
    return rfcm(flow, table), {"rfcm": True, "data": data.fingerprint()}


def _write_facts(args: argparse.Namespace, **facts) -> None:
    write_json(args.output.with_suffix(".json"), {"flow": args.flow, "weights": identity(args.flow), **facts})
