"""``augmentation_gain.py --tune``: choose the settings of each arm by training images that its run does not see."""

import functools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from gain_arms import Cell, Setup
from gain_run import run

from flowaug.checkpoint import write_atomic, write_json
from flowaug.host import machine_name

GRID = {  # arm to setting to candidates beside the one in use; one setting after another, the best is kept
    "flow": {"kld_weight": (100.0, 1000.0), "hidden": (48,), "p": (1.0,), "alpha": (0.3,), "rank": (16,)},
    "mixup": {"mixup": (0.2,)},
    "cutmix": {"cutmix": (0.3,)},
    "pixel": {"alpha": (0.3,)},
    "latent": {"alpha": (0.3,)},
    "noise": {"strength": (0.2,)},
    "gaussian": {"strength": (0.5,)},
}
SEEDS = (1000, 1001)  # subsets that no reported run uses
HELD_OUT = 2000


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


def tune(setup: Setup, command: str, path: Path, more: Callable[[], bool]) -> Path:
    """Choose settings for every arm, flow mixup first, whose flow and share the others use.

    Args:
        setup: of the benchmark.
        command: to say in the table.
        path: the file of the settings, JSON; the table goes beside it.
        more: whether there is time for a further arm.

    Returns:
        The table.
    """
    setup, rows = replace(setup, held_out=HELD_OUT), []
    for arm, grid in GRID.items():
        if not more():
            break
        best, tried = search(setup.settings[arm], grid, functools.partial(score, setup, arm))
        setup = replace(setup, settings=setup.settings | {arm: best})
        rows += [(arm, *each, best[each[0]] == each[1]) for each in tried]
        write_json(path, setup.settings)
        write_atomic(path.with_suffix(".md"), table(rows, setup, command).encode())
    return path.with_suffix(".md")


def score(setup: Setup, arm: str, settings: dict) -> float:
    """Mean accuracy over the subsets on training images that were held out."""
    setup = replace(setup, settings=setup.settings | {arm: settings})
    return float(np.mean([run(Cell(*setup.tuned_on, arm, seed), setup)["top1"] for seed in SEEDS]))


def table(rows: list[tuple], setup: Setup, command: str) -> str:
    """What was tried, as markdown."""
    lines = [
        f"| {arm} | {name} | {value:g} | {100 * result:.2f} | {'kept' if kept else ''} |"
        for arm, name, value, result, kept in rows
    ]
    classifier, size = setup.tuned_on
    steps = setup.length or setup.steps[classifier][size]
    return f"""# Settings chosen without the test images

`{command}`, {time.strftime("%Y-%m-%d")}, {machine_name()}. {classifier} on {size} images of each class of
{setup.dataset}, {steps} steps, judged by at most {setup.held_out} other training images; mean accuracy in percent over
the subsets {", ".join(map(str, SEEDS))}, which no reported run uses. One setting after another, the best kept.

| arm | setting | value | accuracy | |
|---|---|---|---|---|
{chr(10).join(lines)}

Chosen: `{json.dumps(setup.settings)}`
"""
