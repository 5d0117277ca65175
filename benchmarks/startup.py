"""Measure how long flowaug takes to start: its import, and the first look at a folder of images.

    python benchmarks/startup.py                  # about ten minutes on two cores; writes STARTUP.md
    python benchmarks/startup.py --images 6000 --rounds 2

Imports are compared with ``import timm``. ``flowaug finetune --dry-run`` runs on generated images, half of them PNG and
half JPEG: at a first start without a cache, and at a second start. The time that it takes to open both splits is
compared with one pass over the headers of the files, in one thread, right before it.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from flowaug.data.image_files import parallel_map
from flowaug.files import markdown_table
from flowaug.training.runtime import machine_name

ROOT = Path(__file__).resolve().parent.parent
CLASSES, SIDE = 10, 64
IMPORTS = {"flowaug": "import flowaug", "all public names": "from flowaug import *", "timm": "import timm"}
COMMAND = ["finetune", "--dry-run", "--cpu", "--model", "test_resnet", "--no-pretrained", "--img-size", "64"]
HEADERS = """
import os, sys, time
from PIL import Image
began = time.perf_counter()
for parent, _, names in os.walk(sys.argv[1]):
    for name in names:
        with Image.open(os.path.join(parent, name)) as image:
            image.mode, image.size
print(time.perf_counter() - began)
"""
# the command, with the seconds of opening the splits, and a count of the times that a file of the folder is opened
WATCHED = """
import sys, time
from collections import Counter
from flowaug.training import finetune
from flowaug.training.options.data import DataOptions
opened, spent, root, original = Counter(), [], sys.argv.pop(1), DataOptions.open
def watch(event, arguments):
    if event == "open" and str(arguments[0]).startswith(root) and str(arguments[0]).endswith((".png", ".jpg")):
        opened[str(arguments[0])] += 1
def timed(self, split):
    began = time.perf_counter()
    data = original(self, split)
    spent.append(time.perf_counter() - began)
    return data
DataOptions.open = timed
if sys.argv.pop(1) == "count":  # which takes time
    sys.addaudithook(watch)
finetune.main(sys.argv[1:])
print("WATCHED", sum(spent), sum(opened.values()), max(opened.values(), default=0))
"""


def write_images(root: Path, count: int) -> Path:
    """Write ``count`` images of random blocks, five in six for training."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    images = [Image.fromarray(block).resize((SIDE, SIDE)) for block in blocks]
    for split in ("train", "val"):
        for k in range(CLASSES):
            (root / split / f"class{k}").mkdir(parents=True, exist_ok=True)

    def write(i: int) -> None:
        folder = root / ("val" if i // CLASSES % 6 == 5 else "train") / f"class{i % CLASSES}"
        images[i % len(images)].save(folder / f"{i:06d}.{'png' if i // CLASSES % 2 else 'jpg'}")

    for _ in parallel_map(write, range(count), "writing images"):
        pass
    return root


def seconds(function: Callable) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def run(arguments: list[str], cache: Path) -> str:
    """Run Python, and return what it prints."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FLOWAUG_CACHE": str(cache)}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=True)
    return done.stdout


def start(images: Path, cache: Path, what: str) -> tuple[float, int, int]:
    """Run the command up to its plan.

    Args:
        images: folder of images.
        cache: folder of the cache.
        what: "count" (the opened files) or "time".

    Returns:
        Seconds of opening both splits, how often files were opened, and the largest number for one file.
    """
    command = [*COMMAND[1:], "--data-dir", str(images), "--output", f"{cache}/out"]
    spent, total, most = run(["-c", WATCHED, str(images), what, *command], cache).split("WATCHED ")[1].split()
    return float(spent), int(total), int(most)


def time_imports(rounds: int, cache: Path) -> dict[str, list[float]]:
    """Return the seconds of each import in each round, with the start of Python."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(rounds):
        for name, code in IMPORTS.items():
            times[name].append(seconds(lambda code=code: run(["-c", code], cache)))
    return times


def time_starts(rounds: int, images: Path, cache: Path) -> dict[str, list[tuple[float, float, float]]]:
    """Return the seconds of the pass over the headers, of opening the splits and of the whole start, by round."""
    times: dict[str, list[tuple[float, float, float]]] = {"first": [], "second": []}
    for number in range(rounds):
        shutil.rmtree(cache)
        cache.mkdir()
        for name, values in times.items():
            headers = float(run(["-c", HEADERS, str(images)], cache))
            began = time.perf_counter()
            spent = start(images, cache, "time")[0]
            values.append((headers, spent, time.perf_counter() - began))
            print(f"round {number}, {name} start:", [round(value, 2) for value in values[-1]], flush=True)
    return times


def ratios(values: list[float], others: list[float]) -> str:
    """Return the median and the range of the ratios of the rounds."""
    found = [value / other for value, other in zip(values, others, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def start_rows(times: dict[str, list[tuple[float, float, float]]], counts: dict[str, tuple]) -> list[list[str]]:
    """Return the rows of the second table."""
    rows = []
    for name, values in times.items():
        headers, spent, whole = (list(column) for column in zip(*values, strict=True))
        opened = f"{counts[name][1]:,} (at most {counts[name][2]} per file)"
        medians = [f"{statistics.median(column):.2f}" for column in (headers, spent)]
        rows.append([name, opened, *medians, ratios(spent, headers), f"{statistics.median(whole):.1f}"])
    return rows


def report(imports: dict, starts: dict, counts: dict, load: float, args: argparse.Namespace) -> str:
    """Return the report as markdown; ``load`` is the load of the machine before the first run."""
    first = [[n, f"{statistics.median(v):.2f}", ratios(v, imports["timm"])] for n, v in imports.items()]
    header = [
        "start",
        "files opened",
        "pass over the headers, s",
        "opening both splits, s",
        "ratio",
        "whole command, s",
    ]
    note = f"\nOther jobs ran on the machine (load {load:.1f} before the first run): only ratios are reliable.\n"
    return f"""# Start-up

`python benchmarks/startup.py --images {args.images} --rounds {args.rounds}`, {time.strftime("%Y-%m-%d")},
{machine_name()}. Medians; ratios are those of the runs of one round, with their range.
{note if load > 0.5 else ""}
{markdown_table(["import", "seconds", "ratio to timm"], first)}

`flowaug {" ".join(COMMAND)}`
on {args.images:,} images of {SIDE}×{SIDE}, half PNG, half JPEG, which the system has in memory. The first start decodes
every file, the second finds them in the cache.

{markdown_table(header, start_rows(starts, counts))}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("STARTUP.md"))
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        images, cache = write_images(Path(folder, "images"), args.images), Path(folder, "cache")
        cache.mkdir()
        imports = time_imports(args.rounds, cache)
        counts = {name: start(images, cache, "count") for name in ("first", "second")}
        print(counts, flush=True)
        starts = time_starts(args.rounds, images, cache)
    args.output.write_text(report(imports, starts, counts, load, args))
    print(args.output.read_text())


if __name__ == "__main__":
    main()
