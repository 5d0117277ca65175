"""Measure the gain from flow mixup with ten labelled digits per class.

    python benchmarks/few_labels.py            # about ten minutes on two cores; resumes; writes few_labels.md

For each seed, a flow is trained on a random subset of 100 images, and a classifier is trained on the same subset with
and without ``--flow-aug``.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from flowaug.training.runtime import machine_name

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python benchmarks/few_labels.py"


def accuracy(output: Path, *options: str) -> float:
    """Return the test accuracy of a classifier in percent; train it if there is no result in ``output`` yet.

    Args:
        output: output folder.
        *options: command line of ``finetune.py``.
    """
    if not (output / "metrics.json").is_file():
        run = ["--cpu", "--output", str(output)]
        subprocess.run([sys.executable, str(ROOT / "finetune.py"), *run, *options], check=True, cwd=ROOT)
    return 100 * json.loads((output / "metrics.json").read_text())["top1"]


def run_seed(folder: Path, seed: int, per_class: int) -> tuple[float, float]:
    """Return the accuracy without and with flow mixup."""
    options = ["--images-per-class", str(per_class), "--subset-seed", str(seed), "--seed", str(seed)]
    name = f"{per_class}-{seed}"
    plain = accuracy(folder / f"plain-{name}", *options)
    return plain, accuracy(folder / f"flow-{name}", *options, "--flow-aug")


def half_width(values: np.ndarray) -> float:
    """Return half the width of the 95 % confidence interval of the mean (Student's t); infinity for one value."""
    if len(values) < 2:
        return math.inf
    return student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5


def interval(values: np.ndarray) -> str:
    """Return "mean ± half width" of the 95 % confidence interval as text; the mean only for one value."""
    mean = round(values.mean(), 2) + 0.0  # turns -0.0 into 0.0
    return f"{mean:.2f}" + (f" ± {half_width(values):.2f}" if len(values) > 1 else "")


def table(results: np.ndarray, per_class: int) -> str:
    """Return the report as markdown.

    Args:
        results: accuracy without and with flow mixup by seed, (S, 2).
        per_class: training images per class.
    """
    plain, flow = results.T
    rows = "\n".join(f"| {seed} | {a:.2f} | {b:.2f} | {b - a:+.2f} |" for seed, (a, b) in enumerate(results))
    return f"""# {per_class} labelled digits per class, with and without flow mixup

`{COMMAND}`, {time.strftime("%Y-%m-%d")}, {machine_name()}, seeds 0 to {len(results) - 1}.
Test accuracy in percent on the 359 validation images. The flow is trained on the same {10 * per_class} images only.

| seed | without | with `--flow-aug` | difference |
|---|---|---|---|
{rows}
| mean ± 95 % CI | {interval(plain)} | {interval(flow)} | {interval(flow - plain)} |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--images-per-class", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "few_labels")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    results = np.array([run_seed(args.folder, seed, args.images_per_class) for seed in range(args.seeds)])
    args.output.write_text(table(results, args.images_per_class))
    print(args.output.read_text())


if __name__ == "__main__":
    main()
