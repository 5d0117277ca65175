"""Label preservation of flow mixup: accuracy of a reference classifier on augmented images, and their FID."""

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
from flowaug.files import markdown_table, markdown_text, write_json, write_text
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
    """Evaluate a reference classifier on original and augmented images.

    Every image is mixed with a random training image of its class: once for each fixed weight, and once with partner
    and weights drawn as in training. Rejected images are left unchanged and included; the fraction of changed images is
    reported.

    Args:
        transform: flow mixup for images in [0, 1] or uint8; its generator is not used.
        oracle: reference classifier, a timm model that was not trained on these images.
        images: uint8 (N, C, H, W).
        targets: labels (N,).
        weights: fixed weights of the partner.
        seed: seed of partners and drawn weights.

    Returns:
        A dictionary with ``images`` (their number), ``oracle`` (name of the classifier), ``original`` (accuracy on the
        originals), ``weights`` (a row for each ``weight``) and ``drawn`` (a row). Each row contains:

        * ``accuracy``: accuracy on all images.
        * ``kept``: fraction of the originally correct images that are still correct; None if there are none.
        * ``changed``: fraction of images that changed at all.
        * ``rms_distance``: root mean square change of a pixel in [0, 1].
        * ``fid``: FID between augmented and original images in the features of the classifier; None for one image.
        * ``per_class``: accuracy by label; None for classes without images.

    Raises:
        ValueError: if there are no images or not one label per image, the transform does not accept the images, or the
            classifier is not a timm model.
    """
    if len(images) == 0 or len(images) != len(targets):
        raise ValueError(
            f"there are {len(images)} images and {len(targets)} labels; expected at least one image, and one label each"
        )
    transform(images[:0], targets[:0])  # an empty batch runs the checks without drawing

    bar = tqdm(total=len(images) * (len(weights) + 1), desc="evaluating", unit=" images", leave=False, delay=2)
    with bar:
        parts = images.split(BATCH)
        before = _concatenate([oracle.predict(transform.pixels(part)) for part in parts], targets)
        evaluate = partial(_evaluate, transform, oracle, images, targets, before, bar)
        rows = [{"weight": w, **evaluate(lambda y, n, w=w: fixed_plan(transform, y, w, seed + n))} for w in weights]
        drawn = evaluate(lambda y, n: drawn_plan(transform, y, seed + n))

    original = {"accuracy": _mean(before.correct), "per_class": _per_class(transform, before.correct, targets)}
    return {"images": len(images), "oracle": oracle.name, "original": original, "weights": rows, "drawn": drawn}


class _Predictions(NamedTuple):
    """Predictions for N images: whether each is correct (N,), and their features (N, d)."""

    correct: Tensor
    features: Tensor


def _concatenate(batches: list[tuple[Tensor, Tensor]], targets: Tensor) -> _Predictions:
    labels, features = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return _Predictions(labels.to(targets.device) == targets, features)


def _evaluate(
    transform: FlowMixupTransform,
    oracle: Oracle,
    images: Tensor,
    targets: Tensor,
    before: _Predictions,
    bar: tqdm,
    make_plan: Callable[[Tensor, int], MixPlan],
) -> dict:
    """Compute a row of the report.

    ``make_plan`` gets the labels of a batch and the index of its first image.
    """
    predictions = []
    squared_change = 0.0
    num_changed = 0
    for start in range(0, len(images), BATCH):
        x, y = transform.pixels(images[start : start + BATCH]), targets[start : start + BATCH]
        augmented = transform.apply(x, y, make_plan(y, start))
        predictions.append(oracle.predict(augmented))

        change = (augmented - x).double().flatten(1)
        squared_change += change.square().mean(1).sum().item()
        num_changed += int((change != 0).any(1).sum())
        bar.update(len(x))

    after = _concatenate(predictions, targets)
    return {
        "accuracy": _mean(after.correct),
        "kept": _mean(after.correct[before.correct]) if before.correct.any() else None,
        "changed": num_changed / len(images),
        "rms_distance": (squared_change / len(images)) ** 0.5,
        "fid": fid(before.features, after.features) if len(images) > 1 else None,
        "per_class": _per_class(transform, after.correct, targets),
    }


def _mean(correct: Tensor) -> float:
    return correct.double().mean().item()


def _per_class(transform: FlowMixupTransform, correct: Tensor, targets: Tensor) -> list[float | None]:
    """Return the accuracy by label; None for classes without images."""
    groups = (correct[targets == label] for label in range(transform.pca.num_classes))
    return [_mean(group) if len(group) else None for group in groups]


def write_report(report: dict, class_names: Sequence[str], folder: Path, title: str) -> Path:
    """Write a report as ``labels.json``, ``labels.md`` and ``labels.png``.

    Args:
        report: result of :func:`label_preservation`.
        class_names: names in label order.
        folder: output folder.
        title: title of the report, such as the flow and the data set.

    Returns:
        The path of ``labels.md``.
    """
    write_json(folder / "labels.json", {"title": title, "class_names": list(class_names), **report})
    write_text(folder / "labels.md", _markdown(report, class_names, title))

    weights = [row["weight"] for row in report["weights"]]
    series = {
        "accuracy of the reference classifier": (weights, [row["accuracy"] for row in report["weights"]]),
        "RMS distance": (weights, [row["rms_distance"] for row in report["weights"]]),
    }
    curves(series, folder / "labels.png", xlabel="weight of the partner", title=title)
    return folder / "labels.md"


def _markdown(report: dict, class_names: Sequence[str], title: str) -> str:
    rows = [*report["weights"], report["drawn"]]
    columns = ["original", *(f"w = {row['weight']:g}" for row in report["weights"]), "as drawn"]
    by_class = [report["original"]["per_class"], *(row["per_class"] for row in rows)]
    lines = [(name, *(_format(values[k]) for values in by_class)) for k, name in enumerate(class_names)]
    oracle = markdown_text(report["oracle"])
    return f"""# Label preservation: {markdown_text(title)}

Accuracy of a reference classifier ({oracle}) on {report["images"]} images, before and after mixing each image
with a random training image of its class. w is the weight of the partner; in "as drawn" the weights are drawn as in
training.

* "kept": fraction of the originally correct images that are still correct.
* "changed": fraction of images that changed at all. The others were rejected or had no partner, or w is 0.
* "distance": root mean square change of a pixel, with pixels in [0, 1].
* "FID": between augmented and original images, in the features of the classifier. It is comparable only between
  reports with the same classifier and images.

{markdown_table(("", *columns), _overall(report))}

By class:

{markdown_table(("class", *columns), lines)}

![Accuracy and distance by weight](labels.png)
"""


def _overall(report: dict) -> list[tuple[str, ...]]:
    """Return the rows of the table over all classes; only the accuracy has a value for the originals."""
    rows, blank = [*report["weights"], report["drawn"]], "–"
    accuracy = (_format(report["original"]["accuracy"]), *(_format(row["accuracy"]) for row in rows))
    others = {"kept": "kept", "changed": "changed", "distance": "rms_distance", "FID": "fid"}
    return [("accuracy", *accuracy), *((n, blank, *(_format(row[key]) for row in rows)) for n, key in others.items())]


def _format(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 4) + 0:.4f}"  # adding 0 turns -0 into 0
