"""Compare weights λ' of the KL repulsion and estimators of the class Gaussians on Fashion-MNIST.

    python benchmarks/kld_sweep.py        # 14 trainings, about 45 minutes on one core; resumes; writes kld_sweep.md

For each row the same flow is trained on all 60,000 images, with the same number of steps and the same seed. Only the
estimator of the class Gaussians and its options differ.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

from flowaug.evaluation.plots import curves
from flowaug.training.runtime import machine_name

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python benchmarks/kld_sweep.py"
BUDGET = (
    "--dataset fashion_mnist --batch-size 256 --opt adamax --lr 0.02 --clip-grad 100 --rank 4"
    " --conditioner-dtype bfloat16 --cpu"
)
SOLVE = ["--solve-at", "50"]
WEIGHTS = (1, 10, 30, 100, 300, 1000, 3000, 10_000)


def settings() -> dict[str, list[str]]:
    """Return the options of ``train_flow.py`` for each row, by its name."""
    rows = {f"FPI, λ' = {w}": [*SOLVE, "--kld-weight", str(w)] for w in WEIGHTS}
    rows["data"] = [*SOLVE, "--estimator", "data"]
    for weight in (300, 3000):
        rows[f"gradient, λ' = {weight}"] = [*SOLVE, "--estimator", "gradient", "--kld-weight", str(weight)]
    rows["GLEM, λ 50 to 25"] = ["--estimator", "glem"]
    rows["FPI, means and variances, λ' = 300"] = [*SOLVE, "--kld-weight", "300", "--learn", "both"]
    rows["one unit Gaussian"] = ["--estimator", "unit"]
    return rows


def folder_of(folder: Path, name: str) -> Path:
    """Return the output folder of the flow with this name."""
    return folder / re.sub(r"[^A-Za-z0-9]+", "-", name)


def train(folder: Path, name: str, options: list[str], steps: int, budget: str = BUDGET) -> dict:
    """Return the metrics of a flow; train it if there are none yet.

    Args:
        folder: parent of the output folder.
        name: name of the row.
        options: options of the row.
        steps: number of training steps.
        budget: options that all rows share.
    """
    output = folder_of(folder, name)
    if not (output / "metrics.json").is_file():
        options = [
            *budget.split(),
            "--steps",
            str(steps),
            "--eval-every",
            str(steps),
            "--output",
            str(output),
            *options,
        ]
        subprocess.run([sys.executable, str(ROOT / "train_flow.py"), *options], check=True, cwd=ROOT)
    return json.loads((output / "metrics.json").read_text())


def row(name: str, metrics: dict) -> str:
    """Return the table row of a flow."""
    solve = metrics.get("class_gaussians", {})
    state = f"{solve['steps']}{'' if solve['converged'] else ', not converged'}" if "steps" in solve else "–"
    return f"| {name} | {metrics['nf_acc']:.4f} | {metrics['bits_per_dim']:.3f} | {state} |"


def table(results: dict[str, dict], steps: int) -> str:
    """Return the report as markdown."""
    rows = "\n".join(row(name, metrics) for name, metrics in results.items())
    return f"""# Separation against likelihood on Fashion-MNIST

`{COMMAND}`, {time.strftime("%Y-%m-%d")}, {machine_name()}, one thread, seed 0.
`mef_tiny`, affine couplings, bfloat16 conditioners, {steps} steps of 256 on all 60,000 images; metrics on the 10,000
test images. "solve": iterations of the solve for the class Gaussians, which takes place once, after 50 steps.

| class Gaussians | NF-Acc | bits/dim | solve |
|---|---|---|---|
{rows}

![NF-Acc and bits per dimension against λ'](kld_sweep.png)
"""


def draw(results: dict[str, dict], path: Path) -> None:
    """Plot NF-Acc and bits per dimension of FPI against log10 λ'."""
    points = sorted((w, results[f"FPI, λ' = {w}"]) for w in WEIGHTS)
    xs = [math.log10(w) for w, _ in points]
    names = {"NF-Acc": "nf_acc", "bits per dimension": "bits_per_dim"}
    series = {title: (xs, [m[key] for _, m in points]) for title, key in names.items()}
    curves(series, path, xlabel="log10 λ'", title="fixed-point iteration, same flow and number of steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "kld_sweep")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    results = {name: train(args.folder, name, options, args.steps) for name, options in settings().items()}
    draw(results, args.output.with_suffix(".png"))
    args.output.write_text(table(results, args.steps))
    print(args.output.read_text())


if __name__ == "__main__":
    main()
