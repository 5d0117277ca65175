"""Commands about generation: sample, interpolate, map, generate."""

import argparse
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
    open_images,
    png,
    random_subset,
)
from flowaug.data import stack_images
from flowaug.evaluation.export import FORMATS
from flowaug.evaluation.export import generate as write_generated
from flowaug.evaluation.pictures import class_labels, draw_samples
from flowaug.evaluation.plots import image_grid, scatter
from flowaug.evaluation.sampling import MAPS, PATHS, choose_pairs, latent_map, rfcm
from flowaug.evaluation.sampling import interpolate as interpolate_images
from flowaug.files import write_json
from flowaug.flows.checkpoint import flow_digest, load_flow
from flowaug.flows.flow import Flow
from flowaug.flows.passes import ImageTable
from flowaug.latents.pca import ClasswisePCA
from flowaug.mixup.checks import check_class_names

SAMPLE = """Write a grid of samples from the class Gaussians, one row per class, and a .json file with the settings.

Read it by rows: does each row show its class, and do its images differ from each other? If they are nearly equal, raise
the temperature; if they are broken, lower it. The same seed draws the same images."""
INTERPOLATE = """Write a grid of interpolations between pairs of images, one row per pair, and a .json file.

Within a class, every image of a row should show that class: flow mixup relies on it. With --across the two images have
different classes, and the middle shows what lies between these. "linear" passes close to the class mean, where images
are smoother than real ones; "rescaled" and "spherical" keep the distance from the class mean."""
MAP = """Write a scatter plot of the latents of a split, coloured by class, and a .json file with the coordinates.

"pca" is linear: classes that are separated in it are separated, but classes that overlap may differ in other
directions. "tsne" preserves neighbourhoods only: distances between groups mean nothing."""
GENERATE = """Write a labelled data set of samples from the class Gaussians: a folder per class, or .tar shards.

An interrupted run continues where it stopped and ends in the same files. --rfcm samples from the full covariance of
each class, estimated from the latents of the training images (the papers' RFCM), instead of the diagonal one."""


def add_commands(commands) -> None:
    """Add the four commands to the subparsers of ``flowaug``."""
    example = "flowaug sample digits --temperature 0.5 --seed 1 --output cold.png"
    _add_sample(add_command(commands, "sample", "draw samples of every class", SAMPLE, example, sample))
    example = "flowaug interpolate digits --path spherical --across"
    summary = "draw interpolations between pairs of images"
    _add_interpolate(add_command(commands, "interpolate", summary, INTERPOLATE, example, interpolate))
    example = "flowaug map digits --method tsne --output map.png"
    _add_map(add_command(commands, "map", "draw the latents of a data set by class", MAP, example, map_latents))
    example = "flowaug generate digits --per-class 100 --rfcm --output runs/generated"
    _add_generate(add_command(commands, "generate", "write a generated data set", GENERATE, example, generate))


def _add_draws(parser: argparse.ArgumentParser, temperature: float, per_class: int) -> None:
    add_flow(parser)
    count = f"images per class (default: {per_class})"
    parser.add_argument("--per-class", type=at_least(1), default=per_class, metavar="N", help=count)
    scale = f"factor of the covariance: 0 gives the class means, 1 the model's density (default: {temperature})"
    parser.add_argument("--temperature", type=not_negative, default=temperature, metavar="T", help=scale)
    parser.add_argument("--rfcm", action="store_true", help="sample from the full covariance of the training latents")
    add_data(parser)
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the samples (default: 0)")


def _add_sample(parser: argparse.ArgumentParser) -> None:
    _add_draws(parser, 0.7, 8)
    classes = "classes to show, one row each (default: 10)"
    parser.add_argument("--classes", type=at_least(1), default=10, metavar="N", help=classes)
    _add_png(parser, "samples.png")


def _add_interpolate(parser: argparse.ArgumentParser) -> None:
    add_flow(parser)
    add_data(parser)
    add_split(parser, "val")
    parser.add_argument("--path", default="linear", choices=PATHS, help="curve in the latent space (default: linear)")
    parser.add_argument("--across", action="store_true", help="pair images of different classes")
    parser.add_argument("--pairs", type=at_least(1), default=10, metavar="N", help="pairs, one row each (default: 10)")
    parser.add_argument("--steps", type=at_least(2), default=9, metavar="N", help="images per row (default: 9)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the choice of pairs (default: 0)")
    _add_png(parser, "interpolation.png")


def _add_map(parser: argparse.ArgumentParser) -> None:
    add_flow(parser)
    add_data(parser)
    add_split(parser, "val")
    parser.add_argument("--method", default="pca", choices=MAPS, help="projection to the plane (default: pca)")
    most = "use a random subset of larger splits (default: 2000)"
    parser.add_argument("--max-images", type=at_least(4), default=2000, metavar="N", help=most)
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of method and subset (default: 0)")
    _add_png(parser, "map.png")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_draws(parser, 1.0, 100)
    parser.add_argument("--format", default="folder", choices=FORMATS, help="image folder of PNGs, or .tar shards")
    parser.add_argument("--split", default="train", choices=("train", "val"), help="name of the split (default: train)")
    output = Path("runs/generated")
    parser.add_argument("--output", type=Path, default=output, help=f"output folder (default: {output})")


def _add_png(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--output", type=png, default=Path(name), help=f"the PNG (default: {name})")


def sample(
    flow: str,
    per_class: int,
    temperature: float,
    rfcm: bool,
    dataset: str | None,
    data_dir: Path | None,
    class_map: Path | None,
    seed: int,
    classes: int,
    output: Path,
) -> None:
    """Write the grid of samples and print where it is."""
    model = load_flow(flow)
    covariance, facts = _covariance(model, flow, rfcm, dataset, data_dir, class_map)
    draw_samples(model, output, temperature, per_class, classes, seed, covariance)
    shown = class_labels(model, range(min(classes, model.gaussians.num_classes)))
    drawn = {"temperature": temperature, "seed": seed, "per_class": per_class, "classes": shown}
    _write_facts(output, flow, drawn | facts)
    print(f"{output}: {per_class} samples of each of {len(shown)} classes at temperature {temperature:g}")


def interpolate(
    flow: str,
    split: str,
    dataset: str | None,
    data_dir: Path | None,
    class_map: Path | None,
    path: str,
    across: bool,
    pairs: int,
    steps: int,
    seed: int,
    output: Path,
) -> None:
    """Write the grid of interpolations and print where it is."""
    model, data = load_flow(flow), open_images(flow, split, dataset, data_dir, class_map)
    check_class_names(model.class_names, data.class_names)
    chosen = choose_pairs(torch.as_tensor(data.targets), pairs, across, seed)
    subset = data.subset(chosen.flatten().numpy())
    images = stack_images(subset, model.image_size, model.event_shape[0]).unflatten(0, (-1, 2))
    targets = torch.as_tensor(subset.targets).unflatten(0, (-1, 2))

    walks = interpolate_images(model, images, targets, steps, path)
    rows = [" → ".join(dict.fromkeys(class_labels(model, pair))) for pair in targets.tolist()]
    columns = [f"w = {w:.3g}" for w in torch.linspace(0, 1, steps).tolist()]
    image_grid(walks, output, rows, columns, f"{path} interpolation; w = weight of the image on the right")

    facts = {"path": path, "across": across, "steps": steps, "split": split, "seed": seed, "data": data.name}
    _write_facts(output, flow, facts | {"images": chosen.tolist(), "labels": targets.tolist()})
    kind = "images of two classes" if across else "two images of a class"
    print(f"{output}: {len(chosen)} {path} interpolations between {kind}")


def map_latents(
    flow: str,
    split: str,
    dataset: str | None,
    data_dir: Path | None,
    class_map: Path | None,
    method: str,
    max_images: int,
    seed: int,
    output: Path,
) -> None:
    """Write the scatter plot and print where it is."""
    model = load_flow(flow)
    data = random_subset(open_images(flow, split, dataset, data_dir, class_map), max_images, seed)
    images = stack_images(data, model.image_size, model.event_shape[0])
    points = latent_map(model, images, method, seed)
    axes = ("first principal component", "second principal component") if method == "pca" else ("", "")
    title = f"{flow}: latents of {len(images)} images ({data.name}, {split}), {method}"
    labels = data.targets.tolist()
    scatter(points, labels, data.class_names, output, title, axes)
    facts: dict[str, Any] = {"method": method, "split": split, "seed": seed, "data": data.name}
    facts |= {"classes": list(data.class_names), "labels": labels}
    facts["coordinates"] = [[round(v, 5) for v in point] for point in points.tolist()]
    _write_facts(output, flow, facts)
    print(f"{output}: latents of {len(images)} images of {len(data.class_names)} classes by {method}")


def generate(
    flow: str,
    per_class: int,
    temperature: float,
    rfcm: bool,
    dataset: str | None,
    data_dir: Path | None,
    class_map: Path | None,
    seed: int,
    format: str,
    split: str,
    output: Path,
) -> None:
    """Write the data set and print how many images it has."""
    model = load_flow(flow)
    covariance, facts = _covariance(model, flow, rfcm, dataset, data_dir, class_map)
    counts = write_generated(
        model,
        per_class,
        output,
        temperature=temperature,
        gaussians=covariance,
        layout=format,
        split=split,
        seed=seed,
        settings={"flow": flow_digest(flow), **facts},
    )
    print(f"{output}: {counts['images']} images written, {counts['kept']} were there already")


def _covariance(
    model: Flow, flow: str, full: bool, dataset: str | None, data_dir: Path | None, class_map: Path | None
) -> tuple[ClasswisePCA | None, dict[str, Any]]:
    """Return the full covariances to sample from, None for the flow's own Gaussians, and facts about them."""
    if not full:
        if dataset or data_dir:
            raise ValueError("--dataset and --data-dir name the data whose latents --rfcm uses; add --rfcm")
        return None, {"rfcm": False}
    data = open_images(flow, "train", dataset, data_dir, class_map)
    check_class_names(model.class_names, data.class_names)
    images = stack_images(data, model.image_size, model.event_shape[0])
    table = ImageTable(images, torch.as_tensor(data.targets), len(data.class_names))
    return rfcm(model, table), {"rfcm": True, "data": data.fingerprint()}


def _write_facts(output: Path, flow: str, facts: dict[str, Any]) -> None:
    write_json(output.with_suffix(".json"), {"flow": flow, "weights": flow_digest(flow), **facts})
