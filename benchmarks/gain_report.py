"""Tables and picture of ``augmentation_gain.py``: means, paired differences and their 95 % intervals."""

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
NOTES = """Accuracy in percent, mean ± half width of the 95 % interval (Student's t) over seeds. A seed is a
subset, an initialisation and an order; arms of a seed are paired and take equally many steps. Gains are mean paired
differences: of arms that move images beside `standard`, `mixup` or `cutmix` against these, of others against `nothing`.
Flows saw the training images of their run only, mirrored or not and shifted by a pixel at most, as the data set's
recipe has it. Last loss: mean cross entropy of the last training batch, augmented as the arm does. Share: images that
came back changed, of all that went through (`FlowMixupTransform.counts`). Times are those of an image in the runs,
beside whatever else ran."""
OF_ARM = {  # what is to be said of an arm where it is in the report
    "flow+standard": "moves the images first, in copies that are then cropped, RandAugmented and erased;\n"
    "  `axes+standard` is compared with it.",
    "standard+flow": "moves batches that were cropped and RandAugmented.",
    "axes": "is flow mixup by the settings named so, a weight for each class axis where `per_axis` is true, and the\n"
    "  spread of the class kept.",
    "axes+standard": "moves the images first, by the settings of `axes`, in copies that are then cropped,\n"
    "  RandAugmented and erased.",
    "axes-or-standard": "is the same, but those that were moved are cropped, flipped and erased only.",
    CONTROL: "is the control of that: the same images are spared RandAugment (share), but none is moved.",
    "axes+mixup": "moves images by the settings of `axes`, then Mixup takes the batch, as in `mixup`.",
    "axes+cutmix": "moves images by the settings of `axes`, then CutMix takes the batch, as in `cutmix`.",
    "noise+cutmix": "moves images by noise on the latents, as in `noise`, then CutMix takes the batch;\n"
    "  `axes+cutmix` is compared with it.",
}


def read_results(cells: list[Cell], setup: Setup) -> dict[Cell, dict]:
    """The results that are there."""
    paths = {cell: result_path(cell, setup) for cell in cells}
    return {cell: json.loads(path.read_text()) for cell, path in paths.items() if path.is_file()}


def accuracies(results: dict[Cell, dict], classifier: str, size: str, arm: str | None) -> dict[int, float]:
    """Seed to test accuracy in percent; nothing without an arm."""
    same = (classifier, size, arm)
    return {cell.seed: 100 * result["top1"] for cell, result in results.items() if cell[:3] == same}


def paired(first: dict[int, float], second: dict[int, float]) -> np.ndarray:
    """Differences (S,) of the seeds that both have."""
    return np.array([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def difference(first: dict[int, float], second: dict[int, float]) -> str:
    """Mean paired difference ± half width, or a dash."""
    values = paired(first, second)
    return interval(values) if len(values) else BLANK


def row(results: dict[Cell, dict], classifier: str, size: str, arm: str) -> dict[str, str]:
    """One arm as a line of the table, by column."""
    own, base = (accuracies(results, classifier, size, name) for name in (arm, base_of(arm)))
    same = [result for cell, result in results.items() if cell[:3] == (classifier, size, arm)]
    loss, step, augmenting = (
        np.mean([result[name] for result in same]) for name in ("last_loss", "step_ms", "augment_ms")
    )
    others = (accuracies(results, classifier, size, name) for name in COMPETITORS.get(arm, (None, None)))
    by_flow, by_axes = (difference(other, own) for other in others)
    return {
        "arm": arm,
        "seeds": str(len(own)),
        "accuracy": interval(np.array(list(own.values()))),
        "gain over its base": difference(own, base) if arm != base_of(arm) else BLANK,
        "`flow` beyond it": by_flow,
        "`axes` beyond it": by_axes,
        "last loss": f"{loss:.2f}",
        "share": share(same),
        "ms (augmenting)": f"{step:.2f} ({augmenting:.2f})",
    }


def share(results: list[dict]) -> str:
    """Share of the images that were changed, over all runs of an arm."""
    counts = [result["counts"] for result in results if result["counts"]]
    seen = sum(count["seen"] for count in counts)
    return f"{sum(count['augmented'] for count in counts) / seen:.3f}" if seen else BLANK


def table(results: dict[Cell, dict], classifier: str, size: str, setup: Setup) -> str:
    """All arms of a classifier and size that have a result, by the columns that say something of one of them."""
    done = {cell.arm for cell in results if cell[:2] == (classifier, size)}
    rows = [row(results, classifier, size, arm) for arm in ARMS if arm in done]
    columns = [name for name in rows[0] if any(r[name] != BLANK for r in rows)]
    body = markdown_table(columns, ([r[name] for name in columns] for r in rows))
    steps = setup.length or setup.steps[classifier][size]
    images = "all images" if size == "all" else f"{size} images per class"
    return f"## {classifier}, {images}, {steps} steps of {setup.batch_size}\n\n{body}"


def notes(arms: set[str]) -> str:
    """How to read a report of these arms."""
    return "\n".join([NOTES, "", *(f"* `{arm}` {text}" for arm, text in OF_ARM.items() if arm in arms)])


def report(results: dict[Cell, dict], setup: Setup, command: str, path: Path) -> None:
    """Write ``path``, the picture beside it, and the runs that both are made of, one a line of JSON."""
    keep(results.values(), path.with_name(KEPT))
    groups = list(dict.fromkeys(cell[:2] for cell in results))
    tables = "\n\n".join(table(results, *group, setup) for group in groups)
    seeds = ", ".join(map(str, sorted({cell.seed for cell in results})))
    machine = "; ".join(sorted({result["machine"] for result in results.values()}))
    judges = f"{setup.held_out} other training images" if setup.held_out else "the test images"
    picture = draw(results, groups, path.with_suffix(".png"))
    text = f"""# What flow mixup adds to a classifier on {setup.dataset}

`{command}`, {time.strftime("%Y-%m-%d")}, {machine}, torch {torch.__version__}, seeds {seeds}.
Judged by {judges}. {notes({cell.arm for cell in results})}

{settings({cell[1:3] for cell in results}, setup)}

{f"![gains with 95 % intervals]({picture.name})" if picture else "No pair of arms is finished yet."}

{tables}
"""
    write_atomic(path, text.encode())


def settings(trained: set[tuple[str, str]], setup: Setup) -> str:
    """The settings of each (size, arm): the usual ones, what replaces them for a size, and for the whole report."""
    usual = _only(setup.settings, (arm for _, arm in trained))
    sizes = [size for size in setup.by_size if size in dict(trained)]
    other = {size: _only(setup.by_size[size], (arm for own, arm in trained if own == size)) for size in sizes}
    by_size = f"\nOtherwise, by images per class: `{json.dumps(other)}`." if any(other.values()) else ""
    everywhere = f"\nFor this report: `{json.dumps(setup.replaced)}`." if setup.replaced else ""
    return f"Settings: `{json.dumps(usual)}`.{by_size}{everywhere}"


def _only(settings: dict[str, dict], arms: Iterable[str]) -> dict[str, dict]:
    names = set().union(*map(parts_of, arms))
    return {name: values for name, values in settings.items() if name in names}


def draw(results: dict[Cell, dict], groups: list[tuple[str, str]], path: Path) -> Path | None:
    """Draw the gains over the base arms; None if there is no pair yet."""
    panels = gain_panels({", ".join(group): gains(results, *group) for group in groups})
    title = "gain in accuracy over the same training without it"
    return intervals(panels, path, "percentage points", title) if panels else None


def gain_panels(by_group: dict[str, dict[str, tuple[float, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Title to rows: all groups for each main arm and each base in BESIDE, all arms for a group with further ones."""
    panels = {
        f"{arm}, beyond {base_of(arm)}": {group: rows[arm] for group, rows in by_group.items() if arm in rows}
        for arm in MAIN_ARMS[:0:-1]
    }
    for base in dict.fromkeys(BESIDE.values()):
        panels[f"beyond {base}"] = {
            f"{group}, {arm}": gain
            for group, rows in by_group.items()
            for arm, gain in rows.items()
            if base_of(arm) == base
        }
    for group, rows in by_group.items():
        for base in ("nothing", "standard"):
            own = {arm: gain for arm, gain in rows.items() if base_of(arm) == base}
            panels[f"{group}, beyond {base}"] = own if own.keys() - set(MAIN_ARMS) else {}
    return {title: rows for title, rows in panels.items() if rows}


def gains(results: dict[Cell, dict], classifier: str, size: str) -> dict[str, tuple[float, float]]:
    """Arm to (mean, half width) of its gain over its base."""
    rows = {}
    for arm in ARMS:
        own, base = (accuracies(results, classifier, size, name) for name in (arm, base_of(arm)))
        values = paired(own, base)
        if arm != base_of(arm) and len(values):
            rows[arm] = (float(values.mean()), float(half_width(values)))
    return rows
