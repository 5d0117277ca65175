"""``augmentation_gain.py --tune``: choose the settings of each arm by training images that its run does not see."""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from gain_arms import Cell, Setup
from gain_run import keep, recall, run

from flowaug.files import write_atomic, write_json
from flowaug.training.recipes import FOLDER, load_recipe
from flowaug.training.runtime import machine_name

STRONG = load_recipe(FOLDER / "swin_cifar10.yaml")["classifier"]  # of the papers, for 100 epochs
GRID = {  # settings to candidates beside the one in use; one setting after another, the best is kept
    "standard": {"aa": (STRONG["aa"],), "scale": (tuple(STRONG["scale"]),)},
    "flow": {"kld_weight": (100.0,), "hidden": (48,), "p": (0.25, 1.0)},
    "axes": {"per_axis": (False,), "rescaled": (False,), "alpha": (0.3,), "rank": (8,), "redraws": (3,)},
    "mixup": {"mixup": (0.2,)},
    "cutmix": {"cutmix": (0.3,)},
    "pixel": {"alpha": (0.3,)},
    "latent": {"alpha": (0.3,)},
    "noise": {"strength": (0.2, 1.0)},
    "gaussian": {"strength": (0.5,)},
}
JUDGED_BY = {"flow": "axes+standard", "axes": "axes+standard"}  # the arm whose accuracy decides; else that of the name
SEEDS = (1000, 1001, 1002, 1003)  # subsets that no reported run uses
HELD_OUT = 5000


def search(start: dict, grid: dict, score: Callable[[dict], float]) -> tuple[dict, list[tuple[str, float, float]]]:
    """Go through the settings one after another, keeping the best value of each.

    Returns:
        The settings, and (name, value, score) of all that were tried.
    """
    best, tried = dict(start), []
    for name, others in grid.items():
        scores = {value: score(best | {name: value}) for value in (best[name], *others)}
        tried += [(name, value, result) for value, result in scores.items()]
        best[name] = max(scores, key=scores.get)
    return best, tried


def tune(setup: Setup, names: list[str], command: str, path: Path, more: Callable[[], bool]) -> Path:
    """Choose settings, those of the standard augmentation first, beside which flow mixup is then judged.

    The runs are kept beside the settings, one a line of JSON, and not repeated by another clone.

    Args:
        setup: of the benchmark.
        names: of what to choose the settings, among ``GRID``.
        command: to say in the table.
        path: the file of the settings, JSON; the table goes beside it.
        more: whether there is time for further settings.

    Returns:
        The table.
    """
    setup, rows, kept = replace(setup, held_out=setup.held_out or HELD_OUT), [], path.with_suffix(".jsonl")
    recall(kept, setup)
    for name, grid in GRID.items():
        if name not in names or not more():
            continue
        best, tried = search(setup.settings[name], grid, functools.partial(score, setup, kept, name))
        setup = replace(setup, settings=setup.settings | {name: best})
        rows += [(name, *each, best[each[0]] == each[1]) for each in tried]
        write_json(path, setup.settings)
        write_atomic(path.with_suffix(".md"), table(rows, setup, command).encode())
    return path.with_suffix(".md")


def score(setup: Setup, kept: Path, name: str, settings: dict) -> float:
    """Mean accuracy over the subsets on training images that were held out; the runs are added to ``kept``."""
    setup = replace(setup, settings=setup.settings | {name: settings})
    results = [run(Cell(*setup.tuned_on, JUDGED_BY.get(name, name), seed), setup) for seed in SEEDS]
    keep(results, kept)
    return float(np.mean([result["top1"] for result in results]))


def table(rows: list[tuple], setup: Setup, command: str) -> str:
    """What was tried, as markdown."""
    lines = [
        f"| {name} | {setting} | {value} | {JUDGED_BY.get(name, name)} | {100 * result:.2f} | {'*' * best} |"
        for name, setting, value, result, best in rows
    ]
    classifier, size = setup.tuned_on
    steps = setup.length or setup.steps[classifier][size]
    return f"""# Settings chosen without the test images

`{command}`, {time.strftime("%Y-%m-%d")}, {machine_name()}. {classifier} on {size} images of each class of
{setup.dataset}, {steps} steps, judged by at most {setup.held_out} other training images; mean accuracy in percent over
the subsets {", ".join(map(str, SEEDS))}, which no reported run uses. One setting after another, the best (*) kept.

| of | setting | value | judged by | accuracy | kept |
|---|---|---|---|---|---|
{chr(10).join(lines)}

Chosen: `{json.dumps(setup.settings)}`
"""
