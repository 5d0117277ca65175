"""Commands about augmentation: list, preview, evaluate, export."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flowaug.cli.arguments import (
    add_command,
    add_data,
    add_flow,
    add_split,
    at_least,
    not_negative,
    open_data,
    open_images,
    png,
    random_subset,
)
from flowaug.data import ImageDataset, stack_images
from flowaug.data.images import to_pixels
from flowaug.evaluation.export import FORMATS, export
from flowaug.evaluation.label_preservation import WEIGHTS, label_preservation, write_report
from flowaug.evaluation.oracle import SMALL_STEPS, Oracle, load_oracle, small_oracle
from flowaug.evaluation.pictures import draw_augmented
from flowaug.flows.checkpoint import flow_digest, list_pretrained, read_config
from flowaug.mixup.plan import PARTNERS
from flowaug.mixup.transform import FlowMixupTransform
from flowaug.training.options.recipes import list_recipes

PREVIEW = """Write a grid of images before and after flow mixup, one row per class.

Read it from left to right: does each augmented image still show its class, and does it differ from the original? Both
should hold before you train with the flow."""
EVALUATE = """Measure whether flow mixup preserves labels: accuracy of a reference classifier before and after.

The report has the accuracy per mixing weight and class, with the settings of a training ("as drawn"), the distance in
pixels, and the FID. Judge images that the reference classifier was not trained on."""
EXPORT = """Write an augmented copy of a data set, as an image folder or as webdataset shards.

An interrupted export continues where it stopped and ends in the same files."""


def add_commands(commands) -> None:
    """Add the four commands to the subparsers of ``flowaug``."""
    description = "List the bundled flows and the recipes."
    add_command(commands, "list", "list bundled flows and recipes", description, "flowaug list", list_flows)
    example = "flowaug preview digits --classes 5 --output grid.png"
    _add_preview(add_command(commands, "preview", "draw images before and after", PREVIEW, example, preview))
    example = "flowaug evaluate digits --weights 0 0.5 1"
    _add_evaluate(add_command(commands, "evaluate", "measure label preservation", EVALUATE, example, evaluate))
    example = "flowaug export digits --copies 3 --output runs/augmented"
    _add_export(add_command(commands, "export", "write an augmented data set", EXPORT, example, export_images))


def _add_mixup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=at_least(1), help="leading principal components to mix (default: all fitted)")
    parser.add_argument(
        "--luminance", action="store_true", help="apply a greyscale flow to the luminance of RGB images"
    )


def _add_mixing_weights(parser: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--alpha", type=float, help="draw weights from Beta(alpha, alpha) (default: the flow's own)")
    parser.add_argument("--partner", choices=PARTNERS, help="where mixing partners come from (default: bank)")
    parser.add_argument(
        "--per-axis", action=switch, help="one weight per principal component (default: with few images per class)"
    )
    parser.add_argument("--rescaled", action=switch, help="preserve the class variance (default: yes)")
    parser.add_argument(
        "--redraws",
        type=at_least(0),
        help="times to resample an image that the flow classifies differently (default: 0)",
    )


def _add_preview(parser: argparse.ArgumentParser) -> None:
    add_flow(parser)
    add_data(parser)
    add_split(parser, "val")
    _add_mixup(parser)
    parser.add_argument("--classes", type=at_least(1), default=10, help="classes to show, one row each (default: 10)")
    parser.add_argument("--output", type=png, default=Path("preview.png"), help="the PNG (default: preview.png)")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add_flow(parser)
    add_data(parser)
    add_split(parser, "val")
    _add_mixup(parser)
    _add_mixing_weights(parser)
    weights = " ".join(f"{weight:g}" for weight in WEIGHTS)
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=WEIGHTS,
        help=f"fixed mixing weights to evaluate (default: {weights})",
    )
    parser.add_argument(
        "--oracle",
        help="reference classifier: timm model or folder of finetune (default: a small one, trained and kept)",
    )
    parser.add_argument("--oracle-checkpoint", type=Path, help="weights of --oracle, trained on this data set")
    parser.add_argument(
        "--oracle-steps", type=at_least(1), default=SMALL_STEPS, help=f"steps of the small one (default: {SMALL_STEPS})"
    )
    parser.add_argument("--image-size", type=at_least(1), help="height and width of the images (default: the flow's)")
    parser.add_argument(
        "--max-images",
        type=at_least(2),
        default=10_000,
        help="evaluate a random subset of larger sets (default: 10000)",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of partners, subset and small classifier")
    output = Path("runs/evaluate")
    parser.add_argument("--output", type=Path, default=output, help=f"folder of the report (default: {output})")


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_flow(parser)
    add_data(parser)
    add_split(parser, "train")
    _add_mixup(parser)
    parser.add_argument("--p", type=not_negative, default=1.0, help="fraction of the images to augment (default: 1)")
    _add_mixing_weights(parser)
    parser.add_argument("--copies", type=at_least(0), default=1, help="augmented copies of each image (default: 1)")
    parser.add_argument("--originals", action="store_true", help="write the original images too")
    parser.add_argument("--format", default="folder", choices=FORMATS, help="image folder of PNGs, or .tar shards")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the augmentation (default: 0)")
    output = Path("runs/export")
    parser.add_argument("--output", type=Path, default=output, help=f"output folder (default: {output})")


def list_flows() -> None:
    """Print the bundled flows and the recipes."""
    for name in list_pretrained():
        config = read_config(name)
        print(f"{name}: {config['architecture']}, {config['num_classes']} classes, images {config['event_shape']}")
    print(f"recipes: {', '.join(list_recipes())}")


def preview(
    flow: str,
    split: str,
    dataset: str | None,
    data_dir: Path | None,
    class_map: Path | None,
    rank: int | None,
    luminance: bool,
    classes: int,
    output: Path,
) -> None:
    """Write the grid and print where it is."""
    data = open_data(flow, split, dataset, data_dir, class_map)
    transform = _open_transform(flow, data.class_names, rank=rank, luminance=luminance)
    images, labels = zip(*data.examples(classes), strict=True)
    size = transform.flow.image_size
    x = torch.stack([to_pixels(image, size, data.channels) for image in images])
    path = draw_augmented(transform, x, torch.tensor(labels), output)
    print(f"{path}: {len(x)} images, original and mixed with a training image of their class")


def evaluate(
    flow: str,
    split: str,
    dataset: str | None,
    data_dir: Path | None,
    class_map: Path | None,
    weights: Sequence[float],
    oracle: str | None,
    oracle_checkpoint: Path | None,
    oracle_steps: int,
    image_size: int | None,
    max_images: int,
    seed: int,
    output: Path,
    **mixup: Any,
) -> None:
    """Write the report on label preservation and print its main figures."""
    data = open_images(flow, split, dataset, data_dir, class_map)
    transform = _open_transform(flow, data.class_names, **mixup)
    data = random_subset(data, max_images, seed)
    channels = max(data.channels, transform.flow.event_shape[0])
    size = (image_size, image_size) if image_size else transform.flow.image_size
    if oracle:
        reference = load_oracle(
            oracle, len(data.class_names), channels, oracle_checkpoint, image_size, data.class_names
        )
    elif oracle_checkpoint:
        raise ValueError("--oracle-checkpoint needs --oracle, the timm model that the weights belong to")
    elif split == "train":
        raise ValueError("the small reference classifier is trained on the train split; use --split val or --oracle")
    else:
        train = open_images(flow, "train", dataset, data_dir, class_map)
        reference = small_oracle(train, output.parent / "oracles", size, channels, oracle_steps, seed)
    _report(transform, reference, data, size, channels, weights, seed, output, f"{flow} on {data.name} ({split})")


def _report(
    transform: FlowMixupTransform,
    oracle: Oracle,
    data: ImageDataset,
    size: tuple[int, int],
    channels: int,
    weights: Sequence[float],
    seed: int,
    output: Path,
    title: str,
) -> None:
    images, targets = stack_images(data, size, channels), torch.as_tensor(data.targets)
    report = label_preservation(transform, oracle, images, targets, weights, seed)
    path = write_report(report, data.class_names, output, title)
    shown = ", ".join(f"{row['accuracy']:.4f} at w = {row['weight']:g}" for row in report["weights"])
    shown += f", {report['drawn']['accuracy']:.4f} as drawn"
    accuracy = report["original"]["accuracy"]
    print(f"accuracy of the reference classifier: {accuracy:.4f} on {len(images)} original images; {shown}")
    print(f"{path}, labels.json, labels.png")


def export_images(
    flow: str,
    split: str,
    dataset: str | None,
    data_dir: Path | None,
    class_map: Path | None,
    copies: int,
    originals: bool,
    format: str,
    seed: int,
    output: Path,
    **mixup: Any,
) -> None:
    """Write the copies and print how many."""
    data = open_images(flow, split, dataset, data_dir, class_map)
    transform = _open_transform(flow, data.class_names, **mixup)
    settings = transform.settings | {"luminance": mixup["luminance"], "flow": flow_digest(flow)}
    counts = export(
        transform,
        data,
        output,
        copies=copies,
        originals=originals,
        layout=format,
        split=split,
        seed=seed,
        settings=settings,
    )
    print(
        f"{output}: {counts['images']} images written, {counts['kept']} were there already; {counts['augmented']} "
        f"augmented, {counts['rejected']} rejected and left unchanged, {counts['no_partner']} without a partner"
    )


def _open_transform(flow: str, class_names: Sequence[str], **mixup: Any) -> FlowMixupTransform:
    given = {name: value for name, value in mixup.items() if value is not None}
    return FlowMixupTransform.from_pretrained(flow, class_names=class_names, **given)
