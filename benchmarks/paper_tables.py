"""Reproduce the papers' tables on Fashion-MNIST: NF-Acc and the quality of samples.

    python benchmarks/paper_tables.py              # resumes; writes paper_tables.md after every new row
    python benchmarks/paper_tables.py --smoke --flows /tmp/smoke --folder /tmp/smoke --output /tmp/smoke/tables.md

The metrics of samples are CNN-A, FID, density, coverage and label reliability (L-R). The tables show them by λ', by
learned parameters (means, variances, both), by temperature, and with RFCM. The flows are those of ``kld_sweep.py`` and
one more; missing flows are trained. Features and label reliability come from one small classifier that is trained on
the real training images, so the FID is not the usual one with Inception features.

Hours on two cores at 100 GFLOP/s: 0.1 for each of 28 rows with --cnn resnet10t and 2,000 steps, 3 in all; 0.5 per row
with the papers' ``--cnn resnet18 --cnn-steps 400``, 14 in all. A missing flow takes about 3 minutes.
"""

import argparse
import functools
import hashlib
import json
import re
import shlex
import sys
import time
from pathlib import Path

import kld_sweep
import torch
from paper_layout import (
    MIDDLE,
    REAL,
    WEIGHTS,
    Draw,
    all_draws,
    learned_table,
    rfcm_table,
    temperature_table,
    weight_table,
)
from torch import Tensor

from flowaug.data import ImageDataset, load_dataset, stack_images
from flowaug.evaluation.metrics import cnn_accuracy, coverage, density, features, fid, label_reliability
from flowaug.evaluation.oracle import Oracle, small_oracle
from flowaug.evaluation.sampling import rfcm, sample
from flowaug.files import write_atomic, write_json
from flowaug.flows.checkpoint import flow_digest, load_flow
from flowaug.flows.passes import ImageTable
from flowaug.training.runtime import keep_freed_memory, machine_name

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs"
DECIDING = ("dataset", "per_class", "cnn", "cnn_steps", "oracle_steps", "seed")  # identify a result, with its flow
SMOKE = {"dataset": "digits", "steps": 4, "weights": (MIDDLE,), "per_class": 8, "cnn": "test_resnet", "cnn_steps": 2}
SMOKE |= {"oracle_steps": 2, "budget": "--dataset digits --batch-size 64 --rank 4 --cpu", "last": ("--solve-at", "2")}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(dataset="fashion_mnist", weights=WEIGHTS, budget=kld_sweep.BUDGET, last=(), seed=0)
    add = parser.add_argument
    add("--flows", type=Path, default=RUNS / "kld_sweep", help="flows of kld_sweep.py")
    add("--steps", type=int, default=300, help="training steps of missing flows, as in kld_sweep.py")
    add("--per-class", type=int, default=1000, help="samples per class (default: 1000)")
    add("--cnn", default="resnet10t", help="classifier of CNN-A; the papers use resnet18 (default: resnet10t)")
    add("--cnn-steps", type=int, default=2000, help="training steps of CNN-A, of 128 images each (default: 2000)")
    add("--oracle-steps", type=int, default=3000, help="training steps of the reference classifier (default: 3000)")
    add("--threads", type=int, help="number of threads of PyTorch")
    add("--folder", type=Path, default=RUNS / "paper_tables", help="folder of the results")
    add("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="report")
    add("--smoke", action="store_true", help="smoke test: digits, flows with four steps, classifiers with two")
    args = parser.parse_args(argv)
    vars(args).update(SMOKE if args.smoke else {})
    return args


class Data:
    """Training and test images in memory.

    Args:
        name: name of the data set.
    """

    def __init__(self, name: str):
        self.train, self.test = (load_dataset(name, None, split) for split in ("train", "val"))
        self.classes = len(self.train.class_names)

    @functools.cached_property
    def table(self) -> ImageTable:
        """Training images."""
        return ImageTable(*tensors(self.train), self.classes)

    @functools.cached_property
    def test_tensors(self) -> tuple[Tensor, Tensor]:
        """Test images, uint8 (N, C, H, W), and labels (N,)."""
        return tensors(self.test)


def tensors(data: ImageDataset) -> tuple[Tensor, Tensor]:
    """Return images, uint8 (N, C, H, W), and labels (N,)."""
    return stack_images(data, data.image_size, data.channels), torch.as_tensor(data.targets)


def flow_options(weights: tuple[int, ...]) -> dict[str, list[str]]:
    """Return the options of every flow that the tables need, by its name."""
    known = kld_sweep.settings()
    variances = [*kld_sweep.SOLVE, "--kld-weight", str(MIDDLE), "--learn", "variances"]
    known[f"FPI, variances, λ' = {MIDDLE}"] = variances
    return {draw.flow: known[draw.flow] for draw in all_draws(weights) if draw != REAL}


def train_flows(args: argparse.Namespace) -> dict[str, dict]:
    """Return the metrics of all flows by name; train the missing ones."""
    folder = args.flows.resolve()
    return {
        name: kld_sweep.train(folder, name, [*options, *args.last], args.steps, args.budget)
        for name, options in flow_options(args.weights).items()
    }


def images_of(draw: Draw, args: argparse.Namespace, data: Data) -> tuple[Tensor, Tensor]:
    """Return samples, uint8 (N, C, H, W), and their labels (N,).

    Raises:
        ValueError: samples decode to NaN or infinite pixels.
    """
    if draw == REAL:
        return tensors(load_dataset(args.dataset, None, "train", args.per_class, args.seed))
    flow = load_flow(kld_sweep.folder_of(args.flows, draw.flow))
    y = torch.arange(data.classes).repeat_interleave(args.per_class)
    gaussians = rfcm(flow, data.table) if draw.rfcm else None
    return sample(flow, y, draw.temperature, args.seed, gaussians), y


def measure(draw: Draw, args: argparse.Namespace, data: Data, oracle: Oracle) -> dict:
    """Return all metrics of a set of samples, or ``failed`` with the reason if it cannot be decoded."""
    try:
        images, y = images_of(draw, args, data)
    except ValueError as error:
        return {"failed": str(error)}
    real, fake = features(oracle, data.test_tensors[0]), features(oracle, images)
    options = {"model": args.cnn, "steps": args.cnn_steps, "seed": args.seed}
    return {
        "fid": fid(real, fake),
        "density": density(real, fake),
        "coverage": coverage(real, fake),
        "label_reliability": label_reliability(oracle, images, y),
        "cnn_a": cnn_accuracy(images, y, *data.test_tensors, data.classes, **options),
    }


def result_path(draw: Draw, args: argparse.Namespace) -> Path:
    """Return the path of the metrics of a set of samples; its name contains a hash of the flow and the options."""
    flow = None if draw == REAL else flow_digest(str(kld_sweep.folder_of(args.flows, draw.flow)))
    identity = json.dumps([draw, flow, {name: getattr(args, name) for name in DECIDING}])
    key = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return args.folder / f"{re.sub('[^A-Za-z0-9]+', '-', draw.flow)}-{draw.temperature:g}-{draw.rfcm:d}-{key}.json"


def report(results: dict[Draw, dict], reference: str, args: argparse.Namespace, command: str) -> str:
    """Return the report as markdown.

    Args:
        results: metrics of all sets of samples.
        reference: description of the reference classifier.
        args: parsed command line.
        command: command line.
    """
    tables = [weight_table(results, args.weights), learned_table(results), temperature_table(results)]
    failed = [f"{draw}: {values['failed']}" for draw, values in results.items() if "failed" in values]
    return f"""# The papers' tables on {args.dataset}

`{command}`, {time.strftime("%Y-%m-%d")}, {machine_name()}, {torch.get_num_threads()}
threads, seed {args.seed}. The flows are those of `kld_sweep.py`; {args.per_class} samples per class are compared with
the test set. CNN-A: {args.cnn}, {args.cnn_steps} steps of 128 samples. Features and L-R are from {reference}.
All values except FID, density and bits/dim are percentages. The published values are for other images, flows and
features: they are for orientation and cannot be compared directly.

{chr(10).join(f"{table}{chr(10)}" for table in [*tables, rfcm_table(results, args.weights)])}
{chr(10).join(["Samples that could not be decoded:", *failed]) if failed else ""}
"""


def work(args: argparse.Namespace, command: str) -> None:
    """Compute missing metrics and write the report after each set of samples."""
    metrics, data = train_flows(args), Data(args.dataset)
    size, channels = data.train.image_size, data.train.channels
    oracle = small_oracle(data.train, args.folder / "oracles", size, channels, args.oracle_steps, args.seed)
    accuracy = label_reliability(oracle, *data.test_tensors)
    reference = f"{oracle.name} ({100 * accuracy:.2f} % on the test images)"

    results = {}
    for draw in all_draws(args.weights):
        path = result_path(draw, args)
        if not path.is_file():
            write_json(path, measure(draw, args, data, oracle))
        own = {name: metrics.get(draw.flow, {}).get(name) for name in ("nf_acc", "bits_per_dim")}
        results[draw] = own | json.loads(path.read_text())
        write_atomic(args.output, report(results, reference, args, command).encode())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    given = sys.argv[1:] if argv is None else argv
    try:
        work(args, shlex.join(["python", "benchmarks/paper_tables.py", *given]))
    except (ValueError, OSError) as error:
        sys.exit(f"paper_tables.py: {error}")
    print(args.output.read_text())


if __name__ == "__main__":
    main()
