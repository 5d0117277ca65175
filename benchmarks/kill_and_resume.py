"""Kill both training scripts at random times, resume them, and compare with an uninterrupted run.

    python benchmarks/kill_and_resume.py            # about ten minutes on two cores; writes kill_and_resume.md

On average, seven out of ten kills come at most 1.5 seconds after the process has saved a training state, the others
within its first 12 seconds. After each kill (SIGKILL) the script is started again. At the end the files of the weights
are compared byte by byte.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from flowaug.training.runtime import machine_name

ROOT = Path(__file__).resolve().parent.parent
EARLY = 0.3  # fraction of kills during the start
START = 12.0  # length of the start, in seconds
AFTER = 1.5  # maximum seconds from a saved state to a kill
RUNS = {
    "train_flow.py": "--steps 1000 --save-every 7 --eval-every 250".split(),
    "finetune.py": "--steps 1000 --save-every 7 --workers 0 --flow-aug digits --reprob 0.3 --mixup 0.2".split(),
}


def start(script: str, output: Path) -> subprocess.Popen:
    """Start a script without waiting for it."""
    command = [sys.executable, str(ROOT / script), *RUNS[script], "--cpu", "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_kill(process: subprocess.Popen, state: Path, rng: random.Random) -> bool:
    """Wait until the time of a kill and return True; return False if the process ends before.

    Args:
        process: the running script.
        state: path of its training state.
        rng: generator of the random times.
    """
    before = state.stat().st_mtime_ns if state.is_file() else 0
    delay = rng.uniform(0, START)
    if rng.random() >= EARLY:
        delay = rng.uniform(0, AFTER)  # counted from the next save
        while process.poll() is None and not (state.is_file() and state.stat().st_mtime_ns > before):
            time.sleep(0.01)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        return True
    return False


def run_with_kills(script: str, output: Path, kills: int, rng: random.Random) -> tuple[int, int]:
    """Run a script to its end with at most ``kills`` kills.

    Returns:
        The number of kills, and the number of kills after which there was a training state on disk.
    """
    state = output / "state.safetensors"
    done = resumed = 0
    while True:
        process = start(script, output)
        if done < kills and wait_for_kill(process, state, rng):
            process.kill()
            process.wait()
            done, resumed = done + 1, resumed + state.is_file()
        elif process.wait():
            raise RuntimeError(f"{script} ended with exit code {process.returncode}")
        else:
            return done, resumed


def row(script: str, kills: int, rng: random.Random, folder: Path) -> str:
    """Run a script with and without kills and return its table row."""
    began = time.time()
    if start(script, folder / "whole").wait():
        raise RuntimeError(f"{script} failed without any kill")
    seconds = time.time() - began

    done, resumed = run_with_kills(script, folder / "killed", kills, rng)
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    leftovers = [p.name for p in (folder / "killed").iterdir() if p.name.endswith(".tmp")]
    same = "yes" if weights[0] == weights[1] else "NO"
    return f"| {script} | {seconds:.0f} | {done} | {resumed} | {same} | {len(leftovers)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    rows, rng = [], random.Random(args.seed)
    for script in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(script, args.kills, rng, Path(folder)))
        print(rows[-1], flush=True)
    args.output.write_text(f"""# Interrupted and resumed runs

`python benchmarks/kill_and_resume.py`, {time.strftime("%Y-%m-%d")}, {machine_name()}, {torch.get_num_threads()}
threads, torch {torch.__version__}, seed {args.seed}. Every run is killed with SIGKILL at random times and
started again with the same command.

| script | uninterrupted, s | kills | kills with a saved state | same weights, byte for byte | temporary files left |
|---|---|---|---|---|---|
{chr(10).join(rows)}
""")


if __name__ == "__main__":
    main()
