"""The papers' tables on Fashion-MNIST: NF-Acc, CNN-A, FID, density, coverage and label reliability of drawn images.

    python benchmarks/paper_tables.py              # resumes; writes paper_tables.md after every row that is new
    python benchmarks/paper_tables.py --smoke --flows /tmp/smoke --folder /tmp/smoke --output /tmp/smoke/tables.md

Against λ', against what is learned (means, variances, both), against temperature, and with RFCM. The flows are those of
``kld_sweep.py`` and one more; those that are missing are trained. Features and label reliability come from one small
classifier of the real training images, so the FID is not Inception's.

Hours on two cores at 100 GFLOP/s: 0.1 for each of 28 rows with --cnn resnet10t and 2,000 steps, 3 in all; the papers'
``--cnn resnet18 --cnn-steps 400`` takes 0.5 a row, 14 in all. A flow that is missing takes about 3 minutes.
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

from flowaug.cli.options import identity
from flowaug.data import ImageDataset, load_dataset, stack_images
from flowaug.evaluation.metrics import cnn_accuracy, coverage, density, features, fid, label_reliability
from flowaug.evaluation.oracle import Oracle, small_oracle
from flowaug.evaluation.sampling import rfcm, sample
from flowaug.files import write_atomic, write_json
from flowaug.flows.checkpoint import load_flow
from flowaug.flows.passes import ImageTable
from flowaug.training.runtime import keep_freed_memory, machine_name

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs"
DECIDING = ("dataset", "per_class", "cnn", "cnn_steps", "oracle_steps", "seed")
SMOKE = {"dataset": "digits", "steps": 4, "weights": (MIDDLE,), "per_class": 8, "cnn": "test_resnet", "cnn_steps": 2}
SMOKE |= {"oracle_steps": 2, "budget": "--dataset digits --batch-size 64 --rank 4 --cpu", "last": ("--solve-at", "2")}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(dataset="fashion_mnist", weights=WEIGHTS, budget=kld_sweep.BUDGET, last=(), seed=0)
    add = parser.add_argument
    add("--flows", type=Path, default=RUNS / "kld_sweep", help="flows of kld_sweep.py")
    add("--steps", type=int, default=300, help="of a flow that is missing, as kld_sweep.py was run")
    add("--per-class", type=int, default=1000, help="images drawn of each class (1000)")
    add("--cnn", default="resnet10t", help="classifier of CNN-A; the papers' is resnet18 (resnet10t)")
    add("--cnn-steps", type=int, default=2000, help="its steps of 128 images (2000)")
    add("--oracle-steps", type=int, default=3000, help="steps of the classifier that judges (3000)")
    add("--threads", type=int, help="of torch")
    add("--folder", type=Path, default=RUNS / "paper_tables", help="where results are kept")
    add("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="the tables")
    add("--smoke", action="store_true", help="digits, flows of four steps, classifiers of two")
    args = parser.parse_args(argv)
    vars(args).update(SMOKE if args.smoke else {})
    return args


class Data:
    """Real images in memory: those to learn from, and those to compare with.

    Args:
        name: of the data set.
    """

    def __init__(self, name: str):
        self.train, self.test = (load_dataset(name, None, split) for split in ("train", "val"))
        self.classes = len(self.train.class_names)

    @functools.cached_property
    def table(self) -> ImageTable:
        """The training images."""
        return ImageTable(*tensors(self.train), self.classes)

    @functools.cached_property
    def judged(self) -> tuple[Tensor, Tensor]:
        """Test images uint8 (N, C, H, W) and labels (N,)."""
        return tensors(self.test)


def tensors(data: ImageDataset) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, C, H, W) at their own size, and labels (N,)."""
    return stack_images(data, data.image_size, data.channels), torch.as_tensor(data.targets)


def flow_options(weights: tuple[int, ...]) -> dict[str, list[str]]:
    """Name to options of every flow that the tables need."""
    known = kld_sweep.settings()
    more = [*kld_sweep.SOLVE, "--kld-weight", str(MIDDLE), "--learn", "variances"]
    known[f"FPI, variances, λ' = {MIDDLE}"] = more
    return {draw.flow: known[draw.flow] for draw in all_draws(weights) if draw != REAL}


def train_flows(args: argparse.Namespace) -> dict[str, dict]:
    """Name to the metrics of its flow; trained where they are missing."""
    folder, options = args.flows.resolve(), flow_options(args.weights)
    return {n: kld_sweep.train(folder, n, [*o, *args.last], args.steps, args.budget) for n, o in options.items()}


def images_of(draw: Draw, args: argparse.Namespace, data: Data) -> tuple[Tensor, Tensor]:
    """Drawn images uint8 (N, C, H, W) and the labels (N,) that they were drawn for.

    Raises:
        ValueError: the flow cannot decode what was drawn.
    """
    if draw == REAL:
        return tensors(load_dataset(args.dataset, None, "train", args.per_class, args.seed))
    flow, y = load_flow(kld_sweep.folder_of(args.flows, draw.flow)), torch.arange(data.classes)
    y = y.repeat_interleave(args.per_class)
    gaussians = rfcm(flow, data.table) if draw.rfcm else None
    return sample(flow, y, draw.temperature, args.seed, gaussians), y


def measure(draw: Draw, args: argparse.Namespace, data: Data, oracle: Oracle) -> dict:
    """All measures of one draw; of a draw that cannot be decoded, why."""
    try:
        images, y = images_of(draw, args, data)
    except ValueError as error:
        return {"failed": str(error)}
    real, fake = features(oracle, data.judged[0]), features(oracle, images)
    options = {"model": args.cnn, "steps": args.cnn_steps, "seed": args.seed}
    return {
        "fid": fid(real, fake),
        "density": density(real, fake),
        "coverage": coverage(real, fake),
        "label_reliability": label_reliability(oracle, images, y),
        "cnn_a": cnn_accuracy(images, y, *data.judged, data.classes, **options),
    }


def result_path(draw: Draw, args: argparse.Namespace) -> Path:
    """The file of a draw; its name changes with flow and options."""
    flow = None if draw == REAL else identity(str(kld_sweep.folder_of(args.flows, draw.flow)))
    decided = json.dumps([draw, flow, {name: getattr(args, name) for name in DECIDING}])
    key = hashlib.sha256(decided.encode()).hexdigest()[:8]
    return args.folder / f"{re.sub('[^A-Za-z0-9]+', '-', draw.flow)}-{draw.temperature:g}-{draw.rfcm:d}-{key}.json"


def report(results: dict[Draw, dict], judge: str, args: argparse.Namespace, command: str) -> str:
    """The tables as markdown; ``judge`` says what judged the images and how well."""
    tables = [weight_table(results, args.weights), learned_table(results), temperature_table(results)]
    failed = [f"{draw}: {values['failed']}" for draw, values in results.items() if "failed" in values]
    return f"""# The papers' tables on {args.dataset}

`{command}`, {time.strftime("%Y-%m-%d")}, {machine_name()}, {torch.get_num_threads()}
threads, seed {args.seed}. Flows of `kld_sweep.py`; {args.per_class} images drawn of each class, against the test set.
CNN-A: {args.cnn}, {args.cnn_steps} steps of 128 drawn images. Features and labels are judged by {judge}.
Percent, but for FID, density and bits/dim. What the papers publish is of other images, flows and features: it orients,
it does not compare.

{chr(10).join(f"{table}{chr(10)}" for table in [*tables, rfcm_table(results, args.weights)])}
{chr(10).join(["Draws that could not be decoded:", *failed]) if failed else ""}
"""


def work(args: argparse.Namespace, command: str) -> None:
    """Measure what is missing and write the tables after each."""
    metrics, data = train_flows(args), Data(args.dataset)
    size, channels = data.train.image_size, data.train.channels
    oracle = small_oracle(data.train, args.folder / "oracles", size, channels, args.oracle_steps, args.seed)
    right = label_reliability(oracle, *data.judged)
    judge, results = f"{oracle.name}, right on {100 * right:.2f} % of the test images", {}
    for draw in all_draws(args.weights):
        path = result_path(draw, args)
        if not path.is_file():
            write_json(path, measure(draw, args, data, oracle))
        own = {name: metrics.get(draw.flow, {}).get(name) for name in ("nf_acc", "bits_per_dim")}
        results[draw] = own | json.loads(path.read_text())
        write_atomic(args.output, report(results, judge, args, command).encode())


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
