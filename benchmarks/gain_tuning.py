"""``augmentation_gain.py --tune``: choose the settings of each arm on held-out training images."""

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
from flowaug.training.options.recipes import load_recipe
from flowaug.training.runtime import machine_name

STRONG = load_recipe("swin_cifar10")["classifier"]  # the papers' standard augmentation, for 100 epochs
GRID = {  # name: for each setting, the candidates besides the value in use
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
JUDGED_BY = {"flow": "axes+standard", "axes": "axes+standard"}  # the arm to evaluate, if not the one of that name
SEEDS = (1000, 1001, 1002, 1003)  # their subsets are not used in any reported run
HELD_OUT = 5000


def search(start: dict, grid: dict, score: Callable[[dict], float]) -> tuple[dict, list[tuple[str, float, float]]]:
    """Optimize the settings one after another, each over its candidates.

    Args:
        start: initial value of each setting.
        grid: candidates for each setting, besides its initial value.
        score: function from settings to the number to maximize.

    Returns:
        The best settings, and a tuple (name, value, score) for each evaluation.
    """
    best, tried = dict(start), []
    for name, others in grid.items():
        scores = {value: score(best | {name: value}) for value in (best[name], *others)}
        tried += [(name, value, result) for value, result in scores.items()]
        best[name] = max(scores, key=scores.get)
    return best, tried


def tune(setup: Setup, names: list[str], command: str, path: Path, more: Callable[[], bool]) -> Path:
    """Choose settings and write them, with a report and the runs.

    Standard augmentation comes first in ``GRID``: flow mixup is evaluated on top of it. The runs are kept next to the
    settings as JSON lines, so that other clones of the repository do not repeat them.

    Args:
        setup: configuration of the benchmark.
        names: names in ``GRID`` to choose settings for.
        command: command line, for the report.
        path: JSON file of the settings; the report has the same name with the suffix ``.md``.
        more: returns whether there is time for more runs.

    Returns:
        The path of the report.
    """
    setup = replace(setup, held_out=setup.held_out or HELD_OUT)
    rows, kept = [], path.with_suffix(".jsonl")
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
    """Return the mean accuracy on held-out images over ``SEEDS``, and add the runs to the file ``kept``."""
    setup = replace(setup, settings=setup.settings | {name: settings})
    results = [run(Cell(*setup.tuned_on, JUDGED_BY.get(name, name), seed), setup) for seed in SEEDS]
    keep(results, kept)
    return float(np.mean([result["top1"] for result in results]))


def table(rows: list[tuple], setup: Setup, command: str) -> str:
    """Return the report as markdown."""
    lines = [
        f"| {name} | {setting} | {value} | {JUDGED_BY.get(name, name)} | {100 * result:.2f} | {'*' * best} |"
        for name, setting, value, result, best in rows
    ]
    classifier, size = setup.tuned_on
    steps = setup.length or setup.steps[classifier][size]
    return f"""# Settings chosen without the test images

`{command}`, {time.strftime("%Y-%m-%d")}, {machine_name()}. {classifier} on {size} images per class of
{setup.dataset}, {steps} steps, evaluated on at most {setup.held_out} other training images; mean accuracy in percent
over the subsets {", ".join(map(str, SEEDS))}, which no reported run uses. Settings are tuned one after another; the
best value (*) is kept.

| group | setting | value | arm | accuracy | kept |
|---|---|---|---|---|---|
{chr(10).join(lines)}

Chosen: `{json.dumps(setup.settings)}`
"""
