"""Tables and figure of ``augmentation_gain.py``: means, paired differences and their 95 % confidence intervals."""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from few_labels import half_width, interval
from gain_arms import ARMS, BESIDE, COMPETITORS, CONTROL, MAIN_ARMS, Cell, Setup, base_of, parts_of
from gain_run import KEPT, keep, result_path

from flowaug.evaluation.plots import intervals
from flowaug.files import markdown_table, write_atomic

BLANK = "–"
# Follows "Accuracy on ... in percent: ".
NOTES = """mean over seeds ± half width of the 95 % interval (Student's t). A seed
determines the subset, the initial weights and the order. Arms of a seed are paired and have the same number of steps. A
gain is a mean paired difference: to `standard`, `mixup` or `cutmix` for arms that combine flow mixup or noise with one
of these, to `nothing` for all others. "`axes` beyond it" is the accuracy of the corresponding arm with `axes` minus the
accuracy of the row. Each flow is trained on the training images of its run only, with flips and shifts of at most one
pixel, as in the data set's recipe. Last loss: mean cross entropy of the last training batch, augmented as in the arm.
Share: fraction of the images that were changed (`FlowMixupTransform.counts`). Times are per image, measured in the
runs, beside other jobs."""
OF_ARM = {  # notes on single arms, for reports that contain them
    "flow+standard": "applies flow mixup with one weight per image first, in offline copies to which crop, flip,\n"
    "  RandAugment and RandomErasing are applied; `axes+standard` is compared with it.",
    "standard+flow": "applies flow mixup with one weight per image to batches after crop, flip and RandAugment.",
    "axes": "is flow mixup with the settings of that name: rescaled, with one weight per principal component where\n"
    "  `per_axis` is true, otherwise one per image.",
    "axes+standard": "applies flow mixup first, with the settings of `axes`, in offline copies to which crop, flip,\n"
    "  RandAugment and RandomErasing are applied.",
    "axes-or-standard": "is as `axes+standard`, but images that flow mixup changed are only cropped, flipped and\n"
    "  erased, not RandAugmented.",
    CONTROL: "is the control of `axes-or-standard`: the same images (share) are excluded from RandAugment, but none\n"
    "  is augmented by the flow.",
    "axes+mixup": "applies flow mixup with the settings of `axes`, then Mixup to the batch, as in `mixup`.",
    "axes+cutmix": "applies flow mixup with the settings of `axes`, then CutMix to the batch, as in `cutmix`.",
    "noise+cutmix": "adds noise to the latents, as in `noise`, then applies CutMix to the batch; `axes+cutmix` is\n"
    "  compared with it.",
}


def read_results(cells: list[Cell], setup: Setup) -> dict[Cell, dict]:
    """Return the results of the runs that are finished."""
    paths = {cell: result_path(cell, setup) for cell in cells}
    return {cell: json.loads(path.read_text()) for cell, path in paths.items() if path.is_file()}


def accuracies(results: dict[Cell, dict], classifier: str, size: str, arm: str | None) -> dict[int, float]:
    """Return the accuracy in percent by seed; empty if ``arm`` is None."""
    selected = (classifier, size, arm)
    return {cell.seed: 100 * result["top1"] for cell, result in results.items() if cell[:3] == selected}


def paired(first: dict[int, float], second: dict[int, float]) -> np.ndarray:
    """Return the differences (S,) for the seeds that both contain."""
    return np.array([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    """Return the mean paired difference ± half width of its interval, or a dash if there is no pair."""
    values = paired(first, second)
    return interval(values) if len(values) else BLANK


def row(results: dict[Cell, dict], classifier: str, size: str, arm: str) -> dict[str, str]:
    """Return the table row of an arm, by column."""
    own, base = (accuracies(results, classifier, size, name) for name in (arm, base_of(arm)))
    others = (accuracies(results, classifier, size, name) for name in COMPETITORS.get(arm, (None, None)))
    by_flow, by_axes = (difference(other, own) for other in others)

    selected = [result for cell, result in results.items() if cell[:3] == (classifier, size, arm)]
    means = {name: np.mean([result[name] for result in selected]) for name in ("last_loss", "step_ms", "augment_ms")}
    return {
        "arm": arm,
        "seeds": str(len(own)),
        "accuracy": interval(np.array(list(own.values()))),
        "gain over its base": difference(own, base) if arm != base_of(arm) else BLANK,
        "`flow` beyond it": by_flow,
        "`axes` beyond it": by_axes,
        "last loss": f"{means['last_loss']:.2f}",
        "share": fraction_augmented(selected),
        "ms (augmenting)": f"{means['step_ms']:.2f} ({means['augment_ms']:.2f})",
    }


def fraction_augmented(results: list[dict]) -> str:
    """Return the fraction of images that were augmented in these runs, or a dash for an arm without augmentation."""
    counts = [result["counts"] for result in results if result["counts"]]
    seen = sum(count["seen"] for count in counts)
    return f"{sum(count['augmented'] for count in counts) / seen:.3f}" if seen else BLANK


def table(results: dict[Cell, dict], classifier: str, size: str, setup: Setup) -> str:
    """Return the table of all arms of a classifier and size that have a result, without empty columns."""
    done = {cell.arm for cell in results if cell[:2] == (classifier, size)}
    rows = [row(results, classifier, size, arm) for arm in ARMS if arm in done]
    columns = [name for name in rows[0] if any(r[name] != BLANK for r in rows)]
    body = markdown_table(columns, ([r[name] for name in columns] for r in rows))
    steps = setup.length or setup.steps[classifier][size]
    images = "all images" if size == "all" else f"{size} images per class"
    return f"## {classifier}, {images}, {steps} steps of {setup.batch_size}\n\n{body}"


def notes(arms: set[str]) -> str:
    """Return the notes on how to read a report of these arms."""
    return "\n".join([NOTES, "", *(f"* `{arm}` {text}" for arm, text in OF_ARM.items() if arm in arms)])


def report(results: dict[Cell, dict], setup: Setup, command: str, path: Path) -> None:
    """Write the report and its figure, and add its runs to ``RESULTS.jsonl`` in the same folder.

    Args:
        results: results of the runs.
        setup: configuration of the benchmark.
        command: command line that produced the report.
        path: markdown file; the figure has the same name with the suffix ``.png``.
    """
    keep(results.values(), path.with_name(KEPT))

    groups = list(dict.fromkeys(cell[:2] for cell in results))
    tables = "\n\n".join(table(results, *group, setup) for group in groups)
    seeds = ", ".join(map(str, sorted({cell.seed for cell in results})))
    machine = "; ".join(sorted({result["machine"] for result in results.values()}))
    images = f"{setup.held_out} other training images" if setup.held_out else "the test images"
    figure = draw(results, groups, path.with_suffix(".png"))
    text = f"""# What flow mixup adds to a classifier on {setup.dataset}

`{command}`, {time.strftime("%Y-%m-%d")}, {machine}, torch {torch.__version__}, seeds {seeds}.
Accuracy on {images} in percent: {notes({cell.arm for cell in results})}

{settings({cell[1:3] for cell in results}, setup)}

{f"![gains with 95 % intervals]({figure.name})" if figure else "There is no finished pair of arms yet."}

{tables}
"""
    write_atomic(path, text.encode())


def settings(trained: set[tuple[str, str]], setup: Setup) -> str:
    """Return the settings that a report used: in general, by size, and those of ``--set``.

    Args:
        trained: pairs (size, arm) of the report's runs.
        setup: configuration of the benchmark.
    """
    general = _only(setup.settings, (arm for _, arm in trained))
    sizes = [size for size in setup.by_size if size in dict(trained)]
    changed = {size: _only(setup.by_size[size], (arm for own, arm in trained if own == size)) for size in sizes}
    by_size = f"\nDifferent settings by images per class: `{json.dumps(changed)}`." if any(changed.values()) else ""
    everywhere = f"\nDifferent settings for this report: `{json.dumps(setup.replaced)}`." if setup.replaced else ""
    return f"Settings: `{json.dumps(general)}`.{by_size}{everywhere}"


def _only(settings: dict[str, dict], arms: Iterable[str]) -> dict[str, dict]:
    names = set().union(*map(parts_of, arms))
    return {name: values for name, values in settings.items() if name in names}


def draw(results: dict[Cell, dict], groups: list[tuple[str, str]], path: Path) -> Path | None:
    """Draw the gains over the base arms and return the path of the figure, or None if there is no pair yet."""
    panels = gain_panels({", ".join(group): gains(results, *group) for group in groups})
    title = "gain in accuracy over the same training without this augmentation"
    return intervals(panels, path, "percentage points", title) if panels else None


def gain_panels(by_group: dict[str, dict[str, tuple[float, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the panels of the figure: rows by title.

    There is one panel for each main arm, one for each base in ``BESIDE``, and one for each group and base with further
    arms.

    Args:
        by_group: gain (mean, half width) by group and arm; a group is a classifier and a size.
    """
    panels = {
        f"{arm}: gain over {base_of(arm)}": {group: rows[arm] for group, rows in by_group.items() if arm in rows}
        for arm in MAIN_ARMS[:0:-1]
    }
    for base in dict.fromkeys(BESIDE.values()):
        panels[f"gain over {base}"] = {
            f"{group}, {arm}": gain
            for group, rows in by_group.items()
            for arm, gain in rows.items()
            if base_of(arm) == base
        }
    for group, rows in by_group.items():
        for base in ("nothing", "standard"):
            own = {arm: gain for arm, gain in rows.items() if base_of(arm) == base}
            panels[f"{group}: gain over {base}"] = own if own.keys() - set(MAIN_ARMS) else {}
    return {title: rows for title, rows in panels.items() if rows}


def gains(results: dict[Cell, dict], classifier: str, size: str) -> dict[str, tuple[float, float]]:
    """Return the gain over its base (mean, half width of its interval) by arm."""
    rows = {}
    for arm in ARMS:
        own, base = (accuracies(results, classifier, size, name) for name in (arm, base_of(arm)))
        values = paired(own, base)
        if arm != base_of(arm) and len(values):
            rows[arm] = (float(values.mean()), float(half_width(values)))
    return rows
