"""Measure what the threads of a command cost beside other busy processes, with and without flowaug's set-up.

    python benchmarks/busy_machine.py             # about ten minutes on two cores; writes BUSY_MACHINE.md
    python benchmarks/busy_machine.py --rounds 1 --seconds 8 --alternatives

Each round runs the first command of the README (``finetune.py --flow-aug``) once per variant, quiet and then beside
processes that compute without a pause, one per core. It counts training steps per second. Ratios are those of the runs
of one round.
"""

import argparse
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from flowaug.cli.threads import SPIN_COUNT, available_cpus
from flowaug.files import markdown_table
from flowaug.training.runtime import machine_name

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ["--flow-aug", "--cpu"]
LIBRARY = [sys.executable, "-c", "from flowaug.training.finetune import main; main()", *OPTIONS]  # sets up nothing
SCRIPT = [sys.executable, str(ROOT / "finetune.py"), *OPTIONS]
BEFORE, AFTER = "torch's defaults", f"set-up of the command (spin count {SPIN_COUNT})"
VARIANTS = {BEFORE: (LIBRARY, {}), AFTER: (SCRIPT, {})}
ALTERNATIVES = {
    "spin count 0": (LIBRARY, {"GOMP_SPINCOUNT": "0"}),
    "spin count 10000": (LIBRARY, {"GOMP_SPINCOUNT": "10000"}),
    "OMP_WAIT_POLICY=PASSIVE": (LIBRARY, {"OMP_WAIT_POLICY": "PASSIVE"}),
    "one thread": (LIBRARY, {"OMP_NUM_THREADS": "1"}),
}
PATIENCE = 90  # seconds until the first step


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run ``count`` processes that compute without a pause."""
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def steps_per_second(command: list[str], variables: dict[str, str], seconds: float) -> float:
    """Start a training, and return the steps per second of its first ``seconds`` after the first step."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    env = {**kept, **variables, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        command = [*command, "--output", f"{folder}/run"]
        run = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        marks: list[tuple[float, int]] = []
        reader = threading.Thread(target=_read_progress, args=(run, marks))
        reader.start()
        began = time.monotonic()
        try:
            while run.poll() is None and time.monotonic() < (marks[0][0] + seconds if marks else began + PATIENCE):
                time.sleep(0.05)
        finally:
            run.kill()
            run.wait()
            reader.join()
    if len(marks) < 2:
        raise RuntimeError(f"{command} made no steps in {PATIENCE} s")
    return (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])


def _read_progress(run: subprocess.Popen, marks: list[tuple[float, int]]) -> None:
    """Append the time and the number of steps of each state of the progress bar."""
    assert run.stderr is not None
    while block := os.read(run.stderr.fileno(), 4096):
        found = [int(count) for count in re.findall(rb"\b(\d+)/\d+ \[", block)]
        if found and found[-1] >= 1:
            marks.append((time.monotonic(), found[-1]))


def measure(variants: dict, hogs: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return the steps per second of each variant in each round; every second round runs in reverse order."""
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the busy processes, too
    for number in range(rounds):
        for name in list(variants)[:: -1 if number % 2 else 1]:
            with busy(hogs):
                speeds[name].append(steps_per_second(*variants[name], seconds))
            print(f"{hogs} busy processes, {name}: {speeds[name][-1]:.2f} steps/s", flush=True)
    return speeds


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Return the table of ``{state of the machine: {variant: steps per second by round}}``."""
    rows = []
    for state, speeds in results.items():
        for name, values in speeds.items():
            ratios = [value / before for value, before in zip(values, speeds[BEFORE], strict=True)]
            span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            rows.append([state, name, f"{statistics.median(values):.2f}", span])
    return markdown_table(["machine", "threads", "steps per second", f"ratio to {BEFORE}"], rows)


def report(results: dict, arguments: list[str], args: argparse.Namespace, load: float) -> str:
    """Return the report as markdown; ``load`` is the load of the machine before the first run."""
    note = (
        f"Other jobs ran on the machine (load {load:.1f} before the first run): no row is of a quiet machine.\n\n"
        if load > 0.5
        else ""
    )
    return f"""# A training beside other busy processes

`{" ".join(["python benchmarks/busy_machine.py", *arguments])}`, {time.strftime("%Y-%m-%d")}, {machine_name()}.
Steps per second of `finetune.py --flow-aug` in its first {args.seconds:g} s, medians of {args.rounds} rounds; ratios
of the runs of one round, with their range.

{note}{table(results)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--alternatives", action="store_true", help="other settings of OpenMP, too")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("BUSY_MACHINE.md"))
    args = parser.parse_args()
    load, hogs = os.getloadavg()[0], available_cpus()
    variants = {**VARIANTS, **(ALTERNATIVES if args.alternatives else {})}
    results = {
        state: measure(variants, count, args.rounds, args.seconds)
        for state, count in (("no busy process of ours", 0), (f"{hogs} busy processes", hogs))
    }
    args.output.write_text(report(results, sys.argv[1:], args, load))
    print(args.output.read_text())


if __name__ == "__main__":
    main()
