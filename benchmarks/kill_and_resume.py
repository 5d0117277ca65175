"""Kill both scripts with SIGKILL at random moments, resume them, and compare with a run that nobody disturbed.

    python benchmarks/kill_and_resume.py            # about ten minutes on two cores; writes kill_and_resume.md

Seven kills of ten come up to a second and a half after the run has saved a state of its own, the others at any moment
of its start; a run is started again after every kill, and the bytes of its final weights are compared.
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
EARLY, START, AFTER = 0.3, 12.0, 1.5  # share of kills during the start; its seconds; seconds after a state
RUNS = {
    "train_flow.py": ["--steps", "1000", "--save-every", "7", "--eval-every", "250"],
    "finetune.py": [
        "--steps",
        "1000",
        "--save-every",
        "7",
        "--flow-aug",
        "digits",
        "--reprob",
        "0.3",
        "--mixup",
        "0.2",
    ],
}


def start(script: str, output: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / script), *RUNS[script], "--cpu", "--output", str(output)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_the_kill(process: subprocess.Popen, state: Path, rng: random.Random) -> bool:
    """Wait for the moment of a kill; False if the run ended before."""
    before = state.stat().st_mtime_ns if state.is_file() else 0
    delay = rng.uniform(0, START)
    if rng.random() >= EARLY:
        delay = rng.uniform(0, AFTER)
        while process.poll() is None and not (state.is_file() and state.stat().st_mtime_ns > before):
            time.sleep(0.01)
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        return True
    return False


def disturbed(script: str, output: Path, kills: int, rng: random.Random) -> tuple[int, int]:
    """Run to the end through ``kills`` kills; returns how often it was killed and how often with a state on disk."""
    done, resumed, state = 0, 0, output / "state.safetensors"
    while True:
        process = start(script, output)
        if done < kills and wait_for_the_kill(process, state, rng):
            process.kill()
            process.wait()
            done, resumed = done + 1, resumed + state.is_file()
        elif process.wait():
            raise RuntimeError(f"{script} ended with exit code {process.returncode}")
        else:
            return done, resumed


def row(script: str, kills: int, rng: random.Random, folder: Path) -> str:
    began = time.time()
    if start(script, folder / "whole").wait():
        raise RuntimeError(f"{script} failed undisturbed")
    seconds = time.time() - began
    done, resumed = disturbed(script, folder / "cut", kills, rng)
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    leftovers = [p.name for p in (folder / "cut").iterdir() if p.name.endswith(".tmp")]
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
    args.output.write_text(f"""# Killed and resumed

`python benchmarks/kill_and_resume.py`, {time.strftime("%Y-%m-%d")}, {machine_name()}, {torch.get_num_threads()}
threads, torch {torch.__version__}, seed {args.seed}. Every run is killed with SIGKILL at random moments and started
again with the same command.

| script | undisturbed, s | kills | with a state on disk | same weights, byte for byte | temporary files left |
|---|---|---|---|---|---|
{chr(10).join(rows)}
""")


if __name__ == "__main__":
    main()
