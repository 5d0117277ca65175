"""Does the augmentation keep labels and looks? An oracle's accuracy on augmented images, and their FID."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flowaug.evaluation.metrics import fid
from flowaug.evaluation.oracle import Oracle
from flowaug.evaluation.pictures import drawn_plan, fixed_plan
from flowaug.evaluation.plots import curves
from flowaug.files import markdown_table, write_atomic, write_json
from flowaug.mixup.plan import MixPlan
from flowaug.mixup.transform import FlowMixupTransform

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
BATCH = 256


def label_preservation(
    transform: FlowMixupTransform,
    oracle: Oracle,
    images: Tensor,
    targets: Tensor,
    weights: Sequence[float] = WEIGHTS,
    seed: int = 0,
) -> dict:
    """Judge original and augmented images.

    Every image is mixed with a random training image of its class by each weight in turn, and once as the transform
    draws partners and weights. Images that the guard of the transform sends back count as they are, and their share is
    reported.

    Args:
        transform: the augmentation, for images in [0, 1] or uint8; its own generator is not used.
        oracle: a classifier of timm that did not train on these images.
        images: uint8 (N, C, H, W).
        targets: labels (N,).
        weights: shares of the partner.
        seed: seed of the partners.

    Returns:
        ``images, oracle, original``, and for each weight and as ``drawn`` a row of ``accuracy`` (all images), ``kept``
        (share of those right before that are right after), ``per_class`` (accuracy by label, None where there is no
        image), ``moved`` (share that was changed), ``rms_distance`` (root mean square change of a pixel, pixels in
        [0, 1]) and ``fid`` (of all images against the originals, by the features of the oracle; None of one image).

    Raises:
        ValueError: no image, not one label each, images that the transform does not take, or an oracle that is not one
            of timm.
    """
    if len(images) == 0 or len(images) != len(targets):
        raise ValueError(
            f"{len(images)} images and {len(targets)} labels; expected at least one image, a label for each"
        )
    transform(images[:0], targets[:0])  # an empty batch: its checks, no draw
    bar = tqdm(total=len(images) * (len(weights) + 1), desc="judging", unit=" images", leave=False, delay=2)
    with bar:
        before = _joined([oracle.judge(part) for part in _parts(transform, images)], targets)
        judge = partial(_judge, transform, oracle, images, targets, before, bar)
        rows = [{"weight": w, **judge(lambda y, n, w=w: fixed_plan(transform, y, w, seed + n))} for w in weights]
        drawn = judge(lambda y, n: drawn_plan(transform, y, seed + n))
    original = {"accuracy": _mean(before.right), "per_class": _per_class(transform, before.right, targets)}
    return {"images": len(images), "oracle": oracle.name, "original": original, "weights": rows, "drawn": drawn}


def _parts(transform: FlowMixupTransform, images: Tensor):
    return (transform.pixels(part) for part in images.split(BATCH))


class _Judged(NamedTuple):
    """What an oracle says of N images: whether their labels are right (N,), and their features (N, d)."""

    right: Tensor
    features: Tensor


def _joined(batches: list[tuple[Tensor, Tensor]], targets: Tensor) -> _Judged:
    labels, features = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return _Judged(labels.to(targets.device) == targets, features)


def _judge(transform, oracle, images, targets, before: _Judged, bar, plan: Callable[[Tensor, int], MixPlan]) -> dict:
    """A row of the report; ``plan`` takes labels and the number of the first of these images."""
    judged, squared, moved = [], 0.0, 0
    for start in range(0, len(images), BATCH):
        x, y = transform.pixels(images[start : start + BATCH]), targets[start : start + BATCH]
        augmented = transform.apply(x, y, plan(y, start))
        judged.append(oracle.judge(augmented))
        change = (augmented - x).double().flatten(1)
        squared += change.square().mean(1).sum().item()
        moved += int((change != 0).any(1).sum())
        bar.update(len(x))
    after = _joined(judged, targets)
    return {
        "accuracy": _mean(after.right),
        "kept": _mean(after.right[before.right]) if before.right.any() else None,
        "moved": moved / len(images),
        "rms_distance": (squared / len(images)) ** 0.5,
        "fid": fid(before.features, after.features) if len(images) > 1 else None,
        "per_class": _per_class(transform, after.right, targets),
    }


def _mean(right: Tensor) -> float:
    return right.double().mean().item()


def _per_class(transform: FlowMixupTransform, right: Tensor, targets: Tensor) -> list[float | None]:
    groups = (right[targets == label] for label in range(transform.pca.num_classes))
    return [_mean(group) if len(group) else None for group in groups]


def write_report(report: dict, class_names: Sequence[str], folder: Path, title: str) -> Path:
    """Write ``labels.json``, ``labels.md`` and ``labels.png``.

    Args:
        report: what :func:`label_preservation` returned.
        class_names: names in label order.
        folder: where to.
        title: which flow on which images.

    Returns:
        The markdown file.
    """
    write_json(folder / "labels.json", {"title": title, "class_names": list(class_names), **report})
    write_atomic(folder / "labels.md", _markdown(report, class_names, title).encode())
    weights = [row["weight"] for row in report["weights"]]
    series = {
        "accuracy of the oracle": (weights, [row["accuracy"] for row in report["weights"]]),
        "RMS distance moved": (weights, [row["rms_distance"] for row in report["weights"]]),
    }
    curves(series, folder / "labels.png", xlabel="share of the partner", title=title)
    return folder / "labels.md"


def _markdown(report: dict, class_names: Sequence[str], title: str) -> str:
    rows = [*report["weights"], report["drawn"]]
    columns = ["original", *(f"w = {row['weight']:g}" for row in report["weights"]), "as drawn"]
    by_class = [report["original"]["per_class"], *(row["per_class"] for row in rows)]
    lines = [(name, *(_show(values[k]) for values in by_class)) for k, name in enumerate(class_names)]
    return f"""# Label preservation: {title}

Accuracy of an oracle ({report["oracle"]}) on {report["images"]} images before and after mixing each with a random
training image of its class; w is the share of the partner, "as drawn" what a training gets. "kept": of the images that
the oracle gets right before, the share that it gets right after. "moved": share that changed at all (the others were
sent back by the guard, or w is 0). "distance": root mean square change of a pixel, pixels in [0, 1]. "FID": of all
these images against the originals, by the oracle's features; it compares between reports of the same oracle and images.

{markdown_table(("", *columns), _overall(report))}

By class:

{markdown_table(("class", *columns), lines)}

![accuracy and distance by weight](labels.png)
"""


def _overall(report: dict) -> list[tuple[str, ...]]:
    rows, blank = [*report["weights"], report["drawn"]], "–"
    accuracy = (_show(report["original"]["accuracy"]), *(_show(row["accuracy"]) for row in rows))
    others = {"kept": "kept", "moved": "moved", "distance": "rms_distance", "FID": "fid"}
    return [("accuracy", *accuracy), *((n, blank, *(_show(row[key]) for row in rows)) for n, key in others.items())]


def _show(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 4) + 0:.4f}"  # the sum makes -0 a 0
